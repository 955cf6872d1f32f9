"""Another adaptor for a bundle that exists: the graph exported again, and its weights that differ.

The graph must come out equal but for the values of its weights. Then a runtime can put these values
in place of the bundle's, and what it runs is bit for bit what an export with this adaptor gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from hipa_deploy import __version__
from hipa_deploy.bundle.adaptor_swap import (
    MANIFEST,
    REFERENCE,
    WEIGHT_MAP,
    WEIGHTS,
    AdaptorSwap,
    SwapManifest,
    WeightMap,
    adapted_stage,
    check_encoder,
    stage_files,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import AdaptorInfo, OneStep, Stage
from hipa_deploy.bundle.onnx_weights import Initializer, read_initializers, skeleton_sha256
from hipa_deploy.bundle.reference import Reference
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import unet_source
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import INPUTS, References, add_images, add_step
from hipa_deploy.export.run_apart import run_apart
from hipa_deploy.export.task import TaskSettings, choose_task, step_warning
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.files import new_folder, temporary_folder
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS
from hipa_deploy.models.one_step_method import OWN
from hipa_deploy.models.weight_identity import has_identity


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """Which adaptor to export for which bundle.

    Attributes:
        model: the base model that the bundle was exported from.
        adaptor: the adaptor folder whose weights to write.
        bundle: the bundle's folder.
        out: the folder to write.
        adaptor_scale: 1.0 merges the adaptor as it was trained.
        decoder: the AutoencoderTiny folder of a fused bundle; None is the model's VAE.
        one_step: the step of a LoRA that others made, as for ``ExportOptions``.

    """

    model: str
    adaptor: Path
    bundle: Path
    out: Path
    adaptor_scale: float = 1.0
    decoder: Path | None = None
    one_step: str | None = None


def export_swap(options: SwapOptions, console: Console | None = None) -> AdaptorSwap:
    """Export ``options.adaptor`` as weights to swap into ``options.bundle``, whole or not at all.

    Args:
        options: which adaptor, for which bundle, and where to write.
        console: where progress is shown; None is the standard error.

    Raises:
        HipaError: base model, one-step constants or decoder are not the bundle's, the adaptor does
            not fit the model or needs other FP32 islands, the graph comes out different, or no
            weight differs at all.

    Example:
        >>> swap = export_swap(
        ...     SwapOptions(model="emoji", adaptor=Path("mine"), bundle=Path("b"), out=Path("swap"))
        ... )
        >>> swap.manifest.stage
        'unet'

    """
    bundle = Bundle.open(options.bundle)
    model = ModelParts.open(options.model)
    bundle.verify()
    with new_folder(options.out, alone=True) as root, temporary_folder("hipa-export") as scratch:
        # The request that the bundle came from, with the other adaptor.
        _check_same_base(options, bundle, model)
        like_bundle = _bundle_options(options, bundle)
        settings = choose_task(like_bundle, model)
        _check_step(options, bundle, model, settings)
        warning = step_warning(like_bundle, settings, model)
        if warning:
            (console or Console(stderr=True)).print(f"warning: {warning}", highlight=False)
        parts = ChosenParts.choose(model, like_bundle, settings.task)
        if like_bundle.fuse:
            check_decoder(bundle, parts)

        # The UNet's stage once more, fed with what the bundle's own stages before it give.
        with (console or Console(stderr=True)).status("export: UNet"):
            references = _references(bundle, parts, settings)
            source = unet_source(like_bundle, parts, settings, bundle.manifest.one_step)
            writer = StageWriter(
                root=scratch,
                precision=like_bundle.dtype,
                specs={name: stage.spec for name, stage in bundle.stages.items()},
                references=references,
                strengths=len(settings.strengths),
                islands={name: stage.fp32_islands for name, stage in bundle.stages.items()},
            )
            stage = writer.write(source, _stage_inputs(bundle, references)).stage

        # Only what differs is kept.
        onnx = scratch / stage.path
        weights = _differing(bundle.stage_path(stage.spec.name), onnx)
        values = {name: weight.read() for name, weight in weights.items()}
        np.savez(root / WEIGHTS, **values)  # type: ignore[arg-type]  # numpy's stub
        np.save(root / REFERENCE, references.tensors[source.output])
        assert references.adaptor is not None  # SwapOptions.adaptor is no option
        manifest = _manifest(bundle, stage, onnx, weights, references.adaptor, root)
        (root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return AdaptorSwap.open(bundle, options.out)


def _check_same_base(options: SwapOptions, bundle: Bundle, model: ModelParts) -> None:
    """Raise HipaError for another base model, and where the VAE's encoder is adapted."""
    if (options.adaptor / ENCODER_WEIGHTS).exists():
        raise HipaError(
            f"adaptor {options.adaptor} is on the VAE's encoder too, which no swap changes. "
            "Export a bundle of its own."
        )
    check_encoder(bundle)
    if not has_identity(model.folder / "unet", bundle.manifest.base_model.sha256):
        raise HipaError(
            f"{bundle.root} was exported from another base model than {options.model}. "
            f"Give --model as for the bundle's own export: {bundle.manifest.base_model.name}."
        )


def _bundle_options(options: SwapOptions, bundle: Bundle) -> ExportOptions:
    """The options that ``bundle`` was exported with, but for the adaptor."""
    manifest = bundle.manifest
    return ExportOptions(
        model=options.model,
        out=options.out,
        adaptor=options.adaptor,
        adaptor_scale=options.adaptor_scale,
        dtype=manifest.precision,
        layout=manifest.layout,
        batch=manifest.batch,
        fuse="generator" in bundle.stages,
        decoder=options.decoder,
        task=manifest.task,
        strengths=tuple(entry.strength for entry in manifest.strengths),
        one_step=options.one_step,
    )


def _check_step(
    options: SwapOptions, bundle: Bundle, model: ModelParts, settings: TaskSettings
) -> None:
    """Raise HipaError unless the adaptor's step is the bundle's: a graph has its constants."""
    expected = bundle.manifest.one_step
    if settings.timestep != expected.timestep:
        raise HipaError(
            f"{options.adaptor} was trained for timestep {settings.timestep}, "
            f"{bundle.root} is for {expected.timestep}. Export a bundle of its own."
        )
    step = model.one_step(settings.timestep, expected.height, expected.width, settings.method)
    if _numbers(step) != _numbers(expected):
        own = settings.method.name if settings.method else OWN
        other = expected.method.name if expected.method else OWN
        raise HipaError(
            f"{options.adaptor} is given the one-step method {own}, {bundle.root} is for {other}. "
            f"Use --one-step {other} if that is the adaptor's method, or export a bundle of its "
            "own."
        )


def _numbers(step: OneStep) -> tuple[object, ...]:
    """What a graph computes a step with; two names of one method are one method."""
    factors: tuple[float, ...] = ()
    if step.method:
        method = step.method
        factors = (method.noise_scale, method.sample_factor, method.output_factor)
    return step.prediction_type, step.timestep, factors


def check_decoder(bundle: Bundle, parts: ChosenParts) -> None:
    """Raise HipaError unless the decoder is the bundle's: a fused stage holds the decoder too."""
    expected = bundle.manifest.decoder
    if expected is None or not parts.decodes_like(expected):
        name = expected.name if expected else "full"
        raise HipaError(f"{bundle.root} has another decoder than this. Give --decoder, {name}.")


def _references(bundle: Bundle, parts: ChosenParts, settings: TaskSettings) -> References:
    """The bundle's reference inputs, and what PyTorch gives for them with the other adaptor.

    Prompt and seeds are not needed, as nothing of them is written.
    """
    step = bundle.manifest.one_step
    stored = Reference.read(bundle).tensors
    taken = {*INPUTS, *settings.inputs}
    tensors = {name: value for name, value in stored.items() if name in taken}
    references = References(prompt="", seeds=(), tensors=tensors)
    layout = bundle.manifest.layout
    references = add_step(references, parts, settings, step, layout, watch=False)
    if "generator" in bundle.stages:
        references = add_images(references, parts, settings, step, watch=False)
    return references


def _stage_inputs(bundle: Bundle, references: References) -> dict[str, np.ndarray]:
    """What the UNet's stage is fed with: the reference inputs, and what the stages before give."""
    tensors = references.inputs()
    tensors["context"] = _context(bundle, references.tensors)
    if "vae_encoder" in bundle.stages:
        spec = bundle.stages["vae_encoder"].spec
        feed = {"image": tensors["image"]}
        tensors["source"] = run_apart(bundle.stage_path("vae_encoder"), spec, feed)
    return tensors


def _context(bundle: Bundle, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The context as the bundle's text encoder gives it, or as the bundle stores it."""
    if "text_encoder" in bundle.stages:
        spec = bundle.stages["text_encoder"].spec
        feed = {spec.inputs[0].name: tensors["tokens"]}
        return run_apart(bundle.stage_path("text_encoder"), spec, feed)
    spec = bundle.stages[adapted_stage(bundle)].spec
    dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "context")
    return tensors["context"].astype(dtype)


def _differing(base: Path, other: Path) -> dict[str, Initializer]:
    """The weights of the graph ``other`` whose values are not those of the graph ``base``.

    Raises:
        HipaError: the graphs differ in more than that, or not at all.

    """
    base_weights = read_initializers(base)
    other_weights = read_initializers(other)
    same_layout = list(map(_layout, base_weights.values())) == list(
        map(_layout, other_weights.values())
    )
    if not same_layout or (
        skeleton_sha256(base, base_weights) != skeleton_sha256(other, other_weights)
    ):
        raise HipaError(
            f"{base}: the graph comes out different with this adaptor, or with the exporter that "
            "is installed now. Export a bundle of its own."
        )

    # By bytes: NaN equals itself, and 0.0 is not -0.0.
    differing: dict[str, Initializer] = {}
    for name, weight in other_weights.items():
        if weight.read().tobytes() != base_weights[name].read().tobytes():
            differing[name] = weight
    if not differing:
        raise HipaError(f"{base}: this adaptor changes no weight of it: the bundle has it already.")
    return differing


def _layout(weight: Initializer) -> tuple[object, ...]:
    return weight.name, weight.dtype, weight.shape, weight.path.name, weight.offset


def _manifest(
    bundle: Bundle,
    stage: Stage,
    onnx: Path,
    weights: Mapping[str, Initializer],
    adaptor: AdaptorInfo,
    root: Path,
) -> SwapManifest:
    """The manifest of the swap in ``root``, whose ``weights`` are from the graph ``onnx``.

    Raises:
        HipaError: a weight differs that no adaptor can change.

    """
    text = (onnx.parent / WEIGHT_MAP).read_text(encoding="utf-8")
    mapped = WeightMap.model_validate_json(text).weights

    # A weight that no adaptor reaches and that differs all the same is a bug of the exporter.
    unexpected = []
    for name in weights:
        if name not in mapped or not mapped[name].adaptable:
            unexpected.append(name)
    if unexpected:
        raise HipaError(
            f"{onnx}: {', '.join(unexpected)} changed, which no adaptor can change. "
            "Please report this."
        )
    return SwapManifest(
        producer=f"hipa-deploy {__version__}",
        stage=stage.spec.name,
        base_files=stage_files(bundle, stage.spec.name),
        onnx_sha256=file_sha256(onnx),
        adaptor=adaptor,
        parity=stage.parity,
        weights={name: mapped[name] for name in weights},
        files={name: file_sha256(root / name) for name in (WEIGHTS, REFERENCE)},
    )
