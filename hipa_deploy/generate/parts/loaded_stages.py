"""The stages that are loaded now: calls share them, and a change has them alone.

All locks of a pipeline are here, but the refiner's, which loads the base UNet once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap, adapted_stage
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.open_stages import StagesInTurn
from hipa_deploy.generate.prompts import PromptSource
from hipa_deploy.generate.runner import ENGINE_BACKENDS, Runner
from hipa_deploy.generate.stages import Stages, host_stages
from hipa_deploy.shared_use import SharedUse


@dataclass(frozen=True)
class Loaded:
    """The stages and whose weights they hold: one value, so that no call sees half a swap.

    Attributes:
        stages: every stage of the bundle, loaded.
        swap: the adaptor that was swapped in; None: the bundle's own.

    """

    stages: Stages
    swap: AdaptorSwap | None = None


class LoadedStages:
    """What one pipeline has loaded, for any number of threads.

    Args:
        bundle: whose stages they are.
        backend: that runs them, not 'auto'.
        stages: as they were opened, with the bundle's own weights.
        prompts: the contexts that are remembered of the text encoder. They are forgotten when a
            swap changes it.

    """

    def __init__(self, bundle: Bundle, backend: str, stages: Stages, prompts: PromptSource) -> None:
        self._bundle = bundle
        self._backend = backend
        self._prompts = prompts
        self._now = Loaded(stages)
        self._use = SharedUse()  # calls share what is loaded, a swap has it alone
        self._one_swap = threading.Lock()
        self._closed = False
        self._process = os.getpid()

    @property
    def now(self) -> Loaded:
        """What is loaded at this moment. A swap may follow at once, unless the use is shared."""
        return self._now

    @property
    def in_turn(self) -> bool:
        """Whether the stages are loaded in turn, to take less memory."""
        return isinstance(self._now.stages, StagesInTurn)

    @contextmanager
    def shared(self) -> Iterator[Loaded]:
        """Use what is loaded, together with other calls. It stays as it is for so long.

        Raises:
            HipaError: the pipeline is closed, or another process loaded it.

        """
        self._check_process()
        with self._use.shared():
            self._check_open()
            yield self._now

    def swap(self, swap: AdaptorSwap | None) -> None:
        """Take another adaptor; see ``OneStepPipeline.swap_adaptor``.

        Args:
            swap: None: the bundle's own.

        Raises:
            HipaError: weights that are not of the bundle's graph, a backend that cannot take them,
                a pipeline that is closed or of another process, or a thread that is inside a call.
                What is loaded is as before; an engine that failed half way is closed.

        """
        from hipa_deploy.generate.swap_stage import swap_stage, swap_text_encoder  # the engines

        self._check_process()
        # Another swap has the lock until the call that this thread may be in has ended.
        self._use.check_outside()
        stages = self._now.stages
        if isinstance(stages, StagesInTurn):
            self._swap_in_turn(stages, swap)
            return
        stage = adapted_stage(self._bundle)
        # New sessions are released again unless they are taken.
        with self._one_swap, ExitStack() as opened:
            self._check_open()
            before = self._now.stages.runners
            changed: dict[str, Runner] = {}
            texts = _changed_texts(swap, self._now.swap)
            for name in texts:
                runner = swap_text_encoder(self._bundle, self._backend, swap, name)
                changed[name] = opened.enter_context(runner)
            if self._backend in ENGINE_BACKENDS:
                # An engine changes in place, so no call may be under way meanwhile.
                with self._use.alone():
                    self._check_open()
                    swap_stage(self._bundle, before[stage], self._backend, swap)
                    self._now = Loaded(self._now.stages, swap)
                return

            # ONNX Runtime gets new sessions. Calls go on with the old ones while they load.
            runner = swap_stage(self._bundle, before[stage], self._backend, swap)
            changed[stage] = opened.enter_context(runner)
            runners = {**before, **changed}
            with self._use.alone():
                self._check_open()
                opened.pop_all()
                self._now = Loaded(host_stages(self._bundle, self._backend, runners), swap)
                if texts:
                    self._prompts.forget()
                for name in changed:
                    before[name].close()

    def _swap_in_turn(self, stages: StagesInTurn, swap: AdaptorSwap | None) -> None:
        """The weights are taken when a stage is loaded next."""
        with self._one_swap, self._use.alone():
            self._check_open()
            texts = _changed_texts(swap, self._now.swap)
            stages.swap(swap)
            self._now = Loaded(stages, swap)
            if texts:
                self._prompts.forget()

    def check_swaps(self) -> None:
        """Check that another adaptor can be taken; nothing changes.

        Raises:
            HipaError: the backend cannot, an engine was not built for it, or the pipeline is
                closed or of another process.

        """
        from hipa_deploy.generate.swap_stage import check_swaps  # the engines

        self._check_process()
        stages = self._now.stages
        runner = None
        if not isinstance(stages, StagesInTurn):
            runner = stages.runners[adapted_stage(self._bundle)]
        with self._one_swap, self._use.alone():
            self._check_open()
            check_swaps(self._bundle, runner, self._backend)

    @property
    def is_of_parent(self) -> bool:
        """Whether this process is a fork of the one that loaded the stages."""
        return os.getpid() != self._process

    def close(self) -> None:
        """Release every stage, after the calls that are under way. Twice is harmless.

        Raises:
            HipaError: this thread is inside a call, for whose end it would wait for ever.

        """
        with self._use.alone():
            self._closed = True
            self._now.stages.close()

    def _check_process(self) -> None:
        # A fork has no other threads than the one that made it. ONNX Runtime then computes on one
        # core, CUDA fails, and a lock that another thread held is never released.
        if self.is_of_parent:
            raise HipaError(
                f"the pipeline was loaded by process {self._process}, and this is a fork of it, "
                f"process {os.getpid()}. Load the bundle in each process: with multiprocessing's "
                "'spawn' or after the fork, with gunicorn without --preload."
            )

    def _check_open(self) -> None:
        if self._closed:
            raise HipaError("the pipeline is closed. Load the bundle again.")


def _changed_texts(*swaps: AdaptorSwap | None) -> list[str]:
    """The text encoders that one of these swaps changes, a stage each."""
    stages: dict[str, None] = {}
    for swap in swaps:
        if swap is not None:
            stages |= dict.fromkeys(swap.manifest.texts)
    return list(stages)
