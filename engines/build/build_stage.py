"""One stage's engine: built, checked on the bundle's references, mended if it is wrong, kept.

An engine that fails its gate never gets an engine's name.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import hipa_deploy
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.engines.build.best_of import time_engine
from hipa_deploy.engines.build.engine_check import check_engine
from hipa_deploy.engines.build.fusion_count import count_attentions
from hipa_deploy.engines.build.ladder import (
    StageGraph,
    advice,
    applied_remedies,
    build_facts,
    from_the_start,
    ladder,
)
from hipa_deploy.engines.build.suspects import bisect_engine, stage_job
from hipa_deploy.engines.build.worker import Job, Outcome
from hipa_deploy.engines.build.worker_process import Report, run_worker
from hipa_deploy.engines.faults.bisect import Bisection
from hipa_deploy.engines.faults.known_faults import Build
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import (
    Attempt,
    EngineCheck,
    Rejection,
    Sidecar,
    check_engine_file,
    engine_path,
    find_sidecars,
    read_sidecar,
    rejected_path,
    rejection_path,
)
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.errors import HipaError


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk.

    Attributes:
        stage: the name of the stage.
        path: the engine file.
        sidecar: the content of the JSON file beside it.
        up_to_date: an engine with an equal key existed already, so nothing was built.

    """

    stage: str
    path: Path
    sidecar: Sidecar
    up_to_date: bool


def sidecar_path(folder: Path, stage: str, key: EngineKey) -> Path:
    """The path of the sidecar of an engine with ``key``; the engine lies beside it."""
    return folder / f"{stage}-{key.short}.json"


def up_to_date(
    folder: Path,
    stage: str,
    key: EngineKey,
    best_of: int = 1,
    accept: Callable[[Sidecar], bool] = lambda sidecar: True,
) -> Path | None:
    """The sidecar of a whole engine that need not be built again; None if there is none.

    Its key is ``key``, whatever repairs it got on this way. It was the fastest of at least
    ``best_of`` candidates, and ``accept`` says yes to its sidecar.
    """
    # The engine without repairs first: it is the faster one.
    plain = sidecar_path(folder, stage, key)
    others = sorted(set(folder.glob(f"{stage}-*.json")) - {plain})
    for path in (plain, *others):
        try:
            sidecar = read_sidecar(path)
            check_engine_file(engine_path(path), sidecar, "")
        except (HipaError, OSError):
            continue
        # A single candidate is not timed, so an empty list stands for one candidate.
        candidates = max(len(sidecar.candidates_ms), 1)
        same = sidecar.key.repaired(Repairs()) == key.repaired(Repairs())
        if same and candidates >= best_of and accept(sidecar):
            return path
    return None


@dataclass
class _Built:
    """A candidate that was built: where it lies for now, and what is known of it."""

    scratch: Path
    key: EngineKey
    outcome: Outcome
    candidates_ms: tuple[float, ...]
    check: EngineCheck


@dataclass
class StageBuild:
    """The build of one stage.

    Args:
        bundle: the bundle.
        stage: the stage's name.
        key: the key of its engine, without repairs.
        folder: where the engine goes. Its lock is held.
        options: the options of the builder.
        best_of: how many candidates are built.
        repair: whether remedies of known faults are applied, and an engine that fails its gate is
            mended; else it is as TensorRT makes it, and rejected at once.
        without_remedies: ids of known faults whose remedy is left out, unless the engine fails.
        reporter: makes what a worker's events are given to, for the number of a candidate.
        say: shows in a few words what is done now.

    """

    bundle: Bundle
    stage: str
    key: EngineKey
    folder: Path
    options: BuildOptions
    best_of: int
    repair: bool
    reporter: Callable[[int], Report] = lambda number: lambda event: None
    say: Callable[[str], None] = lambda words: None
    without_remedies: tuple[str, ...] = ()
    _attempts: list[Attempt] = field(default_factory=list)
    _bisection: Bisection | None = None
    _number: int = 0

    def found(self) -> BuiltEngine | None:
        """The engine that is there already and runs, if it is up to date; nothing is written."""
        graph = StageGraph.read(self.bundle, self.stage)
        facts = build_facts(self.bundle, self.stage, self.key, graph.graph)
        path = self._up_to_date(self._start(facts))
        if path is None:
            return None
        sidecar = read_sidecar(path)
        place = _place_of(sidecar.key)
        rivals = [other for other, its in self._sidecars().items() if _place_of(its.key) == place]
        # Of those that run on the same GPU it must be the one that does.
        return self._up_to_date_engine(path, sidecar) if rivals[:1] == [path] else None

    def run(self) -> BuiltEngine:
        """Build the engine, or find one that is up to date and right.

        Raises:
            HipaError: the build fails, or no engine passes its gate; the message begins with the
                stage.

        """
        graph = StageGraph.read(self.bundle, self.stage)
        facts = build_facts(self.bundle, self.stage, self.key, graph.graph)
        documented = from_the_start(facts)
        start = self._start(facts)
        kept = self._existing(start)
        if kept is not None:
            return kept

        with ExitStack() as stack:
            try:
                first = self._first(graph, facts, start, stack)
                if first.check.outcome != "failed":
                    self._warn_of_what_was_left_out(first, documented)
                    return self._keep(first, graph)
                self._note(first)
                if self.repair:
                    for repairs in ladder(
                        graph,
                        facts,
                        start,
                        self.options.optimization_level,
                        lambda: self._locate(graph, first),
                    ):
                        mended = self._try(graph, repairs, stack)
                        if mended is not None:
                            return self._keep(mended, graph)
                raise self._reject(first, graph, advice(facts))
            except HipaError as error:
                raise HipaError(f"{self.stage}: {error}") from None

    def _first(self, graph: StageGraph, facts: Build, start: Repairs, stack: ExitStack) -> _Built:
        """The first build. If it fails, the error says what may be the cause."""
        try:
            return self._build(graph, start, stack)
        except HipaError as error:
            words = f"{error}{_known(advice(facts, str(error)))}"
            # With the remedies of known faults, they may be the cause.
            if start.any:
                options = " ".join(f"--without-remedy {name}" for name in start.known_faults)
                words += (
                    f" It was built with the remedies of known faults of this TensorRT ({start}). "
                    f"To leave them out: {options}"
                )
            raise HipaError(words) from None

    def _start(self, facts: Build) -> Repairs:
        """The remedies of known faults that the first build has."""
        return from_the_start(facts, self.without_remedies) if self.repair else Repairs()

    def _up_to_date(self, start: Repairs) -> Path | None:
        return up_to_date(
            self.folder, self.stage, self.key, self.best_of, lambda found: _has(found, start)
        )

    def _existing(self, start: Repairs) -> BuiltEngine | None:
        """The engine that is there already, checked if this machine can; None if it is no use."""
        path = self._up_to_date(start)
        if path is None:
            return None
        sidecar = read_sidecar(path)
        if sidecar.check is None or sidecar.check.outcome == "not run":
            self.say("checking")
            check = check_engine(self.bundle, self.stage, engine_path(path), sidecar.key)
            if check.outcome == "failed":
                self.say(f"what was there is wrong ({check.detail}); building anew")
                self._set_aside(path, Rejection(sidecar=_checked(sidecar, check)))
                return None
            if check.outcome == "passed":
                sidecar = _checked(sidecar, check)
                _write(path, sidecar)
        sidecar = self._choose(path, sidecar)
        return self._up_to_date_engine(path, sidecar)

    def _up_to_date_engine(self, path: Path, sidecar: Sidecar) -> BuiltEngine:
        return BuiltEngine(self.stage, engine_path(path), sidecar, up_to_date=True)

    def _sidecars(self) -> dict[Path, Sidecar]:
        """Those of this stage's engines, the one that was chosen last first."""
        return find_sidecars(self.bundle, self.stage, self.key.flavour, skip_damaged=True)

    def _choose(self, path: Path, sidecar: Sidecar) -> Sidecar:
        """Note that this engine was asked for last: of several that fit, that one runs."""
        if sidecar.chosen_at is not None and next(iter(self._sidecars())) == path:
            return sidecar
        sidecar = sidecar.model_copy(update={"chosen_at": time.time()})
        _write(path, sidecar)
        return sidecar

    def _build(self, graph: StageGraph, repairs: Repairs, stack: ExitStack) -> _Built:
        """Build the candidates, choose the fastest, and run it on the references.

        Raises:
            HipaError: the build fails.

        """
        key = self.key.repaired(repairs)
        best, outcome = self._candidate(0, graph, key, stack)
        latencies_ms: list[float] = []
        # Timing needs a GPU; a single candidate needs no timing.
        if self.best_of > 1:
            latencies_ms.append(self._time(best, key))
        for number in range(1, self.best_of):
            other, its_outcome = self._candidate(number, graph, key, stack)
            latencies_ms.append(self._time(other, key))
            # The slower one goes at once: engines have gigabytes, and there may be 20 of them.
            if latencies_ms[-1] < min(latencies_ms[:-1]):
                best, other = other, best
                outcome = its_outcome
            other.unlink()
        self.say("checking")
        check = check_engine(self.bundle, self.stage, best, key)
        return _Built(best, key, outcome, tuple(latencies_ms), check)

    def _candidate(
        self, number: int, graph: StageGraph, key: EngineKey, stack: ExitStack
    ) -> tuple[Path, Outcome]:
        """Build into a scratch file, which is removed however the build ends."""
        self._number += 1
        name = f".{self.stage}-{key.short}-{os.getpid()}-{self._number}.tmp"
        scratch = self.folder / name
        stack.callback(scratch.unlink, missing_ok=True)
        outcome = run_worker(self._job(graph, key, scratch), self.reporter(number))
        self._warn_of_lost_timings(outcome)
        return scratch, outcome

    def _warn_of_lost_timings(self, outcome: Outcome) -> None:
        if outcome.timing_cache_problem is not None:
            warnings.warn(
                f"{self.stage}: the timings of this build could not be kept "
                f"({outcome.timing_cache_problem}): the next build takes as long. "
                "Name another file with --timing-cache.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _warn_of_what_was_left_out(self, built: _Built, documented: Repairs) -> None:
        """Say that an engine may be wrong which has not the remedies, and was not checked."""
        had = (built.key.repairs or Repairs()).known_faults
        missing = [name for name in documented.known_faults if name not in had]
        if missing and built.check.outcome == "not run":
            warnings.warn(
                f"{self.stage}: built without the remedy of {', '.join(missing)}, and not checked "
                f"({built.check.detail}). It may be silently wrong.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _time(self, path: Path, key: EngineKey) -> float:
        spec = self.bundle.all_stages[self.stage].spec
        if key.barriers:
            return time_engine(path, spec, key.flavour, key.barriers)
        return time_engine(path, spec, key.flavour)

    def _job(self, graph: StageGraph, key: EngineKey, out: Path) -> Job:
        return stage_job(self.bundle, self.stage, graph, key, out, self.options)

    def _try(self, graph: StageGraph, repairs: Repairs, stack: ExitStack) -> _Built | None:
        """Build with ``repairs``; None if the engine is still wrong, or cannot be built so."""
        self.say(f"trying {repairs}")
        try:
            built = self._build(graph, repairs, stack)
        except HipaError as error:
            self._attempts.append(Attempt(repairs=repairs, error=str(error)))
            return None
        self._note(built)
        if built.check.outcome == "passed":
            return built
        # Its check and its time are noted: of wrong engines only the first is kept.
        built.scratch.unlink()
        return None

    def _note(self, built: _Built) -> None:
        """Write down a build and its time, so that one sees what a repair costs."""
        latency_ms = None
        # An engine that does not run has no time.
        with contextlib.suppress(HipaError):
            latency_ms = self._time(built.scratch, built.key)
        self._attempts.append(
            Attempt(
                repairs=built.key.repairs or Repairs(),
                check=built.check,
                build_seconds=built.outcome.seconds,
                latency_ms=latency_ms,
            )
        )

    def _locate(self, graph: StageGraph, wrong: _Built) -> Bisection:
        """Where the engine goes wrong."""
        self.say("looking for where it goes wrong")
        job = self._job(graph, wrong.key, wrong.scratch)
        self._bisection = bisect_engine(self.bundle, self.stage, graph, job)
        return self._bisection

    def _keep(self, built: _Built, graph: StageGraph) -> BuiltEngine:
        """Rename the scratch file to the engine's name, then write its sidecar.

        The order matters: an engine without a sidecar is never used, so a crash between the two
        leaves nothing that could be mistaken for a good engine.
        """
        path = sidecar_path(self.folder, self.stage, built.key)
        sidecar = self._sidecar(built, graph)
        built.scratch.replace(engine_path(path))
        _write(path, sidecar)
        # What failed before under this name is of no more interest.
        for leftover in (rejected_path(path), rejection_path(path)):
            leftover.unlink(missing_ok=True)
        skipped = built.outcome.skipped_tactics
        words = "built"
        if skipped:
            words += f"; {skipped} tactics did not fit in memory and were skipped (harmless)"
        if self._attempts:
            words += f"; mended by: {built.key.repairs}"
        self.say(words)
        return BuiltEngine(self.stage, engine_path(path), sidecar, up_to_date=False)

    def _sidecar(self, built: _Built, graph: StageGraph) -> Sidecar:
        return Sidecar(
            producer=f"hipa-deploy {hipa_deploy.__version__}",
            stage=self.stage,
            key=built.key,
            precision_check=built.outcome.precision_check,
            engine_sha256=file_sha256(built.scratch),
            engine_bytes=built.scratch.stat().st_size,
            chosen_at=time.time(),
            activation_bytes=built.outcome.activation_bytes,
            build_seconds=built.outcome.seconds,
            build_peak_mib=built.outcome.peak_mib,
            candidates_ms=built.candidates_ms,
            check=built.check,
            attention=count_attentions(
                self.bundle, self.stage, graph, built.key, built.outcome.fused_attentions
            ),
            attempts=tuple(self._attempts),
            remedies=applied_remedies(built.key.repairs or Repairs()),
        )

    def _reject(self, built: _Built, graph: StageGraph, tips: tuple[str, ...]) -> HipaError:
        """Keep a wrong engine apart with its report, and make the error that says so."""
        path = sidecar_path(self.folder, self.stage, built.key)
        report = Rejection(
            sidecar=self._sidecar(built, graph), bisection=self._bisection, advice=tips
        )
        built.scratch.replace(rejected_path(path))
        _write(rejection_path(path), report)
        tried = len(self._attempts) - 1
        where = f" {self._bisection}" if self._bisection else ""
        more = _known(tips)
        return HipaError(
            f"the engine is wrong: {built.check.detail}. {tried} repairs did not mend it.{where}"
            f"{more} It is kept as {rejected_path(path)}, which no command loads. Export the "
            "bundle with --dtype fp32, or use --backend onnxruntime-cuda."
        )

    def _set_aside(self, path: Path, report: Rejection) -> None:
        """Take an engine that is on disk out of use: its sidecar goes first."""
        path.unlink()
        engine_path(path).replace(rejected_path(path))
        _write(rejection_path(path), report)


def _known(tips: tuple[str, ...]) -> str:
    return f" Known of this TensorRT: {' '.join(tips)}" if tips else ""


def _has(sidecar: Sidecar, start: Repairs) -> bool:
    """Whether an engine has the remedies of ``start``, and more of them only because it had to."""
    had = set((sidecar.key.repairs or Repairs()).known_faults)
    wanted = set(start.known_faults)
    # Otherwise it is older than what is known of this TensorRT.
    if not wanted <= had:
        return False
    return had == wanted or bool(sidecar.attempts)


def _place_of(key: EngineKey) -> EngineKey:
    """What decides where an engine runs: engines of one place take it from one another."""
    return key.repaired(Repairs()).model_copy(update={"options": BuildOptions()})


def _checked(sidecar: Sidecar, check: EngineCheck) -> Sidecar:
    return sidecar.model_copy(update={"check": check})


def _write(path: Path, record: Sidecar | Rejection) -> None:
    write_file(path, record.model_dump_json(indent=2).encode() + b"\n")
