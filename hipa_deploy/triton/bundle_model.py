"""From a request to an image, where another program runs the stages. It knows no Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs.result import GenerateResult
from hipa_deploy.generate.jobs.withheld import withheld_error
from hipa_deploy.generate.parts.image_guard import bundle_marker
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.runner import ClosesAtExit, Runner, check_inputs, check_outputs
from hipa_deploy.generate.stages import host_stages
from hipa_deploy.marks.safety import SAFETY_STAGE
from hipa_deploy.triton.triton_config import largest_batch

Infer = Callable[[str, Mapping[str, np.ndarray], Sequence[str]], dict[str, np.ndarray]]
"""Runs a model: its name, inputs by name, and the outputs that are wanted."""

BACKEND = "triton"  # in the parameters of an image


class RemoteStage(ClosesAtExit):
    """One stage that another program runs: a ``Runner``.

    Args:
        spec: inputs and outputs of the stage.
        model: its name there.
        infer: runs a model there.

    """

    def __init__(self, spec: StageSpec, model: str, infer: Infer) -> None:
        self.spec = spec
        self._model = model
        self._infer = infer

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run it; what goes in and comes out is checked against the manifest."""
        sizes = check_inputs(self.spec, inputs)
        batched = largest_batch(self.spec) > 0
        sent = {name: _column(value) if batched else value for name, value in inputs.items()}
        outputs = self._infer(self._model, sent, [tensor.name for tensor in self.spec.outputs])
        check_outputs(self.spec, outputs, sizes)
        return outputs

    def close(self) -> None:
        """Nothing is held here."""


def _column(value: np.ndarray) -> np.ndarray:
    """One number an image, [B], as the stage's configuration has it: [B, 1]. Others stay."""
    return value[:, None] if value.ndim == 1 else value


class BundleModel:
    """A bundle's path from prompt to image, with stages elsewhere.

    Tokens, contexts, noise, sources and their checks are those of ``OneStepPipeline``.

    Args:
        folder: manifest, and tokenizer or baked prompts, of a bundle; without its stages.
        models: the name of each stage's model.
        infer: runs such a model.

    Raises:
        HipaError: a file that is missing or changed, or a stage without a model.

    Example:
        >>> model = BundleModel(Path("emoji/1/bundle"), {"unet": "emoji_unet", …}, infer)
        >>> model.image("3d emoji of a red apple", 3).images_BHWC.shape
        (1, 64, 64, 3)

    """

    def __init__(self, folder: Path, models: Mapping[str, str], infer: Infer) -> None:
        bundle = Bundle.open(folder)
        for name in text_files(bundle):
            if file_sha256(bundle.path(name)) != bundle.manifest.files[name]:
                raise HipaError(f"{folder / name} is not the file that the manifest lists.")
        runners: dict[str, Runner] = {}
        for name, stage in bundle.stages.items():
            if name not in models:
                raise HipaError(f"stage {name} has no model. Write the repository again.")
            runners[name] = RemoteStage(stage.spec, models[name], infer)
        safety = runners.pop(SAFETY_STAGE, None)
        stages = host_stages(bundle, BACKEND, runners)
        marker = bundle_marker(bundle, safety)
        self._pipe = OneStepPipeline(bundle, BACKEND, stages, marker=marker, safety=safety)

    def image(
        self,
        prompt: str,
        seed: int,
        image_HWC: np.ndarray | None = None,
        mask_HW: np.ndarray | None = None,
        strength: float | None = None,
        scale: float | None = None,
    ) -> GenerateResult:
        """Make one image; checked, and watermarked if the bundle's owner wants it.

        Args:
            prompt: what it shows.
            seed: in [0, 2**63).
            image_HWC: uint8 [H, W, 3], of the tasks edit, inpaint, upscale and control.
            mask_HW: uint8 [H, W], of the task inpaint; 255 is repainted.
            strength: of an edit; None is the bundle's largest.
            scale: how strongly a control image is followed, 0 to 2; None is 1.

        Returns:
            One image.

        Raises:
            HipaError: as the pipeline raises it; or a safety checker flags the image.

        """
        task = self._pipe.bundle.manifest.task
        if task == "generate":
            return shown(self._pipe.generate([(prompt, seed)]))
        if image_HWC is None:
            raise HipaError(f"this bundle is to {task}. Expected an input 'image'.")
        if task == "edit":
            result = self._pipe.edit(image_HWC, prompt, strength=strength, seed=seed)
        elif task == "inpaint":
            if mask_HW is None:
                raise HipaError("this bundle is to inpaint. Expected an input 'mask'.")
            mask = Image.fromarray(mask_HW)
            result = self._pipe.inpaint(image_HWC, mask, prompt, seed=seed)
        elif task == "control":
            scale = 1.0 if scale is None else scale
            result = self._pipe.control(image_HWC, prompt, scale=scale, seed=seed)
        else:
            result = self._pipe.upscale(image_HWC, prompt)
        return shown(result)


def shown(result: GenerateResult) -> GenerateResult:
    """The result of one image.

    Raises:
        HipaError: it is withheld.

    """
    if result.flagged:
        raise withheld_error(result.flagged, 1)
    return result


def text_files(bundle: Bundle) -> list[str]:
    """The files that turn a prompt into tokens or contexts, sorted, relative to the bundle."""
    folders = ("tokenizer/", "tokenizer_2/", "prompts/")
    return sorted(name for name in bundle.manifest.files if name.startswith(folders))
