"""Latency of one image in one step: this toolkit beside its peers, on the same weights and noise, side by side.

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    python benchmarks/latency.py --model /tmp/sd15 --tiny /tmp/sd15/tiny --work /tmp/latency --out latency.json
    python benchmarks/latency.py --model hipa_deploy/embedded/model --tiny hipa_deploy/embedded/decoder --runs 30 ...

Every contender is a process of its own (its start-up and peak memory are its own) and runs in turn with diffusers
eager, two images each, so that what disturbs the machine disturbs both: the ratio is the median of the paired ratios.
The first image of a turn comes after a pause, the second right after it, and each is compared with its like: after a
pause threads and caches are asleep, which shows in a small model's time.
Everything computes in FP32, but for bfloat16 where the name says so; every image has a new prompt, except where
the name says that its context is cached.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

BASELINE = "diffusers eager"
PAUSE_SECONDS = (
    0.2  # before each turn: threads of the other process that wait by spinning would slow it
)
Image = Callable[[str], np.ndarray]  # prompt -> uint8 [H, W, 3], always from seed 0


def diffusers_pipeline(model: Path) -> Any:
    """The model's own pipeline, one step without guidance, as a user of a one-step model sets it up."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    one_step = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **one_step)
    return pipe


def call(pipe: Any, shape_CHW: tuple[int, int, int], dtype: Any = None) -> Image:
    """A pipeline with diffusers' interface as a function of the prompt; ``dtype`` of the noise, float32 by default."""
    import torch

    from hipa_deploy.generate.noise import initial_noise

    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise([0], shape_CHW)).to(dtype or torch.float32)

    def image(prompt: str) -> np.ndarray:
        made = pipe(
            prompt, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="np"
        ).images[0]
        return (made * 255).round().astype(np.uint8)

    return image


def eager(model: Path, work: Path) -> Image:
    """Diffusers as installed."""
    return call(diffusers_pipeline(model), latent_shape(work))


def bfloat16(model: Path, work: Path) -> Image:
    """The same with all weights and arithmetic in bfloat16."""
    import torch

    pipe = diffusers_pipeline(model).to(torch.bfloat16)
    return call(pipe, latent_shape(work), torch.bfloat16)


def compiled(model: Path, work: Path) -> Image:
    """The same with UNet and decoder through torch.compile."""
    import torch

    pipe = diffusers_pipeline(model)
    pipe.unet = torch.compile(pipe.unet)
    pipe.vae.decode = torch.compile(pipe.vae.decode)
    return call(pipe, latent_shape(work))


def optimum(model: Path, work: Path) -> Image:
    """optimum-onnx on the generic layout."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    pipe = ORTDiffusionPipeline.from_pretrained(work / "generic", provider="CPUExecutionProvider")
    return call(pipe, latent_shape(work))


def openvino(model: Path, work: Path) -> Image:
    """OpenVINO on this toolkit's own graphs, with its tokenizer and noise: the runtimes alone differ."""
    ov = importlib.import_module("openvino")
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.generate.noise import initial_noise
    from hipa_deploy.generate.tokenizer import PromptTokenizer

    bundle = Bundle.open(work / "full")
    core = ov.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    text, unet, decoder = (
        core.compile_model(bundle.stage_path(name), "CPU", options) for name in bundle.stages
    )
    tokenizer = PromptTokenizer(bundle.path("tokenizer/tokenizer.json"))
    noise = initial_noise([0], bundle.manifest.one_step.latent_shape)
    return lambda prompt: decoder(unet((noise, text(tokenizer([prompt]))[0]))[0])[0][0]


def ours(
    bundle: str, prompt: str | None = None, backend: str = "onnxruntime"
) -> Callable[[Path, Path], Image]:
    """This toolkit; with ``prompt`` the same one every time."""

    def load(model: Path, work: Path) -> Image:
        from hipa_deploy import OneStepPipeline

        pipe = OneStepPipeline.load(work / bundle, backend)
        return lambda text: pipe(prompt or text, seed=0).images_BHWC[0]

    return load


CONTENDERS: dict[str, Callable[[Path, Path], Image]] = {
    BASELINE: eager,
    "diffusers, torch.compile": compiled,
    "diffusers, bfloat16": bfloat16,
    "optimum-onnx": optimum,
    "OpenVINO, our graphs": openvino,
    "ours": ours("full"),
    "ours, prompt cached": ours("full", "a red apple"),
    "ours, fused": ours("fused"),
    "ours, openvino backend": ours("full", backend="openvino"),
    "ours, openvino backend, prompt cached": ours("full", "a red apple", backend="openvino"),
    "ours, openvino backend, tiny decoder": ours("tiny", backend="openvino"),
    "ours, openvino backend, tiny decoder, fused, prompt cached": ours(
        "tiny-fused", "a red apple", "openvino"
    ),
    "ours, openvino-bf16 backend": ours("full", backend="openvino-bf16"),
    "ours, openvino-bf16 backend, prompt cached": ours("full", "a red apple", "openvino-bf16"),
    "ours, openvino-bf16 backend, tiny decoder": ours("tiny", backend="openvino-bf16"),
    "ours, tiny decoder": ours("tiny"),
    "ours, tiny decoder, fused": ours("tiny-fused"),
}
BUNDLES = {
    "generic": ["--layout", "generic"],
    "full": [],
    "fused": ["--fuse"],
    "tiny": ["--decoder", "TINY"],
    "tiny-fused": ["--decoder", "TINY", "--fuse"],
}


def latent_shape(work: Path) -> tuple[int, int, int]:
    """[C, h, w], from the bundle's manifest: without loading anything."""
    channels, height, width = json.loads((work / "full/hipa.json").read_text())["one_step"][
        "latent_shape"
    ]
    return channels, height, width


def make_bundles(model: Path, tiny: Path, work: Path) -> None:
    """Export what is not there yet, each in a process of its own."""
    export = Path(sys.executable).with_name("hipa-export")
    for name, options in BUNDLES.items():
        if not (work / name).exists():
            chosen = [str(tiny) if option == "TINY" else option for option in options]
            command = [export, "--model", model, "--out", work / name, "--dtype", "fp32", *chosen]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Process:
    """A contender, loaded in a process of its own, that makes an image when it is asked to."""

    def __init__(self, name: str, model: Path, work: Path) -> None:
        command = [
            sys.executable,
            __file__,
            "--model",
            str(model),
            "--work",
            str(work),
            "--contender",
            name,
        ]
        started = time.perf_counter()
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self.ask("warm up")
        self.first_image_seconds = time.perf_counter() - started - first["next_seconds"]

    def ask(self, prompt: str) -> dict[str, Any]:
        """{'seconds', 'next_seconds', 'peak_gb', 'mean'} of two images; ends us if the process died."""
        assert self.child.stdin
        assert self.child.stdout
        time.sleep(PAUSE_SECONDS)
        self.child.stdin.write(prompt + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended: {self.child.args}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def serve(name: str, model: Path, work: Path) -> None:
    """The child's side: one line of JSON for every line on standard input."""
    image = CONTENDERS[name](model, work)
    for line in sys.stdin:
        started = time.perf_counter()
        made = image(line.strip())
        between = time.perf_counter()
        image(f"{line.strip()}, once more")
        times = {"seconds": between - started, "next_seconds": time.perf_counter() - between}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({**times, "peak_gb": peak, "mean": float(made.mean())}), flush=True)


def compare(name: str, model: Path, work: Path, runs: int) -> dict[str, Any]:
    """One contender and the baseline in turn."""
    pair = [Process(BASELINE, model, work), Process(name, model, work)]
    answers: list[list[dict[str, Any]]] = [[], []]
    for run in range(runs):
        for index in (0, 1) if run % 2 else (1, 0):
            answers[index].append(pair[index].ask(f"a red apple, number {run}"))
    for process in pair:
        process.close()
    result = {}
    for prefix, key in (("", "seconds"), ("next_", "next_seconds")):
        theirs, own = ([answer[key] for answer in part] for part in answers)
        result |= {
            f"{prefix}median_seconds": statistics.median(own),
            f"{prefix}baseline_median_seconds": statistics.median(theirs),
            f"{prefix}times_faster": statistics.median(
                a / b for a, b in zip(theirs, own, strict=True)
            ),
        }
    return {
        **result,
        "first_image_seconds": pair[1].first_image_seconds,
        "peak_gb": answers[1][-1]["peak_gb"],
        "image_mean_difference": abs(answers[0][-1]["mean"] - answers[1][-1]["mean"]),
    }


def cannot_run(name: str) -> str | None:
    """What to do about what a contender lacks here, or None."""
    from hipa_deploy.engines.backends.available import describe_device

    backend = next(
        (part for part in name.lower().split() if part.startswith("openvino")), ""
    ).strip(",")
    problems = {found.name: found.remedy for found in describe_device().backends}
    return problems[backend] if backend else None


def render(results: dict[str, dict[str, Any]], title: str) -> Table:
    """The results as a table."""
    heads = ("after a pause", "times faster than eager", "right after", "times faster than eager")
    table = Table("", *heads, "first image after", "peak memory", title=title)
    for name, row in results.items():
        cells = [
            (f"{row[p + 'median_seconds']:.4f} s", f"{row[p + 'times_faster']:.2f}")
            for p in ("", "next_")
        ]
        first, peak = row["first_image_seconds"], row["peak_gb"]
        table.add_row(name, *cells[0], *cells[1], f"{first:.1f} s", f"{peak:.2f} GB")
    return table


def main(
    model: Annotated[Path, typer.Option(help="Diffusers folder.")],
    work: Annotated[Path, typer.Option(help="Folder for the bundles; kept.")],
    tiny: Annotated[
        Path | None, typer.Option(help="AutoencoderTiny folder for the model's latents.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Turns a contender, of two timed images each.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help="Contenders whose name contains this; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    contender: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare every contender that is installed with diffusers eager."""
    if contender:
        serve(contender, model, work)
        return
    if tiny is None:
        raise SystemExit("--tiny is missing. Expected an AutoencoderTiny folder.")
    make_bundles(model, tiny, work)
    results = {}
    for name in CONTENDERS:
        if missing := cannot_run(name):
            print(f"{name}: not measured. {missing}")
        elif not only or any(part in name for part in only):
            results[name] = compare(name, model, work, runs)
            print(name, json.dumps(results[name]), flush=True)
            if out:
                out.write_text(json.dumps(results, indent=2) + "\n")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    Console().print(render(results, f"{model.name}, {runs} runs in turn, {machine}"))


if __name__ == "__main__":
    typer.run(main)
