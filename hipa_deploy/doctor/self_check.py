"""Does this device give the images that the bundle's export gave? The reference prompt again, by the same gates."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Parity, Precision
from hipa_deploy.bundle.parity import MIN_PSNR_DB, compare, problem
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.images.source import Source

REFERENCE_TENSORS, REFERENCE_PROMPTS = "reference/tensors.npz", "reference/prompts.json"
END_TO_END = "end to end"

# The reference tensor that a stage's output is compared with.
_EXPECTED = {
    "onestep": {
        "text_encoder": "context",
        "vae_encoder": "source",
        "unet": "latents",
        "vae_decoder": "images",
        "generator": "images",
    },
    "generic": {"text_encoder": "context", "unet": "output", "vae_decoder": "sample"},
}
_NOISE_TOLERANCE = 1e-5  # another libm's logarithm may round another way


class StageCheck(BaseModel):
    """One output against PyTorch FP32. ``parity`` is None where there is nothing to measure: NaN, or another shape."""

    model_config = ConfigDict(frozen=True)

    parity: Parity | None
    least_psnr_db: float
    problem: str | None

    def __str__(self) -> str:
        figure = (
            f"{self.parity.psnr_db:.1f} dB from PyTorch FP32"
            if self.parity
            else "nothing to measure"
        )
        return f"{figure}, gate {self.least_psnr_db:.0f} dB: {self.problem or 'passes'}"


class SelfCheck(BaseModel):
    """What the device gave for the reference prompt, stage by stage and end to end."""

    model_config = ConfigDict(frozen=True)

    backend: str
    prompt: str
    stages: dict[str, StageCheck]
    end_to_end: StageCheck
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """A bundle's reference prompt, the seeds of its batch, and PyTorch's FP32 tensors by name."""

    prompt: str
    seeds: list[int]
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, bundle: Bundle) -> Reference:
        """Read the reference of ``bundle``.

        Raises:
            HipaError: the bundle has none, or its files are not what an export writes.

        """
        try:
            text = json.loads(bundle.path(REFERENCE_PROMPTS).read_text())
            with np.load(bundle.path(REFERENCE_TENSORS)) as tensors:
                return cls(text["prompts"][0], list(text["seeds"]), dict(tensors))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise HipaError(
                f"{bundle.root}/reference cannot be read ({error!r}). Export the bundle again."
            ) from None


def check_bundle(bundle: Bundle, backend: str = "auto") -> SelfCheck:
    """Run the reference prompt of ``bundle`` on ``backend`` and compare with the tensors it carries.

    Failures of the gates are in the report's ``problems``, a line each.

    Raises:
        HipaError: the bundle cannot be read, or the backend cannot run it here.

    """
    with OneStepPipeline.load(bundle.root, backend) as pipe:
        return check_pipeline(pipe)


def check_pipeline(pipe: OneStepPipeline) -> SelfCheck:
    """The same, with a pipeline that is loaded.

    A stage is fed what the stages before it gave, so errors accumulate as they do in the manifest's
    parity. End to end is ``pipe`` as a user calls it, prompt to image.

    Raises:
        HipaError: the bundle has no reference that fits it, or a stage cannot run.

    """
    reference = Reference.read(pipe.bundle)
    precision = pipe.bundle.manifest.precision
    _check_noise(pipe.bundle, reference)

    # Stage by stage: one run that keeps every tensor, each beside PyTorch's.
    tensors = pipe.tensors(
        reference.prompt,
        source=_source(reference, pipe.bundle),
        seed=reference.seeds[0],
        count=len(reference.seeds),
    )
    stages = {}
    for stage in pipe.bundle.stages:
        name = _EXPECTED[pipe.bundle.manifest.layout][stage]
        stages[stage] = _check(tensors[name], _tensor(reference, name, pipe.bundle), precision)

    # And as a user calls it.
    images_BHWC = _generate(pipe, reference)
    whole = _check(images_BHWC, _tensor(reference, "images", pipe.bundle), precision)

    problems = [
        f"{name} on {pipe.backend} {check.problem}."
        for name, check in {**stages, END_TO_END: whole}.items()
        if check.problem
    ]
    return SelfCheck(
        backend=pipe.backend,
        prompt=reference.prompt,
        stages=stages,
        end_to_end=whole,
        problems=tuple(problems),
    )


def _generate(pipe: OneStepPipeline, reference: Reference) -> np.ndarray:
    source = _source(reference, pipe.bundle)
    return pipe(
        reference.prompt, source=source, seed=reference.seeds[0], count=len(reference.seeds)
    ).images_BHWC


def _source(reference: Reference, bundle: Bundle) -> Source | None:
    """The reference's source image, which is the same for every seed, as the stages take it."""
    task = bundle.manifest.task
    if task == "generate":
        return None
    mask_1hw = _tensor(reference, "mask", bundle)[0] if task == "inpaint" else None
    step = 0 if "step" in reference.tensors else None
    return Source(task, _tensor(reference, "image", bundle)[0], mask_1hw, step)


def _check_noise(bundle: Bundle, reference: Reference) -> None:
    """This machine's noise must be the reference's, or nothing after it can agree."""
    expected = _tensor(reference, "noise", bundle)
    got = initial_noise(reference.seeds, bundle.manifest.one_step.latent_shape)
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=0, atol=_NOISE_TOLERANCE):
        raise HipaError(
            f"{bundle.root}: the noise of seeds {reference.seeds} is not the reference's. Export the bundle again."
        )


def _tensor(reference: Reference, name: str, bundle: Bundle) -> np.ndarray:
    if name not in reference.tensors:
        raise HipaError(
            f"{bundle.root}: no reference tensor {name!r} in it. Export the bundle again."
        )
    return reference.tensors[name]


def _check(got: np.ndarray, expected: np.ndarray, precision: Precision) -> StageCheck:
    least = MIN_PSNR_DB[precision]
    if got.shape != expected.shape:
        return StageCheck(
            parity=None,
            least_psnr_db=least,
            problem=f"gives shape {list(got.shape)}, the reference has {list(expected.shape)}",
        )
    finite = np.isfinite(got.astype(np.float32)).all()
    return StageCheck(
        parity=compare(got, expected) if finite else None,
        least_psnr_db=least,
        problem=problem(got, expected, precision),
    )
