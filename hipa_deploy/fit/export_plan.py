"""Whether an export will fit the device that it is for, predicted before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.backends.available import ANOTHER_MACHINE
from hipa_deploy.engines.build.memory_plan import plan_memory, plan_stages
from hipa_deploy.engines.targets.memory_needs import Need
from hipa_deploy.engines.targets.run_memory import StageSize
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import early_model, has_safety_checker
from hipa_deploy.fit.model_sizes import predicted_sizes
from hipa_deploy.fit.target_choice import profile_for

Change = Callable[[ExportOptions], ExportOptions]


@dataclass(frozen=True)
class _Way:
    """A change of an export, in words, and what is needed then."""

    words: str
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        """Whether everything fits then."""
        return not _misfits(self.needs)

    def __str__(self) -> str:
        most = ", ".join(f"{need.what} {need.need:,} MiB" for need in self.needs)
        return f"{self.words} ({most})"


def plan_export(options: ExportOptions, target: str) -> tuple[Need, ...]:
    """Predict what building and running an export takes on a target, and refuse what cannot fit.

    Args:
        options: a request that ``check_request`` has passed.
        target: a name in ``engines/targets``.

    Returns:
        What is needed on the device; nothing where the weights are in files that torch alone can
        read.

    Raises:
        HipaError: it does not fit; the message has the figures, and what would fit.

    """
    sizes = predicted_sizes(options)
    if sizes is None:
        return ()
    needs = _needs(sizes, target)
    misfits = _misfits(needs)
    if misfits:
        raise HipaError(
            f"--for {target}: {'; '.join(map(str, misfits))}. {_what_would_fit(options, target)} "
            "The memory plan is a prediction: without --for the export does not ask for it."
        )
    return needs


def bundle_needs(bundle: Bundle, target: str) -> tuple[Need, ...]:
    """Predict what building and running a bundle takes on a target, by the bundle's own files."""
    profile = profile_for(target)
    swap_mib = (profile.suits.swap_gib or 0) * 1024
    plan = plan_memory(
        bundle,
        bundle.all_stages,
        profile.suits.backend,
        target,
        profile.build,
        ANOTHER_MACHINE,
        swap_mib,
    )
    return tuple(need for need in plan.needs if need.where == profile.title)


def need_lines(needs: Iterable[Need]) -> list[str]:
    """What is needed, for the user to read."""
    return [f"predicted: {need}: {need.verdict}" for need in needs]


def _needs(
    sizes: tuple[StageSize, ...], target: str, swap_gib: int | None = None
) -> tuple[Need, ...]:
    """What is needed on the target itself: an engine of TensorRT-RTX is built on any machine."""
    profile = profile_for(target)
    if swap_gib is None:
        swap_gib = profile.suits.swap_gib or 0
    plan = plan_stages(
        sizes,
        tuple(size.stage for size in sizes),
        profile.suits.backend,
        profile,
        profile.build,
        ANOTHER_MACHINE,
        swap_mib=swap_gib * 1024,
    )
    return tuple(need for need in plan.needs if need.where == profile.title)


def _misfits(needs: Iterable[Need]) -> list[Need]:
    return [need for need in needs if need.verdict == "does not fit"]


def _what_would_fit(options: ExportOptions, target: str) -> str:
    """The changes that make everything fit, each by itself, or else all of them together."""
    changes = _changes(options)
    ways = []
    for words, change in changes:
        ways.append(_way(words, change(options), target))
    everything = options
    for _, change in changes:
        everything = change(everything)
    ways += _with_swap("", options, target)

    fitting = [str(way) for way in ways if way.fits]
    if not fitting and len(changes) > 1:
        words = " ".join(words for words, _ in changes)
        together = [_way(words, everything, target)]
        together += _with_swap(f"{words}, and ", everything, target)
        fitting = [str(way) for way in together if way.fits]
    if not fitting:
        return "No option makes it fit. Take a smaller model, or a device with more memory."
    return f"What would fit: {'; '.join(fitting)}."


def _changes(options: ExportOptions) -> list[tuple[str, Change]]:
    """What could make an export smaller, as an option."""
    changes: list[tuple[str, Change]] = []
    if options.dtype != "fp16":
        changes.append(("--dtype fp16", lambda old: replace(old, dtype="fp16")))
    if options.batch > 1:
        changes.append(("--batch 1", lambda old: replace(old, batch=1)))
    if options.dynamic:
        changes.append(("no --dynamic", lambda old: replace(old, dynamic={})))
    if options.height is not None or options.width is not None:
        changes.append(
            ("no --height and --width", lambda old: replace(old, height=None, width=None))
        )
    if options.with_teacher:
        changes.append(("no --with-teacher", lambda old: replace(old, with_teacher=False)))
    if options.safety and has_safety_checker(early_model(options.model).folder):
        changes.append(("--mark no-safety", lambda old: replace(old, safety=False)))
    if options.layout == "onestep":
        if options.decoder is None:
            # Its size is always the same: which folder it is in does not matter.
            changes.append(("--decoder tiny", lambda old: replace(old, decoder=Path("tiny"))))
        if options.prompts is None:
            changes.append(("--prompts FILE", lambda old: replace(old, prompts=Path("FILE"))))
    return changes


def _way(words: str, options: ExportOptions, target: str) -> _Way:
    sizes = predicted_sizes(options)
    return _Way(words, () if sizes is None else _needs(sizes, target))


def _with_swap(before: str, options: ExportOptions, target: str) -> list[_Way]:
    """The way that more swap is, where all that is short can be swapped."""
    sizes = predicted_sizes(options)
    if sizes is None:
        return []
    over = 0
    for need in _misfits(_needs(sizes, target)):
        over = max(over, need.need - (need.have or 0))
    gib = math.ceil(over / 1024)
    return [_Way(f"{before}{gib} GiB of swap", _needs(sizes, target, gib))] if gib else []
