"""Does this machine give the images that the bundle's export gave?

The bundle's reference prompt is run again and judged by the same gates as at the export.

Shape suffixes: B batch, C channels, H W image size, h w latent size.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import TEACHER_STAGE, Parity, Precision
from hipa_deploy.bundle.parity import MIN_PSNR_DB, compare, problem
from hipa_deploy.bundle.reference import TEACHER_TENSORS, Reference, teacher_tensors
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.generate.noise import bundle_noise
from hipa_deploy.generate.open_stages import has_engine, open_runner
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.runner import Runner
from hipa_deploy.generate.stages import output_names
from hipa_deploy.images.source import Source
from hipa_deploy.marks.safety import SAFETY_STAGE

_NOISE_TOLERANCE = 1e-5  # another C library's logarithm may round differently


class StageCheck(BaseModel):
    """One output compared with PyTorch in FP32.

    Attributes:
        parity: how close it is; None where nothing can be measured (NaN, or another shape).
        least_psnr_db: the gate, in dB.
        problem: what is wrong, to be read after 'STAGE on BACKEND'; None if the gate is passed.

    """

    model_config = ConfigDict(frozen=True)

    parity: Parity | None
    least_psnr_db: float
    problem: str | None

    def __str__(self) -> str:
        measured = "nothing to measure"
        if self.parity:
            measured = f"{self.parity.psnr_db:.1f} dB from PyTorch FP32"
        return f"{measured}, gate {self.least_psnr_db:.0f} dB: {self.problem or 'passes'}"


class SelfCheck(BaseModel):
    """How the backend did on the reference prompt, stage by stage and end to end.

    Attributes:
        backend: what ran the stages.
        prompt: the reference prompt.
        stages: a check for each stage, in the order in which they run.
        end_to_end: the images as a user gets them.
        problems: a line for each gate that failed.

    """

    model_config = ConfigDict(frozen=True)

    backend: str
    prompt: str
    stages: dict[str, StageCheck]
    end_to_end: StageCheck
    problems: tuple[str, ...]


def check_bundle(bundle: Bundle, backend: str = "auto") -> SelfCheck:
    """Run the reference prompt of ``bundle`` on ``backend`` and compare with its stored tensors.

    Gates that fail are in the result's ``problems``; they raise nothing.

    Raises:
        HipaError: the bundle cannot be read, or the backend cannot run it here.

    Example:
        >>> check_bundle(Bundle.open(embedded.BUNDLE), "onnxruntime").problems
        ()

    """
    # The images are compared without a watermark, for which the bundle's own size may be too small.
    with OneStepPipeline.load(bundle.root, backend, watermark=False) as pipe:
        found = check_pipeline(pipe)

    # The base UNet last and by itself: both UNets of SDXL together may not fit into memory.
    here = TEACHER_TENSORS in bundle.manifest.files
    if not here or not has_engine(bundle, TEACHER_STAGE, found.backend):
        return found
    with open_runner(bundle, TEACHER_STAGE, found.backend) as unet:
        check = _check_teacher(bundle, unet)
    problems = found.problems
    if check.problem:
        problems = (*problems, _in_words(TEACHER_STAGE, found.backend, check))
    stages = {**found.stages, TEACHER_STAGE: check}
    return found.model_copy(update={"stages": stages, "problems": problems})


def check_pipeline(pipe: OneStepPipeline) -> SelfCheck:
    """The same with a pipeline that is loaded already, and without a base UNet that refines.

    A stage is fed what the stages before it gave, so errors accumulate as they do in the manifest's
    parity. End to end is ``pipe`` as a user calls it, prompt to image.

    Raises:
        HipaError: the bundle has no reference that fits it, or a stage cannot run.

    """
    bundle = pipe.bundle
    reference = Reference.read(bundle)
    _check_noise(bundle, reference)

    # Stage by stage: one run that keeps every tensor, each compared with PyTorch's.
    tensors = pipe.tensors(
        reference.prompt,
        source=_source(reference, bundle),
        seed=reference.seeds[0],
        count=len(reference.seeds),
    )
    stages = {}
    for stage in bundle.manifest.stages:
        checks = []
        for name in output_names(stage.spec, bundle.manifest.layout):
            checks.append(_check(tensors[name], reference, name, bundle))
        stages[stage.spec.name] = min(checks, key=_quality)

    if pipe.safety is not None:
        pixels = {"pixels": _tensor(reference, "pixels", bundle)}
        cosines = pipe.safety(**pixels)["cosines"]
        stages[SAFETY_STAGE] = _check(cosines, reference, "cosines", bundle)

    # And as a user calls it: caches and batches of the pipeline take part.
    try:
        images_BHWC = _generate(pipe, reference)
    except NotFiniteError:
        # There is no image. What the decoder made of NaN shows how far it is from one.
        images_BHWC = tensors["images"]
    end_to_end = _check(images_BHWC, reference, "images", bundle)

    problems = []
    for name, check in {**stages, END_TO_END: end_to_end}.items():
        if check.problem:
            problems.append(_in_words(name, pipe.backend, check))
    return SelfCheck(
        backend=pipe.backend,
        prompt=reference.prompt,
        stages=stages,
        end_to_end=end_to_end,
        problems=tuple(problems),
    )


def _in_words(stage: str, backend: str, check: StageCheck) -> str:
    """A gate that failed, as a line."""
    return f"{stage} on {backend} {check.problem}."


def _check_teacher(bundle: Bundle, unet: Runner) -> StageCheck:
    """The base UNet, which refines, on its own reference."""
    reference = Reference("", [], teacher_tensors(bundle))
    feed = {}
    for tensor in unet.spec.inputs:
        value = _tensor(reference, tensor.name, bundle)
        feed[tensor.name] = value.astype(tensor.dtype, copy=False)
    name = unet.spec.outputs[0].name
    return _check(unet(**feed)[name], reference, name, bundle)


def _quality(check: StageCheck) -> float:
    """How well an output agrees: dB, and less than all where it cannot be compared."""
    return -1.0 if check.parity is None else check.parity.psnr_db


def _generate(pipe: OneStepPipeline, reference: Reference) -> np.ndarray:
    """The reference's images, uint8 [B, H, W, 3], before a watermark or a checker."""
    pairs = [(reference.prompt, seed) for seed in reference.seeds]
    jobs = pipe.jobs(pairs, source=_source(reference, pipe.bundle))
    return np.stack([made.finished() for made in pipe.make(jobs)])


def _source(reference: Reference, bundle: Bundle) -> Source | None:
    """The reference's source image as the stages take it, the same one for every seed."""
    task = bundle.manifest.task
    if task == "generate":
        return None
    if task == "control":
        scale = float(_tensor(reference, "control_scale", bundle)[0])
        return Source(task, _tensor(reference, "control", bundle)[0], scale=scale)
    mask_1hw = _tensor(reference, "mask", bundle)[0] if task == "inpaint" else None
    step = 0 if "step" in reference.tensors else None
    return Source(task, _tensor(reference, "image", bundle)[0], mask_1hw, step)


def _check_noise(bundle: Bundle, reference: Reference) -> None:
    """This machine's noise must be the reference's, or nothing after it can agree."""
    expected_BCHW = _tensor(reference, "noise", bundle)
    step = bundle.manifest.one_step
    noise_BCHW = bundle_noise(reference.seeds, step.latent_shape, step, bundle.manifest.layout)
    same_shape = noise_BCHW.shape == expected_BCHW.shape
    if not same_shape or not np.allclose(noise_BCHW, expected_BCHW, rtol=0, atol=_NOISE_TOLERANCE):
        raise HipaError(
            f"{bundle.root}: the noise of seeds {reference.seeds} is not the reference's. "
            "Export the bundle again."
        )


def _tensor(reference: Reference, name: str, bundle: Bundle) -> np.ndarray:
    if name not in reference.tensors:
        raise HipaError(
            f"{bundle.root}: no reference tensor {name!r} in it. Export the bundle again."
        )
    return reference.tensors[name]


def _check(got: np.ndarray, reference: Reference, name: str, bundle: Bundle) -> StageCheck:
    """Compare an output with the reference tensor ``name``, by the gate of the precision."""
    expected = _tensor(reference, name, bundle)
    precision: Precision = bundle.manifest.precision
    least = MIN_PSNR_DB[precision]

    # Tensors of different shapes, or with NaN or infinity, have no distance in dB.
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
