"""What is measured: models of published shapes with random weights, and the bundles made of them.

Time and memory depend on shapes, not on the values of weights, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.gpu.job import Job
from benchmarks.make_model import new_pipeline
from hipa_deploy.disk.files import new_folder
from hipa_deploy.embedded import MODEL
from hipa_deploy.engines.device.machine import available_memory_mib, usable_cores
from hipa_deploy.extras import missing
from hipa_deploy.tasks import Task

SIZES = ("sd15", "sd21-base", "sd21")
TINY_SIZE = "tiny"
TINY_DECODER = "tiny-decoder"
PROMPTS = "prompts.txt"
# Of an export at the size of SD 1.5: 5.9 GB at batch 1 (docs/explanation/measured.md), and twice
# that for the larger batches, which were not measured.
EXPORT_MIB = 12_000


@dataclass(frozen=True)
class BundleCase:
    """A bundle to measure.

    Attributes:
        name: of its folder.
        task: what it is for.
        batch: images of a call; static, so that a CUDA graph can be captured.
        tiny_decoder: an AutoencoderTiny of TAESD's shape decodes.

    """

    name: str
    task: Task
    batch: int
    tiny_decoder: bool = False


# In the order of their worth: the time budget may cut the last ones.
BUNDLES = (
    BundleCase("generate-1", "generate", 1),
    BundleCase("generate-8", "generate", 8),
    BundleCase("tiny-1", "generate", 1, tiny_decoder=True),
    BundleCase("edit-1", "edit", 1),
    BundleCase("inpaint-1", "inpaint", 1),
    BundleCase("upscale-1", "upscale", 1),
    BundleCase("tiny-8", "generate", 8, tiny_decoder=True),
    BundleCase("generate-4", "generate", 4),
    BundleCase("generate-2", "generate", 2),
)
TINY_BUNDLES = (
    BundleCase("generate-1", "generate", 1),
    BundleCase("inpaint-1", "inpaint", 1, tiny_decoder=True),
)


def bundle_cases(job: Job) -> tuple[BundleCase, ...]:
    """The bundles of a run."""
    return TINY_BUNDLES if job.tiny else BUNDLES


def inference_size(job: Job) -> str:
    """Whose shapes inference is measured with."""
    return TINY_SIZE if job.tiny else SIZES[0]


def inference_precision(job: Job) -> str:
    """The precision of inference: CPUs have no arithmetic in FP16."""
    return "fp16" if job.on_gpu else "fp32"


def model_folder(job: Job, size: str) -> Path:
    """A diffusers folder of that size, written where it does not exist yet."""
    folder = job.work / "models" / size
    if not (folder / PROMPTS).exists():
        pipe = tiny_pipeline() if size == TINY_SIZE else new_pipeline(size, job.device)
        with new_folder(folder) as part:
            pipe.save_pretrained(part)
            lines = [f"a photo of a red apple, number {number}" for number in range(64)]
            (part / PROMPTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_decoder_folder(job: Job) -> Path:
    """An AutoencoderTiny of TAESD's shape, written where it does not exist yet."""
    folder = job.work / "models" / TINY_DECODER
    if not folder.exists():
        with new_folder(folder) as part:
            tiny_decoder().save_pretrained(part)
    return folder


def tiny_decoder() -> AutoencoderTiny:
    """An AutoencoderTiny of TAESD's shape with seeded random weights, in float16."""
    torch.manual_seed(0)
    return AutoencoderTiny().half()


def tiny_pipeline() -> StableDiffusionPipeline:
    """A complete Stable Diffusion of 64 x 64 pixels with two million random parameters."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        sample_size=64,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(MODEL, subfolder="tokenizer"),
        scheduler=DDIMScheduler(**schedule, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run(job: Job) -> None:
    """Write the model and export the bundles, several at a time: preparation, no figures."""
    cases = bundle_cases(job)
    job.file.plan([case.name for case in cases])
    started = time.monotonic()
    model = model_folder(job, inference_size(job))
    tiny_decoder_folder(job)
    job.file.facts["model_seconds"] = round(time.monotonic() - started, 1)

    absent = missing("export")
    for case in cases:
        if absent:
            job.file.leave_out(case.name, f"{', '.join(absent)} is not installed")
    if not absent:
        _export_all(job, model, cases)


def bundle_folder(job: Job, case: BundleCase) -> Path:
    """The folder of a bundle; it exists only if its export succeeded."""
    return job.work / "bundles" / case.name


def _export_all(job: Job, model: Path, cases: tuple[BundleCase, ...]) -> None:
    """Export in processes of their own, as many at a time as cores and memory allow."""
    memory = available_memory_mib()
    slots = max(1, usable_cores() // 4)
    if memory is not None and not job.tiny:
        slots = max(1, min(slots, memory // EXPORT_MIB))
    if job.tiny:
        slots = len(cases)

    waiting = [case for case in cases if not bundle_folder(job, case).exists()]
    for case in cases:
        if case not in waiting:
            del job.file.left_out[case.name]
    running: dict[str, _Export] = {}
    with _ended(running):
        while waiting or running:
            while waiting and len(running) < slots and job.file.remaining > 0:
                case = waiting.pop(0)
                running[case.name] = _Export(job, model, case, slots)
            for name, export in list(running.items()):
                if export.child.poll() is not None:
                    del running[name]
                    _note(job, export)
            if job.file.remaining <= 0:
                break
            time.sleep(0.05)
    for case in cases:
        if bundle_folder(job, case).exists():
            job.file.left_out.pop(case.name, None)


@contextmanager
def _ended(running: dict[str, _Export]) -> Iterator[None]:
    """End what still runs when the block is left: the time budget ended first."""
    try:
        yield
    finally:
        for export in running.values():
            export.child.kill()
            export.child.wait()


class _Export:
    """An export in a process of its own.

    Attributes:
        case: the bundle.
        child: the process.
        log: what it says.
        started: the time at its start.

    """

    def __init__(self, job: Job, model: Path, case: BundleCase, slots: int) -> None:
        self.case = case
        self.log = job.work / f"export-{case.name}.log"
        self.started = time.monotonic()
        command = [sys.executable, "-m", "hipa_deploy", "export", "--model", str(model)]
        command += ["--out", str(bundle_folder(job, case)), "--task", case.task]
        command += ["--batch", str(case.batch), "--dtype", inference_precision(job)]
        if case.tiny_decoder:
            command += ["--decoder", str(job.work / "models" / TINY_DECODER)]
        # Threads of several exports that fight for the same cores are slower than fewer threads.
        threads = str(max(1, usable_cores() // slots))
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
            )


def _note(job: Job, export: _Export) -> None:
    """Put the end of an export into the part's data file."""
    name = export.case.name
    if export.child.returncode == 0:
        job.file.facts[f"{name}_seconds"] = round(time.monotonic() - export.started, 1)
        job.file.left_out.pop(name, None)
    else:
        said = export.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        job.file.left_out[name] = f"the export failed: {last}"
    job.file.save()


def bundle_size_mib(folder: Path) -> float:
    """What the files of a bundle's manifest take together."""
    manifest = json.loads((folder / "hipa.json").read_text(encoding="utf-8"))
    size = sum((folder / name).stat().st_size for name in manifest["files"])
    return round(size / 2**20, 1)
