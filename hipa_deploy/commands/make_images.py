"""Make the images of a command, write them, and say in one line what a user would want to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hipa_deploy.commands.files.file_settings import IMAGE_SUFFIXES, FileSettings
from hipa_deploy.commands.files.outputs import check_outputs, next_free_name, write_output
from hipa_deploy.commands.options import FileFormat, console
from hipa_deploy.disk.files import is_special
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    import numpy as np

    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.bundle.manifest import RefineSettings
    from hipa_deploy.generate.jobs.withheld import Flagged
    from hipa_deploy.generate.pipeline import GenerateResult, OneStepPipeline
    from hipa_deploy.generate.refine.refiner import Progress
    from hipa_deploy.marks.safety import Checker

_LARGE_BUNDLE = 500_000_000  # bytes; that of SD 1.5 in FP16 has 2 GB


def note_syntax(bundle: Bundle, prompts: list[str], asked: bool | None) -> None:
    """Say so where a prompt has what looks like a weight, or like A1111's, and is read as text.

    So is the word of an embedding whose capitals are others: A1111 would take it.
    """
    from hipa_deploy.generate.prompt_weights import in_other_case, web_ui_word, written_weight

    # Of a closed set the bundle decides, whatever is asked.
    if "text_encoder" not in bundle.stages:
        return
    if asked is None and not bundle.manifest.text.prompt_weights:
        weights = filter(None, map(written_weight, prompts))
        _note_text(next(weights, None), "--prompt-weights reads it as a weight.")
    word = next(filter(None, map(web_ui_word, prompts)), None)
    if word and word.startswith("<lora"):
        _note_text(word, "hipa-export --lora merges LoRAs.")
    else:
        _note_text(word, "AUTOMATIC1111's web UI obeys it, and nothing here does.")
    for embedding in bundle.manifest.embeddings:
        spelled = [in_other_case(embedding.token, prompt) for prompt in prompts]
        remedy = f"The word of the embedding is {embedding.token!r}."
        _note_text(next(filter(None, spelled), None), remedy)


def note_unquoted(prompts: list[str]) -> None:
    """Say so where a prompt of several words probably lacks its quotation marks.

    The shell then hands each word over as a prompt of its own, and each becomes an image.
    """
    if len(prompts) > 2 and not any(len(prompt.split()) > 1 for prompt in prompts):
        joined = " ".join(prompts)
        text = f'note: {len(prompts)} prompts of one word each. As one prompt: "{joined}"'
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _note_text(found: str | None, remedy: str) -> None:
    if found:
        text = f"note: {found!r} is read as text. {remedy}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def note_faster_backend(pipe: OneStepPipeline, asked: str) -> None:
    """Say so in one line where 'auto' took ONNX Runtime and a faster backend is installed.

    It is not taken by itself: with 8 significant bits it makes other images. It was measured at the
    size of SD 1.5, so nothing is said of small bundles.
    """
    if asked != "auto" or pipe.backend != "onnxruntime":
        return
    bundle = pipe.bundle
    size = sum((bundle.root / name).stat().st_size for name in bundle.manifest.files)
    if size < _LARGE_BUNDLE:
        return
    from hipa_deploy.engines.backends.available import faster_on_cpu

    faster = faster_on_cpu()
    if faster:
        text = (
            f"note: auto took onnxruntime. --backend {faster} is faster on this processor. "
            f"Is it accurate enough? Run: hipa-doctor {pipe.bundle.root} --backend {faster}"
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_images(
    batches: Iterable[GenerateResult],
    paths: list[Path],
    files: FileSettings = FileSettings(),
    *,
    out: Path | None,
    force: bool = False,
    watch: Callable[[np.ndarray], None] | None = None,
) -> None:
    """Write each image as soon as its batch is made, and print its path.

    Args:
        batches: results, in the order of ``paths``.
        paths: one path for each image, as ``image_outputs`` gave them; a suffix is a format.
        files: how the files are written and marked.
        out: the user's own name; without one, another name than the usual is told.
        force: whether files that exist are replaced.
        watch: is shown every image, uint8 [H, W, 3], once its file is written.

    Raises:
        HipaError: images were flagged by a checker. All others are written before.

    """
    from hipa_deploy.generate.jobs.withheld import withheld_error

    asked = 0
    written = 0
    flagged: list[Flagged] = []
    for batch in batches:
        withheld = {one.index for one in batch.flagged}
        made = zip(batch.images_BHWC, batch.parameters, strict=True)
        for index in range(len(batch.seeds) + len(withheld)):
            path = paths[asked]
            asked += 1
            if index not in withheld:
                image_HWC, parameters = next(made)
                content = files.encode(path, image_HWC, parameters)
                place = write_output(path, content, force=force)
                # Of a device, such as /dev/stdout, the path would end up in the image.
                if not is_special(path):
                    typer.echo(place)
                written += 1
                # Not before: of a request that is refused, nothing is written.
                if written == 1:
                    _note_name(out, paths)
                if watch is not None:
                    watch(image_HWC)
        flagged += batch.flagged
    if flagged:
        raise withheld_error(flagged, asked)


def make_images(
    bundle: str,
    prompts: list[str],
    paths: list[Path],
    *,
    out: Path | None,
    adaptor: str | None,
    backend: str,
    low_memory: bool,
    force: bool,
    prompt_weights: bool | None,
    verify: bool,
    cache: bool,
    files: FileSettings = FileSettings(),
    watch: Callable[[np.ndarray], None] | None = None,
    refine: RefineSettings | None = None,
    checker: Checker | None = None,
    **choices: Any,
) -> None:
    """Load a bundle, make an image for each prompt and seed, write each as soon as it is made.

    Args:
        bundle: a bundle's folder, or 'emoji'.
        prompts: what the images show.
        paths: one path for each image, as ``image_outputs`` gave them.
        out: as for ``write_images``.
        adaptor: an adaptor to swap in; None is the bundle's own.
        backend: what runs the stages.
        low_memory: load the stages in turn.
        force: whether files that exist are replaced.
        prompt_weights: whether brackets in prompts are weights; None is as the bundle says.
        verify: whether every file is hashed and every stage compiled again.
        cache: whether compiled stages are kept.
        files: how the files are written and marked.
        watch: is shown every image, once its file is written.
        refine: how the base model makes the images, in many steps; None is the one step.
        checker: the user's function that sees every image.
        choices: what else ``OneStepPipeline.stream`` takes: ``source``, ``seed``, ``count``, …

    Raises:
        HipaError: the bundle cannot be loaded here, or does not make such images.

    """
    from hipa_deploy.guide.known_prompts import warn_of_unknown

    with (
        load_pipeline(
            bundle,
            backend,
            adaptor,
            low_memory,
            files.watermark,
            verify=verify,
            cache=cache,
            refine=refine is not None,
            checker=checker,
        ) as pipe,
        _refining(refine is not None) as progress,
    ):
        stream = pipe.stream(
            prompts, prompt_weights=prompt_weights, refine=refine, progress=progress, **choices
        )
        batches = iter(stream)
        # A prompt that is refused is one line, without the notes.
        first = next(batches)
        note_unquoted(prompts)
        warn_of_unknown(pipe.bundle.root, prompts)
        note_syntax(pipe.bundle, prompts, prompt_weights)
        write_images(chain([first], batches), paths, files, out=out, force=force, watch=watch)
        note_faster_backend(pipe, backend)


def load_pipeline(
    bundle: str,
    backend: str,
    adaptor: str | None,
    low_memory: bool,
    watermark: bool | int | None = None,
    *,
    verify: bool = False,
    cache: bool = True,
    refine: bool = False,
    checker: Checker | None = None,
) -> OneStepPipeline:
    """Load a bundle with an adaptor, and say in one line how the stages share little memory.

    With ``refine`` the line names the base UNet, which then runs in place of the bundle's.

    Raises:
        HipaError: the bundle cannot be loaded here, or the adaptor does not fit it.

    """
    from hipa_deploy.generate.pipeline import OneStepPipeline

    with console.status("loading"):
        pipe = OneStepPipeline.load(
            bundle,
            backend,
            low_memory=low_memory,
            watermark=watermark,
            verify=verify,
            cache=cache,
            checker=checker,
        )
    try:
        if low_memory:
            # In words: 'text_encoder, then unet + vae_decoder'.
            stages = str(pipe.stages)
            if refine:
                # It is released before the decoder is loaded, even where the two would fit.
                stages = stages.replace("unet + ", "unet, then ").replace("unet", "base UNet")
            console.print(f"low memory: {stages}", markup=False, highlight=False)
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
    except BaseException:
        pipe.close()
        raise
    return pipe


@contextmanager
def _refining(asked: bool) -> Iterator[Progress | None]:
    """A bar of the steps of all images, where they are refined."""
    if not asked:
        yield None
        return
    from rich.progress import Progress as Bar

    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("refining", total=None)
        yield lambda done, steps: bar.update(task, completed=done, total=steps)


def image_outputs(
    out: Path | None,
    prompts: int,
    count: int,
    seed: int,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    format: FileFormat | None = None,
) -> list[Path]:
    """Paths of the images of a command, once it is certain that they may be written.

    Args:
        out: an image file or a folder; None takes the first free name.
        prompts: number of prompts.
        count: images a prompt.
        seed: of the first image of each prompt.
        inputs: files and folders that the command reads.
        force: whether files that exist may be replaced.
        format: of the files in a folder; None is PNG.

    Raises:
        HipaError: as ``image_paths`` and ``check_outputs``.

    """

    if out is None:
        out = next_free_name(_usual_name(prompts * count, format))
    paths = image_paths(out, prompts, count, seed, format)
    check_outputs(paths, inputs=inputs, force=force)
    return paths


def _note_name(out: Path | None, paths: list[Path]) -> None:
    """Say so where the usual name is taken and another one is written."""
    usual = Path("images" if len(paths) > 1 else f"image{paths[0].suffix}")
    written = paths[0] if len(paths) == 1 else paths[0].parent
    if out is None and written != usual:
        console.print(f"{usual} exists: writing {written}", highlight=False, markup=False)


def _usual_name(images: int, format: FileFormat | None) -> Path:
    return Path("images" if images > 1 else f"image{_suffix(format)}")


def _suffix(format: FileFormat | None) -> str:
    return ".jpg" if format is FileFormat.jpeg else f".{format.value if format else 'png'}"


def image_paths(
    out: Path, prompts: int, count: int, seed: int, format: FileFormat | None = None
) -> list[Path]:
    """Paths of the images of a command: one file for one image, else numbered files in a folder.

    Args:
        out: an image file, a folder, or a device such as /dev/stdout.
        prompts: number of prompts.
        count: images a prompt.
        seed: of the first image of each prompt.
        format: of the files in a folder; None is PNG.

    Raises:
        HipaError: several images for one file, a file of another kind, or a ``format`` that is not
            that of the file's name.

    Example:
        >>> [path.name for path in image_paths(Path("images"), prompts=2, count=1, seed=7)]
        ['000-seed7.png', '001-seed7.png']

    """
    # A device or a pipe, such as /dev/stdout, has no suffix. It gets one PNG.
    is_device = out.exists() and is_special(out)

    # A folder may have a name that ends in .png; one that exists is taken as a folder.
    if is_device or (out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir()):
        suffix_format = IMAGE_SUFFIXES.get(out.suffix.lower(), "png")
        if format is not None and suffix_format != format.value:
            raise HipaError(
                f"--format {format.value} is not the format of --out {out}. Leave --format out."
            )
        if prompts * count > 1:
            raise HipaError(
                f"--out {out} is one file for {prompts * count} images. Give --out a folder."
            )
        return [out]

    if out.is_file() or (out.suffix and not out.is_dir()):
        raise HipaError(
            f"--out {out}: images are written as PNG, WebP or JPEG. "
            "Give --out a name that ends in .png, .webp or .jpg, or a folder."
        )

    paths = []
    for number in range(prompts):
        for i in range(count):
            paths.append(out / f"{number:03d}-seed{seed + i}{_suffix(format)}")
    return paths
