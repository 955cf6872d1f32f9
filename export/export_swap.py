"""Another adaptor for a bundle that is there already: its graph once more, and of that the weights that differ.

The graph must come out equal but for the values of its weights; then a runtime can put these values in the other's
place, and what it runs is to the bit what an export with this adaptor would have given.
"""

from __future__ import annotations

import tempfile
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
from hipa_deploy.bundle.manifest import Stage
from hipa_deploy.bundle.onnx_weights import Initializer, read_initializers, skeleton_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import write_unet
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.job import ExportJob
from hipa_deploy.export.model_parts import BaseModel
from hipa_deploy.export.run_apart import run_apart
from hipa_deploy.export.task import plan_task
from hipa_deploy.files import new_folder
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """Which adaptor to make fit for which bundle. ``decoder`` is the AutoencoderTiny folder of a fused bundle."""

    model: str
    adaptor: Path
    bundle: Path
    out: Path
    adaptor_scale: float = 1.0
    decoder: Path | None = None


def export_swap(options: SwapOptions, console: Console | None = None) -> AdaptorSwap:
    """Export ``options.adaptor`` as weights to swap into ``options.bundle``, to ``options.out``, whole or not at all.

    Raises:
        HipaError: a base model, timestep or decoder that is not the bundle's, an adaptor that does not fit the model or
            needs other float32 islands, a graph that comes out different, or weights that do not differ at all.

    """
    bundle, base = Bundle.open(options.bundle), BaseModel.open(options.model)
    bundle.verify()
    with new_folder(options.out) as root, tempfile.TemporaryDirectory() as scratch:
        job = _job(options, bundle, base, Path(scratch))
        with (console or Console(stderr=True)).status("export: UNet"):
            output = write_unet(job)
        check_decoder(job, bundle)
        stage, onnx = job.stages[0], Path(scratch) / job.stages[0].path
        weights = _differing(bundle.stage_path(stage.spec.name), onnx)
        np.savez(root / WEIGHTS, **{name: weight.read() for name, weight in weights.items()})  # type: ignore[arg-type]
        np.save(root / REFERENCE, job.reference[output])
        manifest = _manifest(job, bundle, stage, onnx, weights, root)
        (root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return AdaptorSwap.open(bundle, options.out)


def _job(options: SwapOptions, bundle: Bundle, base: BaseModel, root: Path) -> ExportJob:
    """The export that the bundle came from, with the other adaptor, up to its UNet."""
    manifest = bundle.manifest
    if (options.adaptor / ENCODER_WEIGHTS).exists():
        got = f"adaptor {options.adaptor} is on the VAE's encoder too"
        raise HipaError(f"{got}, which no swap changes. Export a bundle of its own.")
    check_encoder(bundle)
    if base.info.sha256 != manifest.base_model.sha256:
        raise HipaError(
            f"{bundle.root} was exported from another base model than {options.model}. Give that one."
        )
    like = ExportOptions(
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
    )
    plan = plan_task(like, base)
    if plan.timestep != manifest.one_step.timestep:
        want = manifest.one_step.timestep
        raise HipaError(
            f"{options.adaptor} was trained for timestep {plan.timestep}, {bundle.root} is for {want}."
        )
    job = ExportJob(like, base, root, manifest.one_step, dict(bundle.axes), plan)
    job.specs = {name: stage.spec for name, stage in bundle.stages.items()}
    job.islands = {name: stage.fp32_islands for name, stage in bundle.stages.items()}
    with np.load(bundle.path("reference/tensors.npz")) as tensors:
        job.reference |= {
            name: tensors[name]
            for name in tensors.files
            if name in ("tokens", "image", *plan.inputs)
        }
    job.given |= job.reference | {"context": _given_context(bundle, job.reference)}
    if "vae_encoder" in bundle.stages:
        spec, image_BHWC = bundle.stages["vae_encoder"].spec, job.reference["image"]
        job.given["source"] = run_apart(
            bundle.stage_path("vae_encoder"), spec, {"image": image_BHWC}
        )
    return job


def _given_context(bundle: Bundle, reference: Mapping[str, np.ndarray]) -> np.ndarray:
    """The context as the bundle's text encoder gives it, or as it is baked."""
    if "text_encoder" not in bundle.stages:
        spec = bundle.stages[adapted_stage(bundle)].spec
        dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "context")
        return reference["context"].astype(dtype)
    spec = bundle.stages["text_encoder"].spec
    return run_apart(
        bundle.stage_path("text_encoder"), spec, {spec.inputs[0].name: reference["tokens"]}
    )


def check_decoder(job: ExportJob, bundle: Bundle) -> None:
    """A fused stage holds the decoder too, and that must stay what it is."""
    was, now = bundle.manifest.decoder, job.decoder
    if job.options.fuse and (was and was.sha256) != (now and now.sha256):
        raise HipaError(
            f"{bundle.root} has another decoder than this. Give --decoder, {was.name if was else 'full'}."
        )


def _differing(base: Path, other: Path) -> dict[str, Initializer]:
    """The weights of ``other`` whose values are not those of ``base``.

    Raises:
        HipaError: the graphs differ in more than that, or not at all.

    """
    ours, theirs = read_initializers(base), read_initializers(other)
    same_layout = [_layout(weight) for weight in ours.values()] == [
        _layout(weight) for weight in theirs.values()
    ]
    if not same_layout or skeleton_sha256(base, ours) != skeleton_sha256(other, theirs):
        raise HipaError(
            f"{base}: the graph comes out different with this adaptor, or with the exporter that is installed now. "
            "Export a bundle of its own."
        )
    found = {n: w for n, w in theirs.items() if w.read().tobytes() != ours[n].read().tobytes()}
    if not found:
        raise HipaError(f"{base}: this adaptor changes no weight of it: the bundle has it already.")
    return found


def _layout(weight: Initializer) -> tuple[object, ...]:
    return weight.name, weight.dtype, weight.shape, weight.path.name, weight.offset


def _manifest(
    job: ExportJob,
    bundle: Bundle,
    stage: Stage,
    onnx: Path,
    weights: Mapping[str, Initializer],
    root: Path,
) -> SwapManifest:
    mapped = WeightMap.model_validate_json(
        (onnx.parent / WEIGHT_MAP).read_text(encoding="utf-8")
    ).weights
    strangers = [name for name in weights if name not in mapped or not mapped[name].adaptable]
    if strangers or job.adaptor is None:
        raise HipaError(
            f"{onnx}: {', '.join(strangers)} changed, which no adaptor can change. Please report this."
        )
    return SwapManifest(
        producer=f"hipa-deploy {__version__}",
        stage=stage.spec.name,
        base_files=stage_files(bundle, stage.spec.name),
        onnx_sha256=file_sha256(onnx),
        adaptor=job.adaptor,
        parity=stage.parity,
        weights={name: mapped[name] for name in weights},
        files={name: file_sha256(root / name) for name in (WEIGHTS, REFERENCE)},
    )
