"""Open what a pipeline needs of a bundle: what is wrong is found before seconds of loading."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.open_stages import (
    Kept,
    StagesInTurn,
    open_runner,
    open_stages,
    resolve_backend,
)
from hipa_deploy.generate.parts.image_guard import checkers_of, payload_of
from hipa_deploy.generate.prompts import PromptSource, open_prompts
from hipa_deploy.generate.runner import Runner, check_backend
from hipa_deploy.generate.stages import Stages
from hipa_deploy.marks.marker import ImageMarker
from hipa_deploy.marks.safety import SAFETY_STAGE, Checker


@dataclass(frozen=True)
class OpenParts:
    """What ``OneStepPipeline`` is made of.

    Attributes:
        bundle: whose files are as its manifest says.
        backend: that runs the stages, not 'auto'.
        stages: all that the one step needs, loaded.
        prompts: reads prompts.
        marker: what is done to every image.
        safety: the safety checker's network; None where the bundle has none.

    """

    bundle: Bundle
    backend: str
    stages: Stages
    prompts: PromptSource
    marker: ImageMarker
    safety: Runner | None


def open_parts(
    bundle: str | Path,
    backend: str,
    *,
    verify: bool,
    cache: bool,
    watermark: bool | int | None,
    checker: Checker | None,
    low_memory: bool,
) -> OpenParts:
    """Open a bundle, check the hashes of its files and load its stages.

    The arguments and the errors are those of ``OneStepPipeline.load``.
    """
    check_backend(backend)
    if not isinstance(bundle, str | PathLike):
        raise HipaError(f"the bundle is {brief(bundle)}. Expected a folder, or 'emoji'.")
    if checker is not None and not callable(checker):
        raise HipaError(f"checker is {brief(checker)}. Expected a function that sees images.")
    # Files are opened later too: the folder is the same one after a change of the current folder.
    opened = Bundle.open(resolve_bundle(bundle).absolute())
    opened.verify(remembered=not verify)
    name = resolve_backend(backend, opened)
    # The tokenizer first: what is wrong with it is found before seconds of loading.
    prompts = open_prompts(opened)
    kept: Kept = "none"
    if cache:
        kept = "renew" if verify else "use"
    payload = payload_of(opened, watermark)
    stages = open_stages(opened, name, low_memory=low_memory, kept=kept)
    safety = None
    try:
        if opened.manifest.safety is not None:
            if isinstance(stages, StagesInTurn):
                safety = stages.runners[SAFETY_STAGE]
            else:
                safety = open_runner(opened, SAFETY_STAGE, name, kept=kept)
        marker = ImageMarker(payload, checkers_of(opened, safety, checker))
    except BaseException:
        stages.close()
        if safety is not None:
            safety.close()
        raise
    return OpenParts(opened, name, stages, prompts, marker, safety)
