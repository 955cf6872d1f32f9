"""What several commands share: arguments, options, the console, and writing images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.commands.outputs import check_outputs, next_free_name, write_output
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.bundle.manifest import RefineSettings
    from hipa_deploy.generate.pipeline import GenerateResult, OneStepPipeline

# Progress and notes go to stderr, results (paths, tables, JSON) to stdout: a script can pipe them.
console = Console(stderr=True)


class Precision(str, Enum):
    """Weights and arithmetic inside the graphs."""

    fp16 = "fp16"
    fp32 = "fp32"


class Layout(str, Enum):
    """onestep: specialised graphs. generic: optimum's inputs and outputs."""

    onestep = "onestep"
    generic = "generic"


class Task(str, Enum):
    """What a bundle makes an image from."""

    generate = "generate"
    edit = "edit"
    inpaint = "inpaint"
    upscale = "upscale"


class EngineBackend(str, Enum):
    """What compiles and runs an engine."""

    rtx = "rtx"
    tensorrt = "tensorrt"


ModelOption = Annotated[
    str,
    typer.Option(
        help="Base model: a diffusers folder, a .safetensors or .ckpt file, a Hugging Face hub "
        "id, or 'emoji' (included)."
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        help="For a model in one file, the model it is of: sd15 | sd21-base | sd21-v | "
        "sd15-inpainting | sd2-inpainting | a diffusers folder of the same architecture. "
        "Needed only if its weights do not show it."
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA to merge into the model before anything else: FILE_OR_FOLDER, or "
        "FILE_OR_FOLDER:SCALE, where 1.0 is as it was trained. May be repeated; the order counts."
    ),
]
EmbeddingOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A textual inversion embedding to add to the model: FILE, or FILE:WORD with the word "
        "that stands for it in prompts. May be repeated."
    ),
]
OneStepOption = Annotated[
    str | None,
    typer.Option(
        help="Method of a one-step LoRA or model that others made: hyper-sd15 | hyper-sd15-t800 | "
        "lcm-sd15 | tcd-sd15 | tcd-sd21-base | sd-turbo | hipa | a .toml file. By default the "
        "adaptor's own step."
    ),
]
BundleArgument = Annotated[
    str, typer.Argument(help="A folder that hipa-export wrote, or 'emoji' for the included one.")
]
PromptsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPT...", help="One or more prompts, each in quotes: what the image shows."
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="What runs the models: auto | onnxruntime | openvino | openvino-bf16 | "
        "onnxruntime-cuda | onnxruntime-tensorrt | onnxruntime-rtx | tensorrt | rtx. auto takes "
        "engines built for this GPU, else ONNX Runtime on the CPU."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="A .png file for one image, a folder for several. By default image.png or images, "
        "and the next free name, such as image-2.png, if that exists."
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Replace output files that exist. An input is never replaced."),
]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the first image; further images take the next numbers.")
]
CountOption = Annotated[int, typer.Option(help="How many images to make of each prompt.")]
HeightOption = Annotated[
    int | None,
    typer.Option(help="Image height in pixels; only for a bundle exported with --dynamic height."),
]
WidthOption = Annotated[
    int | None,
    typer.Option(help="Image width in pixels; only for a bundle exported with --dynamic width."),
]
AdaptorOption = Annotated[
    str | None,
    typer.Option(
        help="Use another adaptor's weights: a folder that hipa-export --swap-for wrote, or its "
        "name inside the bundle's adaptors/ folder."
    ),
]
TruncateOption = Annotated[
    bool,
    typer.Option("--truncate", help="Cut off a prompt that is too long, instead of refusing it."),
]

PromptWeightsOption = Annotated[
    bool | None,
    typer.Option(
        "--prompt-weights/--no-prompt-weights",
        help="Read (word:1.3), (word) and square brackets as weights, as AUTOMATIC1111's web UI "
        "does, or as text. By default as the bundle was exported: as text, unless it says "
        "otherwise.",
    ),
]


def note_weights(bundle: Bundle, prompts: list[str], asked: bool | None) -> None:
    """Say so in one line where a prompt has what looks like a weight and is read as text."""
    from hipa_deploy.generate.prompt_weights import written_weight

    # Of a closed set the bundle decides, whatever is asked.
    is_closed_set = "text_encoder" not in bundle.stages
    if asked is not None or bundle.manifest.text.prompt_weights or is_closed_set:
        return
    for prompt in prompts:
        found = written_weight(prompt)
        if found:
            text = f"note: {found!r} is read as text. --prompt-weights reads it as a weight."
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return


def write_images(
    batches: Iterable[GenerateResult], paths: list[Path], *, force: bool = False
) -> None:
    """Write each image as soon as its batch is made, and print its path.

    Args:
        batches: results, in the order of ``paths``.
        paths: one PNG path for each image, as ``image_outputs`` gave them.
        force: whether files that exist are replaced.

    """
    from hipa_deploy.images.png import png_bytes

    remaining = iter(paths)
    for batch in batches:
        for image_HWC, parameters in zip(batch.images_BHWC, batch.parameters, strict=True):
            content = png_bytes(image_HWC, parameters)
            typer.echo(write_output(next(remaining), content, force=force))


def make_images(
    bundle: str,
    prompts: list[str],
    paths: list[Path],
    *,
    adaptor: str | None,
    backend: str,
    force: bool,
    prompt_weights: bool | None,
    refine: RefineSettings | None = None,
    **choices: Any,
) -> None:
    """Load a bundle, make an image for each prompt and seed, write each as soon as it is made.

    Args:
        bundle: a bundle's folder, or 'emoji'.
        prompts: what the images show.
        paths: one PNG path for each image, as ``image_outputs`` gave them.
        adaptor: an adaptor to swap in; None is the bundle's own.
        backend: what runs the stages.
        force: whether files that exist are replaced.
        prompt_weights: whether brackets in prompts are weights; None is as the bundle says.
        refine: how the base model makes the images, in many steps; None is the one step.
        choices: what else ``OneStepPipeline.stream`` takes: ``source``, ``seed``, ``count``, …

    Raises:
        HipaError: the bundle cannot be loaded here, or does not make such images.

    """
    from hipa_deploy.generate.pipeline import OneStepPipeline

    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        note_weights(pipe.bundle, prompts, prompt_weights)
        batches = pipe.stream(prompts, prompt_weights=prompt_weights, **choices)
        if refine is not None:
            batches = _refined(pipe, batches, refine, len(paths))
        write_images(batches, paths, force=force)


def _refined(
    pipe: OneStepPipeline, drafts: Iterable[GenerateResult], settings: RefineSettings, images: int
) -> Iterator[GenerateResult]:
    """Each batch of drafts as the base model makes it, with a bar of the steps of all images."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("refining", total=images)
        finished = 0
        for batch in drafts:
            count = len(batch.seeds)

            def show(done: int, total: int, before: int = finished, share: int = count) -> None:
                bar.update(task, completed=before + share * done / total)

            yield pipe.refine(
                batch,
                settings.steps,
                guidance=settings.guidance,
                sampler=settings.sampler,
                progress=show,
            )
            finished += count


def image_outputs(
    out: Path | None,
    prompts: int,
    count: int,
    seed: int,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> list[Path]:
    """Paths of the images of a command, once it is certain that they may be written.

    Args:
        out: a .png file or a folder; None takes the first free name.
        prompts: number of prompts.
        count: images a prompt.
        seed: of the first image of each prompt.
        inputs: files and folders that the command reads.
        force: whether files that exist may be replaced.

    Raises:
        HipaError: as ``image_paths`` and ``check_outputs``.

    """

    if out is None:
        out = next_free_name(_usual_name(prompts * count))
    paths = image_paths(out, prompts, count, seed)
    check_outputs(paths, inputs=inputs, force=force)
    return paths


def note_name(out: Path | None, paths: list[Path]) -> None:
    """Say so where the usual name is taken and another one is written."""
    usual = _usual_name(len(paths))
    written = paths[0] if len(paths) == 1 else paths[0].parent
    if out is None and written != usual:
        console.print(f"{usual} exists: writing {written}", highlight=False, markup=False)


def _usual_name(images: int) -> Path:
    return Path("images" if images > 1 else "image.png")


def image_paths(out: Path, prompts: int, count: int, seed: int) -> list[Path]:
    """Paths of the images of a command: one file for one image, else numbered files in a folder.

    Args:
        out: a .png file or a folder.
        prompts: number of prompts.
        count: images a prompt.
        seed: of the first image of each prompt.

    Raises:
        HipaError: several images for one file, or a file that is not a PNG.

    Example:
        >>> [path.name for path in image_paths(Path("images"), prompts=2, count=1, seed=7)]
        ['000-seed7.png', '001-seed7.png']

    """
    # A folder may have a name that ends in .png; one that exists is taken as a folder.
    if out.suffix.lower() == ".png" and not out.is_dir():
        if prompts * count > 1:
            raise HipaError(
                f"--out {out} is one file for {prompts * count} images. Give --out a folder."
            )
        return [out]

    if out.is_file() or (out.suffix and not out.is_dir()):
        raise HipaError(
            f"--out {out}: images are written as PNG. "
            "Give --out a name that ends in .png, or a folder."
        )

    paths = []
    for number in range(prompts):
        for i in range(count):
            paths.append(out / f"{number:03d}-seed{seed + i}.png")
    return paths
