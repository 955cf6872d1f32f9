"""The models of a service: bundles and their adaptors, by name."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.adaptor_swap import FOLDER, AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import bundle_name, resolve_bundle
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.jobs.batch_sizes import WarmUp
from hipa_deploy.generate.open_stages import has_engine
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.runner import check_backend
from hipa_deploy.marks.safety import Checker
from hipa_deploy.serve.batcher import TRY_SECONDS, Batcher
from hipa_deploy.serve.serve_metrics import ServeMetrics
from hipa_deploy.serve.settings import Limits

_LOG = logging.getLogger("hipa.serve")
# Of a model: it stands in JSON, in logs, in the labels of metrics, and in a path of the API.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ServedBundle:
    """A bundle that is served: first its manifest alone, after ``load`` its pipeline and queue.

    Args:
        name: of the model.
        root: the bundle's folder.

    Attributes:
        swap_problem: why its adaptors cannot be swapped in, once it is loaded; None: they can.

    Raises:
        HipaError: no bundle, or an adaptor in its folder that does not belong to it.

    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        # As the pipeline has it: answers have the model's name in place of the folder.
        self.bundle = Bundle.open(root.absolute())
        self.adaptors = _adaptors(self.bundle)
        self.created = int(time.time())
        self.pipe: OneStepPipeline | None = None
        self.batcher: Batcher | None = None
        self.warm_up: WarmUp | None = None
        self.backend: str | None = None
        self.batch_sizes: tuple[int, ...] | None = None
        self.swap_problem: str | None = None
        self._elsewhere = False

    def load(
        self,
        backend: str,
        limits: Limits,
        metrics: ServeMetrics,
        checker: Checker | None = None,
    ) -> None:
        """Load the pipeline, make the first images, and start the queue.

        Args:
            backend: what runs it.
            limits: of the service.
            metrics: of the service.
            checker: the owner's function that sees every image, as ``OneStepPipeline.load`` takes
                it.

        Raises:
            HipaError: as ``OneStepPipeline.load`` and ``warmup``.

        """
        pipe = OneStepPipeline.load(self.bundle.root, backend, checker=checker)
        try:
            if self.adaptors:
                self.swap_problem = _swap_problem(pipe)
            self.warm_up = pipe.warmup(limits.batch)
        except BaseException:
            pipe.close()
            raise
        watch = metrics.watch(self.name)
        self.pipe = pipe
        self.backend = pipe.backend
        self.batch_sizes = pipe.batch_sizes
        self.batcher = Batcher(
            pipe,
            queue=limits.queue,
            wait=limits.wait,
            watch=watch,
            name=f"batches of {self.name}",
            told=self._log_change,
        )
        metrics.queue_length(self.name, lambda: self.waiting)

    def loaded_elsewhere(
        self, backend: str, batch_sizes: tuple[int, ...], swap_problem: str | None = None
    ) -> None:
        """Note that other processes make this bundle's images, and how."""
        self.backend = backend
        self.batch_sizes = batch_sizes
        self.swap_problem = swap_problem
        self._elsewhere = True

    @property
    def ready(self) -> bool:
        """Whether the first image was made, and images are made since then as far as is known."""
        return self._elsewhere or (self.batcher is not None and self.batcher.working)

    @property
    def refines(self) -> bool:
        """Whether it has a base model to refine with, and what its backend needs of it."""
        refinement = self.bundle.manifest.refine
        if refinement is None:
            return False
        return has_engine(self.bundle, refinement.stage.spec.name, self.backend or "auto")

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self.batcher.waiting if self.batcher else 0

    def _log_change(self, works: bool) -> None:
        """Say that the backend makes no images any more, or makes them again."""
        facts: dict[str, str | None] = {"bundle": self.name, "backend": self.backend}
        if works:
            _LOG.info("backend works again", extra={"facts": facts})
            return
        facts["remedy"] = f"restart the service if it does not recover within {TRY_SECONDS:g} s"
        _LOG.error("backend makes no images", extra={"facts": facts})

    def close(self) -> None:
        """Make what waits, and release the pipeline."""
        if self.batcher:
            self.batcher.close()
        if self.pipe:
            self.pipe.close()


@dataclass(frozen=True)
class Model:
    """A model's name, and what it stands for.

    Attributes:
        name: 'BUNDLE' or 'BUNDLE:ADAPTOR'.
        served: the bundle.
        adaptor: a name in the bundle's adaptors folder; None is the bundle's own.

    """

    name: str
    served: ServedBundle
    adaptor: str | None = None

    @property
    def is_offered(self) -> bool:
        """Whether its images can be made: not every backend takes another adaptor."""
        return self.adaptor is None or self.served.swap_problem is None


class Models:
    """All models of a service.

    Args:
        bundles: 'PATH' or 'NAME=PATH' each; the name is the folder's, if none is given.

    Raises:
        HipaError: no bundle, two of one name, or a name that cannot be used.

    """

    def __init__(self, bundles: Sequence[str]) -> None:
        self.served: list[ServedBundle] = []
        self.by_name: dict[str, Model] = {}
        for text in bundles:
            name, root = _name_and_folder(text)
            if name in self.by_name:
                raise HipaError(
                    f"two bundles are called {name!r}. Give one another name: OTHER={root}"
                )
            served = ServedBundle(name, root)
            self.served.append(served)
            for adaptor in (None, *served.adaptors):
                model = Model(f"{name}:{adaptor}" if adaptor else name, served, adaptor)
                self.by_name[model.name] = model

    @property
    def offered(self) -> list[Model]:
        """The models whose images can be made, as far as is known: all before they are loaded."""
        return [model for model in self.by_name.values() if model.is_offered]

    def for_task(self, *tasks: str) -> list[Model]:
        """The bundles without another adaptor that are for one of the tasks."""
        own = [model for model in self.by_name.values() if model.adaptor is None]
        return [model for model in own if model.served.bundle.manifest.task in tasks]

    @property
    def ready(self) -> bool:
        """Whether every bundle is."""
        return all(served.ready for served in self.served)

    def close(self) -> None:
        """Close every bundle."""
        for served in self.served:
            served.close()


def check_start(bundles: Sequence[str], backend: str) -> Models:
    """Check what can be checked before anything is loaded.

    Raises:
        HipaError: an unknown backend, or as ``Models``.

    """
    check_backend(backend)
    return Models(bundles)


def _swap_problem(pipe: OneStepPipeline) -> str | None:
    """Why a pipeline cannot take another adaptor; None: it can."""
    try:
        pipe.check_swaps()
    except HipaError as error:
        return str(error)
    return None


def _name_and_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        name, folder = "", text
    root = resolve_bundle(folder)
    name = name or bundle_name(folder)
    if not _NAME.fullmatch(name):
        raise HipaError(
            f"{brief(name)} cannot be the name of a model. Expected letters, digits and . _ -, "
            f"such as: my-model={folder}"
        )
    return name, root


def _adaptors(bundle: Bundle) -> tuple[str, ...]:
    """The adaptors in the bundle's folder, sorted; each is opened, so that a damaged one is found.

    Raises:
        HipaError: a folder that is no adaptor of this bundle.

    """
    folder = bundle.root / FOLDER
    names = []
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                AdaptorSwap.open(bundle, path.name)
                names.append(path.name)
    for name in names:
        if not _NAME.fullmatch(name):
            raise HipaError(
                f"{folder / name}: {brief(name)} cannot be the name of a model. Expected letters, "
                "digits and . _ -. Rename the folder."
            )
    return tuple(names)
