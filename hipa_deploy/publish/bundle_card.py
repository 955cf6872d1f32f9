"""The card of a bundle: ``README.md`` of its repository."""

from __future__ import annotations

from pathlib import Path

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Manifest
from hipa_deploy.bundle.signature import signature_path
from hipa_deploy.publish.adaptor_card import EXAMPLES
from hipa_deploy.publish.base_model import BaseModel
from hipa_deploy.publish.card import (
    added_text,
    bullets,
    files_table,
    front_matter,
    licence_text,
    sections,
    table,
)
from hipa_deploy.publish.measured_quality import Report

REFINE = 'hipa-generate my-bundle "a lighthouse" --refine teacher --out final.png'
TAGS = ("onnx", "one-step", "hipa")
BACKENDS = {
    "onnxruntime": "CPU, nothing more to install",
    "openvino": "CPU, pip install 'hipa-deploy[openvino]'",
    "onnxruntime-cuda, onnxruntime-tensorrt": "NVIDIA GPUs, with onnxruntime-gpu",
    "onnxruntime-rtx": "RTX 30 and newer, pip install 'hipa-deploy[onnxruntime-rtx]'",
    "tensorrt, rtx": "NVIDIA GPUs and Jetson, after hipa-build on the device",
}


def bundle_card(
    folder: Path, bundle: Bundle, repo: str, base: BaseModel, report: Report | None
) -> str:
    """The text of the card.

    Args:
        folder: the folder to publish, with every file but the card.
        bundle: the bundle.
        repo: owner/name of the repository.
        base: the base model.
        report: the measured quality; None says that none was measured.

    """
    manifest = bundle.manifest
    head = front_matter(base, task=manifest.task, library="hipa-deploy", tags=TAGS)
    about = (
        f"# {repo.split('/')[1]}\n\nA bundle of hipa-deploy: {base.name} with "
        f"{_adaptor(manifest)} merged, as ONNX models that make an image in one step, without "
        f"PyTorch. Task: {manifest.task}, {manifest.one_step.width} x {manifest.one_step.height} "
        f"pixels, {manifest.precision}.\n\n"
    )
    parts = {
        "Use it": _use(manifest, repo),
        "Backends": table(BACKENDS),
        "What it was made from": table(_origin(manifest, base)),
        "How close it is to PyTorch": _stages(bundle),
        "Measured quality": _quality(report),
        "Marks": bullets(_marks(manifest)),
        "Limits": bullets(_limits(bundle)),
        "Licence": licence_text(base, "The bundle") + _other_licences(manifest),
        "Files": _signed(bundle) + files_table(folder),
    }
    return head + about + sections(parts)


def _adaptor(manifest: Manifest) -> str:
    """What was merged for the one step, in words."""
    if manifest.adaptor is None:
        return "no adaptor"
    method = manifest.one_step.method
    return "a HiPA adaptor" if method is None else f"a one-step LoRA ({method.name})"


def _other_licences(manifest: Manifest) -> str:
    """A sentence about the files of others that are part of the bundle."""
    names = [lora.name for lora in manifest.loras]
    names += [embedding.name for embedding in manifest.embeddings]
    if manifest.adaptor is not None and manifest.one_step.method is not None:
        names.insert(0, manifest.adaptor.name)
    if manifest.control is not None:
        names.append(manifest.control.name)
    if not names:
        return ""
    listed = ", ".join(dict.fromkeys(names))  # one may be merged twice
    return f" These files are part of it, and their licences apply as well: {listed}."


def _use(manifest: Manifest, repo: str) -> str:
    lines = [
        "```bash",
        "pip install hipa-deploy",
        f"hf download {repo} --local-dir my-bundle",
        EXAMPLES[manifest.task],
        *([REFINE] if manifest.refine else []),
        "hipa-build my-bundle --backend tensorrt    # on an NVIDIA GPU, once",
        "```",
    ]
    if manifest.layout == "generic":
        lines.append("\nIts layout is generic: optimum's `ORTDiffusionPipeline` loads it too.")
    return "\n".join(lines)


def _origin(manifest: Manifest, base: BaseModel) -> dict[str, object]:
    rows: dict[str, object] = {
        "producer": manifest.producer,
        "base model": f"{base.name}, UNet `{manifest.base_model.sha256}`",
    }
    adaptor = manifest.adaptor
    if adaptor is not None:
        rows["adaptor"] = (
            f"{adaptor.name}, rank {adaptor.rank}, alpha {adaptor.alpha:g}, merged at "
            f"{adaptor.scale:g}, SHA-256 `{adaptor.sha256}`"
        )
    for number, added in enumerate(added_text(manifest.loras, manifest.embeddings), start=1):
        rows[f"added, {number}"] = added
    for name, part in (("decoder", manifest.decoder), ("encoder", manifest.encoder)):
        if part is not None:
            rows[name] = f"{part.kind} ({part.name}), `{part.sha256}`"
    if manifest.control is not None:
        rows["ControlNet"] = f"{manifest.control.name}, `{manifest.control.sha256}`"
    step = manifest.one_step
    rows["the step"] = f"timestep {step.timestep}, {step.prediction_type}"
    if step.method is not None:
        rows["one-step method"] = step.method.name
    if manifest.strengths:
        rows["strengths"] = ", ".join(f"{one.strength:g}" for one in manifest.strengths)
    rows["layout, batch"] = f"{manifest.layout}, {manifest.batch}"
    return rows


def _stages(bundle: Bundle) -> str:
    lines = [
        "Against PyTorch in float32, on the export's reference prompt, with ONNX Runtime on a "
        "CPU. Each stage is fed what the stage before it gave.",
        "",
        "| stage | precision | PSNR | layers kept in float32 |",
        "|---|---|---|---|",
    ]
    for name, stage in bundle.all_stages.items():
        islands = ", ".join(stage.fp32_islands) or "none"
        lines.append(f"| {name} | {stage.precision} | {stage.parity.psnr_db:.1f} dB | {islands} |")
    return "\n".join(lines)


def _quality(report: Report | None) -> str:
    return report.text if report else "None was measured for this card."


def _marks(manifest: Manifest) -> list[str]:
    marks = manifest.marks
    says = "says" if marks.provenance else "does not say"
    found = [f"An image's file {says} in IPTC's words that a model made it."]
    if marks.watermark:
        found.append("Images carry the invisible watermark.")
    if marks.c2pa:
        found.append("Files are written only with C2PA content credentials, by the user's key.")
    checks = "sees every image." if manifest.safety else "is not in the bundle."
    found.append(f"A safety checker {checks}")
    return found


def _limits(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    one_step = "One step, always. There is no guidance and no negative prompt."
    if manifest.refine:
        one_step = (
            "One step has no guidance and no negative prompt. The base model (stage teacher) "
            "refines a draft in many guided steps, without a negative prompt."
        )
    found = [
        one_step,
        "It holds no engines: they fit one kind of device each, and are built there.",
        "It shows what its base model shows, and has that model's biases.",
    ]
    axes = {name: str(axis) for name, axis in bundle.axes.items() if "latent" not in name}
    if axes:
        found.append("Sizes: " + "; ".join(f"{name} {sizes}" for name, sizes in axes.items()) + ".")
    else:
        found.append("Image size and batch are fixed.")
    if "text_encoder" not in bundle.stages:
        found.append("It makes the prompts that were baked into it, and no others.")
    else:
        found.append(f"A prompt is read up to {manifest.text.context_tokens or 77} tokens.")
    return found


def _signed(bundle: Bundle) -> str:
    if not signature_path(bundle.root / "hipa.json").is_file():
        return ""
    return "`hipa.json.sig` signs the manifest, which lists the hash of every file.\n\n"
