"""What several commands share: arguments, options, and the console."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hipa_deploy.embedded import resolve_adaptor
from hipa_deploy.errors import HipaError

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
    control = "control"


class EngineBackend(str, Enum):
    """What compiles and runs an engine."""

    rtx = "rtx"
    tensorrt = "tensorrt"


class FileFormat(str, Enum):
    """What image files are written as."""

    png = "png"
    webp = "webp"
    jpeg = "jpeg"


def parse_seed(text: str) -> int:
    """The number of ``--seed``; 'random' draws one of 32 bits and prints it.

    Other programs that read the parameters know no larger seeds.
    """
    text = str(text)
    if text == "random":
        seed = secrets.randbelow(2**32)
        console.print(f"seed {seed}", highlight=False)
        return seed
    try:
        seed = int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number and not 'random'.") from None
    # Other programs take -1 as any seed.
    if seed < 0:
        raise typer.BadParameter(f"{text} is below 0. Expected 0 or more, or 'random' for any.")
    return seed


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
        "sd15-inpainting | sd2-inpainting | sdxl | ssd-1b | vega | sdxl-inpainting | a diffusers "
        "folder of the same architecture. "
        "Needed only if its weights do not show it."
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option(
        help="Another VAE for the model: a file that came with a fine-tune, such as "
        "vae-ft-mse-840000-ema-pruned.safetensors, or an AutoencoderKL folder. By default the "
        "model's own."
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
        "lcm-sd15 | tcd-sd15 | tcd-sd21-base | sd-turbo | hyper-sdxl | hyper-sdxl-unet | "
        "dmd2-sdxl | dmd2-sdxl-unet | lcm-sdxl | tcd-sdxl | sdxl-turbo | sdxl-lightning | hipa | "
        "a .toml file; METHOD@TIMESTEP starts at another timestep. By default the adaptor's own "
        "step."
    ),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TARGET",
        help="Take what suits a device, print it, and refuse what the memory plan says cannot fit "
        "there: orin-nano | orin-nx | agx-orin | thor | rtx30 | rtx40 | rtx4090 | rtx50 | a100 | "
        "h100. An option that you give as well wins.",
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
        help="A .png, .webp or .jpg file for one image, a folder for several. By default image.png "
        "or images, and the next free name, such as image-2.png, if that exists."
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Replace output files that exist. An input is never replaced."),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="NUMBER|random",
        parser=parse_seed,
        help="Seed of the first image; further images take the next numbers. 'random' draws one "
        "and prints it.",
    ),
]
FormatOption = Annotated[
    FileFormat | None,
    typer.Option(
        "--format",
        help="Format of the files in a folder, png by default. A single file has that of its name.",
    ),
]
QualityOption = Annotated[
    int | None,
    typer.Option(
        help="WebP and JPEG: 1 (small) to 100 (best). By default a JPEG has 95, and a WebP is "
        "lossless."
    ),
]
WatermarkOption = Annotated[
    bool | None,
    typer.Option(
        "--watermark/--no-watermark",
        help="Put an invisible watermark into each image, which hipa-doctor IMAGE reads. By "
        "default as the bundle's owner chose. Needs images of 256 pixels or more each way.",
    ),
]
C2paOption = Annotated[
    Path | None,
    typer.Option(
        "--c2pa",
        metavar="PEM",
        envvar="HIPA_C2PA",
        help="Sign each file's content credentials (C2PA) with this private key and the "
        "certificates that follow it in the same file.",
    ),
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

VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read and hash every file, and compile every model, whatever earlier starts left in "
        "the cache. By default a file that has not changed is not read again.",
    ),
]
CacheOption = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Keep the compiled models of a CPU backend in the user's cache, for the next start.",
    ),
]
LowMemoryOption = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Hold less in memory and take longer: models are loaded when they run, the text "
        "encoder apart from the others, and these one at a time where they do not fit together. "
        "The image is the same.",
    ),
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


def chosen_adaptor(name: str | None, option: str = "--adaptor") -> Path | None:
    """The folder of an adaptor that an option names; None where the option was not given.

    Raises:
        HipaError: the name is empty, as of a shell variable that is not set. Without an adaptor the
            base model would make its one step, which is a blur.

    """
    if name is None:
        return None
    if not name.strip():
        raise HipaError(
            f"{option} is empty. Expected an adaptor folder, or 'emoji'. Without one, leave "
            f"{option} out."
        )
    return resolve_adaptor(name)


def given_options(context: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """The values of those options that the user named, by option.

    Args:
        context: of the command.
        names: options, such as '--best-of'.

    """
    by_option = {}
    for parameter in context.command.params:
        for option in parameter.opts:
            by_option[option] = parameter.name
    given = {}
    for option in names:
        name = by_option[option]
        source = context.get_parameter_source(name)
        # By its name: Typer carries a copy of Click, whose sources are another class.
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[name]
            given[option] = value.value if isinstance(value, Enum) else value
    return given
