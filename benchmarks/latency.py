"""Latency of one image in one step: this toolkit compared with other runtimes, side by side.

Purpose: the time of an image, the time to the first image, and peak memory of every contender that
is installed, on the same weights and noise.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    python benchmarks/latency.py --model /tmp/sd15 --tiny /tmp/sd15/tiny --work /tmp/latency \\
        --out latency.json
    python benchmarks/latency.py --model hipa_deploy/embedded/model --runs 30 \\
        --tiny hipa_deploy/embedded/decoder --work /tmp/latency-small

Expected time: hours at SD 1.5's size on two CPU cores (17 contenders, 20 images for each, half of
them by diffusers); minutes for the embedded model. The five exports come first and are kept.

Every contender is a process of its own, so that its start-up and peak memory are its own. It runs
in turn with diffusers eager, two images each, so that other work on the machine disturbs both: the
ratio is the median of the paired ratios. The first image of a turn comes after a pause, the second
right after it, and each is compared with its like: after a pause threads and caches are asleep,
which shows in a small model's time. Everything computes in FP32, except in bfloat16 where the name
says so. Every image has a new prompt, except where the name says that its context is cached.
"""

from __future__ import annotations

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
# Before each turn: threads of the other process that wait by spinning would slow this one.
PAUSE_SECONDS = 0.2
Image = Callable[[str], np.ndarray]
"""A function from a prompt to its image uint8 [H, W, 3], always from seed 0."""


def diffusers_pipeline(model: Path) -> Any:
    """The model's own pipeline for one step without guidance, as a user of one would set it up."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)

    # 'trailing' puts the only step at the last timestep, and the step goes all the way to x0.
    one_step = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **one_step)
    return pipe


def call(pipe: Any, shape_CHW: tuple[int, int, int], dtype: Any = None) -> Image:
    """A pipeline with diffusers' interface as a function of the prompt.

    Args:
        pipe: The pipeline.
        shape_CHW: Shape of the latents.
        dtype: torch's type of the noise; None is float32.

    """
    import torch

    from hipa_deploy.generate.noise import initial_noise

    pipe.set_progress_bar_config(disable=True)

    # Every contender starts from the same noise, so that the images can be compared.
    noise = torch.from_numpy(initial_noise([0], shape_CHW)).to(dtype or torch.float32)

    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}

    def image(prompt: str) -> np.ndarray:
        made = pipe(prompt, latents=noise, **options).images[0]
        return (made * 255).round().astype(np.uint8)

    return image


def eager(model: Path, work: Path) -> Image:
    """Diffusers as installed."""
    return call(diffusers_pipeline(model), latent_shape(work))


def bfloat16(model: Path, work: Path) -> Image:
    """Diffusers with all weights and arithmetic in bfloat16."""
    import torch

    pipe = diffusers_pipeline(model).to(torch.bfloat16)
    return call(pipe, latent_shape(work), torch.bfloat16)


def compiled(model: Path, work: Path) -> Image:
    """Diffusers with UNet and decoder through torch.compile."""
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
    """OpenVINO on this toolkit's graphs, tokenizer and noise, so that only the runtime differs."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.engines.backends.openvino_runner import load_openvino
    from hipa_deploy.generate.noise import initial_noise
    from hipa_deploy.generate.tokenizer import PromptTokenizer

    ov = load_openvino()
    bundle = Bundle.open(work / "full")
    core = ov.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    stages = [core.compile_model(bundle.stage_path(name), "CPU", options) for name in bundle.stages]
    text, unet, decoder = stages
    tokenizer = PromptTokenizer(bundle.path("tokenizer/tokenizer.json"))
    noise = initial_noise([0], bundle.manifest.one_step.latent_shape)

    def image(prompt: str) -> np.ndarray:
        context = text(tokenizer([prompt]))[0]
        latents = unet((noise, context))[0]
        return decoder(latents)[0][0]

    return image


def ours(
    bundle: str, prompt: str | None = None, backend: str = "onnxruntime"
) -> Callable[[Path, Path], Image]:
    """This toolkit.

    Args:
        bundle: Name of the bundle, a key of ``BUNDLES``.
        prompt: The prompt of every image, whose context is then cached; None is a new one each.
        backend: The backend that runs the bundle.

    """

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
    """[C, H, W] of the latents, from the bundle's manifest, so that nothing is loaded for it."""
    manifest = json.loads((work / "full/hipa.json").read_text(encoding="utf-8"))
    channels, height, width = manifest["one_step"]["latent_shape"]
    return channels, height, width


def make_bundles(model: Path, tiny: Path, work: Path) -> None:
    """Export the bundles that do not exist yet, each in a process of its own."""
    export = Path(sys.executable).with_name("hipa-export")
    for name, options in BUNDLES.items():
        if (work / name).exists():
            continue
        chosen = [str(tiny) if option == "TINY" else option for option in options]
        command = [export, "--model", model, "--out", work / name, "--dtype", "fp32", *chosen]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Process:
    """A contender, loaded in a process of its own, that makes images when it is asked to.

    Attributes:
        child: The process.
        first_image_seconds: From the start of the process to its first image.

    """

    def __init__(self, name: str, model: Path, work: Path) -> None:
        script = [sys.executable, __file__]
        options = ["--model", str(model), "--work", str(work), "--contender", name]
        started = time.perf_counter()
        self.child = subprocess.Popen(
            [*script, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

        # The answer comes after two images; only the first belongs to the start.
        first = self.ask("warm up")
        self.first_image_seconds = time.perf_counter() - started - first["next_seconds"]

    def ask(self, prompt: str) -> dict[str, Any]:
        """Have two images made; returns the line of ``serve``.

        Raises:
            SystemExit: The process died.

        """
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
    """The child's side: a line of JSON for every prompt on standard input.

    It holds the seconds of the image ('seconds') and of one more right after it ('next_seconds'),
    the process's peak memory ('peak_gb'), and the mean of the image's pixels ('mean').
    """
    image = CONTENDERS[name](model, work)
    for line in sys.stdin:
        started = time.perf_counter()
        # The second image comes right after the first: nothing has fallen asleep in between.
        made = image(line.strip())
        between = time.perf_counter()
        image(f"{line.strip()}, once more")
        times = {"seconds": between - started, "next_seconds": time.perf_counter() - between}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({**times, "peak_gb": peak, "mean": float(made.mean())}), flush=True)


def compare(name: str, model: Path, work: Path, runs: int) -> dict[str, Any]:
    """Run one contender and the baseline in turn.

    Args:
        name: The contender.
        model: Diffusers folder.
        work: Folder of the bundles.
        runs: Turns.

    Returns:
        Medians and ratios, for the image after a pause and (with the prefix 'next_') for the one
        right after it.

    """
    baseline = Process(BASELINE, model, work)
    contender = Process(name, model, work)
    their_answers: list[dict[str, Any]] = []
    own_answers: list[dict[str, Any]] = []

    # Who comes first changes from run to run, so that neither always runs on a warmer machine.
    for run in range(runs):
        prompt = f"a red apple, number {run}"
        if run % 2:
            their_answers.append(baseline.ask(prompt))
            own_answers.append(contender.ask(prompt))
        else:
            own_answers.append(contender.ask(prompt))
            their_answers.append(baseline.ask(prompt))
    baseline.close()
    contender.close()

    result = {}
    for prefix, key in (("", "seconds"), ("next_", "next_seconds")):
        theirs = [answer[key] for answer in their_answers]
        own = [answer[key] for answer in own_answers]
        ratios = [their_time / own_time for their_time, own_time in zip(theirs, own, strict=True)]
        result[f"{prefix}median_seconds"] = statistics.median(own)
        result[f"{prefix}baseline_median_seconds"] = statistics.median(theirs)
        result[f"{prefix}times_faster"] = statistics.median(ratios)

    # The images of both must look alike, or the comparison is of different work.
    difference = abs(their_answers[-1]["mean"] - own_answers[-1]["mean"])
    result["first_image_seconds"] = contender.first_image_seconds
    result["peak_gb"] = own_answers[-1]["peak_gb"]
    result["image_mean_difference"] = difference
    return result


def cannot_run(name: str) -> str | None:
    """The remedy for a backend that a contender lacks here; None if it can run."""
    from hipa_deploy.engines.backends.available import describe_device

    # The names of such contenders contain the name of their backend.
    words = name.lower().replace(",", "").split()
    backends = [word for word in words if word.startswith("openvino")]
    if not backends:
        return None
    remedies = {found.name: found.remedy for found in describe_device().backends}
    return remedies[backends[0]]


def render(results: dict[str, dict[str, Any]], title: str) -> Table:
    """The results as a table."""
    heads = ("after a pause", "times faster than eager", "right after", "times faster than eager")
    table = Table("", *heads, "first image after", "peak memory", title=title)
    for name, row in results.items():
        cells = []
        for prefix in ("", "next_"):
            cells.append(f"{row[prefix + 'median_seconds']:.4f} s")
            cells.append(f"{row[prefix + 'times_faster']:.2f}")
        first = f"{row['first_image_seconds']:.1f} s"
        table.add_row(name, *cells, first, f"{row['peak_gb']:.2f} GB")
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
        missing = cannot_run(name)
        if missing:
            print(f"{name}: not measured. {missing}")
            continue
        if only and not any(part in name for part in only):
            continue
        results[name] = compare(name, model, work, runs)
        print(name, json.dumps(results[name]), flush=True)

        # Written after every contender: a run that is stopped keeps its results.
        if out:
            out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    Console().print(render(results, f"{model.name}, {runs} runs in turn, {machine}"))


if __name__ == "__main__":
    typer.run(main)
