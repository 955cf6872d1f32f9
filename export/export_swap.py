"""Another adaptor for a bundle that exists: the graph exported again, and its weights that differ.

The graph must come out equal but for the values of its weights. Then a runtime can put these values
in place of the bundle's, and what it runs is bit for bit what an export with this adaptor gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from hipa_deploy import __version__
from hipa_deploy.bundle.adaptor_swap import (
    MANIFEST,
    REFERENCE,
    TEXT_STAGE,
    TEXT_STAGE_2,
    TEXT_WEIGHTS,
    WEIGHT_MAP,
    WEIGHTS,
    AdaptorSwap,
    MappedWeight,
    SwapManifest,
    SwappedText,
    WeightMap,
    adapted_stage,
    joint_sha256,
    stage_files,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import AdaptorInfo, LoraInfo, Stage
from hipa_deploy.bundle.onnx_weights import Initializer, read_initializers, skeleton_sha256
from hipa_deploy.bundle.reference import Reference
from hipa_deploy.bundle.signature import sign
from hipa_deploy.disk.files import new_folder, temporary_folder
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import text_sources, unet_source
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_request import (
    SwapOptions,
    check_swap_request,
    resolve_swap_request,
)
from hipa_deploy.export.graph.run_apart import run_all_apart, run_apart
from hipa_deploy.export.references import (
    INPUTS,
    References,
    add_context,
    add_images,
    add_step,
)
from hipa_deploy.export.task import TaskSettings, print_warning
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.extras import require
from hipa_deploy.generate.stages import along_path, join_context, stage_feed
from hipa_deploy.models.style import StyleInfo
from hipa_deploy.models.weights.controlnet import check_whole


def export_swap(options: SwapOptions, console: Console | None = None) -> AdaptorSwap:
    """Export ``options.adaptor`` as weights to swap into ``options.bundle``, whole or not at all.

    Args:
        options: which adaptor, for which bundle, and where to write.
        console: where progress is shown; None is the standard error.

    Raises:
        HipaError: base model, one-step constants, decoder or embeddings are not the bundle's, the
            adaptor or a LoRA does not fit the model or needs other FP32 islands, the graph comes
            out different, or no weight differs at all.

    Example:
        >>> swap = export_swap(
        ...     SwapOptions(model="emoji", adaptor=Path("mine"), bundle=Path("b"), out=Path("swap"))
        ... )
        >>> swap.manifest.stage
        'unet'

    """
    require("export")
    check_swap_request(options)
    request = resolve_swap_request(options)
    bundle = request.bundle
    model = request.model
    settings = request.settings
    like_bundle = request.like_bundle
    model.check_parts()
    if options.controlnet is not None:
        check_whole(options.controlnet)
    bundle.verify()
    with new_folder(options.out, alone=True) as root, temporary_folder("hipa-export") as scratch:
        for warning in request.warnings:
            print_warning(console, warning)
        clip_skip = bundle.manifest.text.clip_skip
        parts = ChosenParts.choose(
            model, like_bundle, settings.task, request.chunk_tokens, clip_skip
        )
        changes_text = has_other_text(bundle, parts.style.info)
        if like_bundle.fuse:
            check_decoder(bundle, parts)

        # The UNet's stage once more, fed with what the bundle's own stages before it give.
        with (console or Console(stderr=True)).status("export: UNet"):
            references = _references(bundle, parts, settings, changes_text=changes_text)
            changes_text = changes_text or _has_other_conditioning(bundle, references)
            for doubt in references.doubts:
                print_warning(console, doubt)
            source = unet_source(like_bundle, parts, settings, bundle.manifest.one_step)
            writer = StageWriter(
                root=scratch,
                precision=like_bundle.dtype,
                specs={name: stage.spec for name, stage in bundle.stages.items()},
                references=references,
                strengths=len(settings.strengths),
                islands={name: stage.fp32_islands for name, stage in bundle.stages.items()},
            )
            inputs = _stage_inputs(bundle, references)
            texts = {}
            if changes_text:
                step = bundle.manifest.one_step
                for text_source in text_sources(like_bundle, parts, settings, step):
                    encoder = writer.write(text_source, inputs)
                    inputs |= encoder.outputs
                    name = text_source.name
                    texts[name] = _swapped_text(bundle, encoder.stage, scratch, root)
                if TEXT_STAGE_2 in texts:
                    inputs["context"] = join_context(inputs)
            stage = writer.write(source, inputs).stage

        # Only what differs is kept.
        onnx = scratch / stage.path
        weights = _differing(bundle.stage_path(stage.spec.name), onnx)
        if not weights and not texts:
            raise HipaError(
                f"{bundle.stage_path(stage.spec.name)}: this adaptor changes no weight of it: the "
                "bundle has it already."
            )
        _write_weights(root / WEIGHTS, weights)
        np.save(root / REFERENCE, references.tensors[source.output])
        made_from = (references.adaptor, parts.style.info.loras)
        manifest = _manifest(bundle, stage, onnx, weights, made_from, texts, root)
        (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if options.signing_key is not None:
            sign(root / MANIFEST, options.signing_key)
    return AdaptorSwap.open(bundle, options.out)


def has_other_text(bundle: Bundle, style: StyleInfo) -> bool:
    """Whether the text encoder is another than the bundle's with the LoRAs of ``style``.

    Raises:
        HipaError: it is, and the bundle has contexts in its place; or the embeddings are not the
            bundle's, whose words a swap cannot change.

    """
    manifest = bundle.manifest
    if style.embeddings and style.embeddings != manifest.embeddings:
        raise HipaError(
            f"{bundle.root} does not have these embeddings, and a swap adds no words. "
            "Leave --embedding out, or export a bundle of its own."
        )
    expected = _on_text(manifest.loras)
    given = _on_text(style.loras)
    if [lora[1:] for lora in given] == [lora[1:] for lora in expected]:
        return False
    if TEXT_STAGE not in bundle.stages:
        names = ", ".join(name for name, _, _ in (given or expected))
        raise HipaError(
            f"{bundle.root} has the contexts of its prompts in place of a text encoder, which "
            f"{names} would change. Export a bundle of its own."
        )
    if style.embeddings != manifest.embeddings:
        words = " ".join(f"--embedding {word.name}:{word.token}" for word in manifest.embeddings)
        raise HipaError(
            f"{bundle.root} has embeddings in the text encoder, which this swap writes anew. "
            f"Give them too: {words}."
        )
    return True


def _on_text(loras: Sequence[LoraInfo]) -> list[tuple[str, str, float]]:
    """Name, hash and scale of the LoRAs that change the text encoder."""
    found = []
    for lora in loras:
        if {"text_encoder", "text_encoder_2"} & set(lora.parts):
            found.append((lora.name, lora.sha256, lora.scale))
    return found


def check_decoder(bundle: Bundle, parts: ChosenParts) -> None:
    """Raise HipaError unless the decoder is the bundle's: a fused stage holds the decoder too."""
    expected = bundle.manifest.decoder
    if expected is None or not parts.decodes_like(expected):
        name = expected.name if expected else "full"
        raise HipaError(f"{bundle.root} has another decoder than this. Give --decoder, {name}.")


def _references(
    bundle: Bundle, parts: ChosenParts, settings: TaskSettings, *, changes_text: bool
) -> References:
    """The bundle's reference inputs, and what PyTorch gives for them with the other adaptor.

    Prompt and seeds are not needed, as nothing of them is written.
    """
    step = bundle.manifest.one_step
    layout = bundle.manifest.layout
    stored = Reference.read(bundle).tensors
    taken = {*INPUTS, *settings.inputs, "pooled"}
    tensors = {name: value for name, value in stored.items() if name in taken}
    references = References(prompt="", seeds=(), tensors=tensors)
    if changes_text:
        references = add_context(references, parts, layout, watch=False)
    references = add_step(references, parts, settings, step, layout, watch=False)
    if "generator" in bundle.stages:
        references = add_images(references, parts, settings, step, watch=False)
    return references


def _stage_inputs(bundle: Bundle, references: References) -> dict[str, np.ndarray]:
    """What the UNet's stage is fed with: the reference inputs, and what the stages before give."""
    tensors = references.inputs()
    tensors |= _text(bundle, references.tensors)
    if "vae_encoder" in bundle.stages:
        spec = bundle.stages["vae_encoder"].spec
        feed = {"image": tensors["image"]}
        tensors["source"] = run_apart(bundle.stage_path("vae_encoder"), spec, feed)
    return tensors


def _text(bundle: Bundle, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The context, and SDXL's conditioning, as the bundle's text stage gives or it stores them."""
    layout = bundle.manifest.layout
    if TEXT_STAGE in bundle.stages:
        encoded: dict[str, np.ndarray] = {}
        for stage in TEXT_WEIGHTS:
            if stage in bundle.stages:
                spec = bundle.stages[stage].spec
                feed = stage_feed(spec, tensors, layout)
                made = run_all_apart(bundle.stage_path(stage), spec, feed)
                encoded |= along_path(spec, made, layout)
        if TEXT_STAGE_2 in bundle.stages:
            encoded["context"] = join_context(encoded)
        return encoded
    stored = {}
    for tensor in bundle.stages[adapted_stage(bundle)].spec.inputs:
        if tensor.name in ("context", "conditioning"):
            stored[tensor.name] = tensors[tensor.name].astype(tensor.dtype)
    return stored


def _has_other_conditioning(bundle: Bundle, references: References) -> bool:
    """Whether the adaptor changes what SDXL's text stage computes for the UNet.

    Raises:
        HipaError: it does, and the bundle has the conditioning of its prompts in place of a text
            stage.

    """
    made = references.tensors.get("conditioning")
    if made is None:
        return False
    stored = Reference.read(bundle).tensors["conditioning"]
    # Another machine or number of threads changes the last digits.
    if np.allclose(made, stored, rtol=0, atol=1e-5 * float(np.abs(stored).max())):
        return False
    if TEXT_STAGE not in bundle.stages:
        raise HipaError(
            f"{bundle.root} has the contexts of its prompts in place of a text encoder, and this "
            "adaptor changes the UNet's embedding of prompts. Export a bundle of its own."
        )
    return True


def _differing(base: Path, other: Path) -> dict[str, Initializer]:
    """The weights of the graph ``other`` whose values are not those of the graph ``base``.

    Raises:
        HipaError: the graphs differ in more than that.

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
    return differing


def _write_weights(path: Path, weights: Mapping[str, Initializer]) -> None:
    values = {name: weight.read() for name, weight in weights.items()}
    np.savez(path, **values)  # type: ignore[arg-type]  # numpy's stub


def _swapped_text(bundle: Bundle, stage: Stage, scratch: Path, root: Path) -> SwappedText:
    """Write a text encoder's weights that differ into ``root``; what the manifest says of them.

    Raises:
        HipaError: the graph comes out different, or a weight differs that is no parameter.

    """
    onnx = scratch / stage.path
    changed = stage.spec.name
    weights = _differing(bundle.stage_path(changed), onnx)
    _write_weights(root / TEXT_WEIGHTS[changed], weights)
    mapped = _weight_map(onnx)
    unexpected = [name for name in weights if name not in mapped]
    if unexpected:
        raise HipaError(
            f"{onnx}: {', '.join(unexpected)} changed, which no LoRA can change. "
            "Please report this."
        )
    return SwappedText(
        base_files=stage_files(bundle, changed),
        onnx_sha256=_stage_sha256(onnx),
        parity=stage.parity,
        weights={name: mapped[name] for name in weights},
    )


def _stage_sha256(onnx: Path) -> str:
    """What ``stage_sha256`` is of a bundle with this graph and the weights beside it."""
    files = {}
    for path in onnx.parent.iterdir():
        if path.suffix != ".json":
            files[path.name] = file_sha256(path)
    return joint_sha256(files)


def _weight_map(onnx: Path) -> dict[str, MappedWeight]:
    text = (onnx.parent / WEIGHT_MAP).read_text(encoding="utf-8")
    return WeightMap.model_validate_json(text).weights


def _layout(weight: Initializer) -> tuple[object, ...]:
    return weight.name, weight.dtype, weight.shape, weight.path.name, weight.offset


def _manifest(
    bundle: Bundle,
    stage: Stage,
    onnx: Path,
    weights: Mapping[str, Initializer],
    made_from: tuple[AdaptorInfo | None, tuple[LoraInfo, ...]],
    texts: Mapping[str, SwappedText],
    root: Path,
) -> SwapManifest:
    """The manifest of the swap in ``root``, whose ``weights`` are from the graph ``onnx``.

    Raises:
        HipaError: a weight differs that a swap cannot change.

    """
    adaptor, loras = made_from
    mapped = _weight_map(onnx)

    # LoRAs may change biases and norm layers, which no refittable engine keeps open. Without one, a
    # weight that no adaptor reaches and that differs all the same is a bug of the exporter.
    unexpected = []
    for name in weights:
        if name not in mapped or not mapped[name].adaptable:
            unexpected.append(name)
    if unexpected and (loras or bundle.manifest.loras):
        raise HipaError(
            f"{bundle.root}: LoRAs changed {', '.join(unexpected[:3])}, biases or norms, which no "
            "swap can change. Export a bundle of its own."
        )
    if unexpected:
        raise HipaError(
            f"{onnx}: {', '.join(unexpected)} changed, which no adaptor can change. "
            "Please report this."
        )
    return SwapManifest(
        producer=f"hipa-deploy {__version__}",
        stage=stage.spec.name,
        base_files=stage_files(bundle, stage.spec.name),
        onnx_sha256=_stage_sha256(onnx),
        adaptor=adaptor,
        loras=loras,
        parity=stage.parity,
        weights={name: mapped[name] for name in weights},
        text=texts.get(TEXT_STAGE),
        text_2=texts.get(TEXT_STAGE_2),
        files={path.name: file_sha256(path) for path in sorted(root.iterdir())},
    )
