"""``hipa-generate``: images from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipa_deploy.checker_options import AllowCodeOption, CheckerOption
from hipa_deploy.commands.files.file_settings import check_image_size, file_settings
from hipa_deploy.commands.make_images import image_outputs, make_images
from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    C2paOption,
    CacheOption,
    CountOption,
    ForceOption,
    FormatOption,
    HeightOption,
    LowMemoryOption,
    OutOption,
    PromptWeightsOption,
    QualityOption,
    SeedOption,
    TruncateOption,
    VerifyOption,
    WatermarkOption,
    WidthOption,
    console,
)
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.bundle.manifest import RefineSettings
    from hipa_deploy.commands.files.again import Recipe
    from hipa_deploy.commands.files.file_settings import FileSettings


def generate(
    bundle: Annotated[
        str | None,
        typer.Argument(help="A folder that hipa-export wrote, or 'emoji' for the included one."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...",
            help="One or more prompts, each in quotes: what the image shows.",
        ),
    ] = None,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
    verify: VerifyOption = False,
    cache: CacheOption = True,
    low_memory: LowMemoryOption = False,
    again: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE",
            help="Make an image once more from the parameters in its file, and compare. BUNDLE may "
            "be left out if it lies in this folder; the prompt is left out.",
        ),
    ] = None,
    format: FormatOption = None,
    quality: QualityOption = None,
    watermark: WatermarkOption = None,
    c2pa: C2paOption = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Make the base model's own image from the same noise, in so many steps, of a "
            "bundle exported with --with-teacher. 'teacher' is as many as the adaptor's teacher "
            "took.",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="With --refine: how strongly the prompt guides it, 1 to 30; by default as it "
            "guided the adaptor's teacher."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Generate images from prompts, in one step each.

    The same prompt and seed give the same image. Each file carries the parameters that made it, and
    says that a model did. With --refine the many steps of the base model start from the seed's
    noise, as the one step does.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_count, check_request
    from hipa_deploy.images.source import require_task
    from hipa_deploy.marks.own_checker import chosen_checker

    recipe = None
    choices: dict[str, Any] = {
        "seed": seed,
        "count": count,
        "height": height,
        "width": width,
        "truncate": truncate,
        "prompt_weights": prompt_weights,
    }
    if again is not None:
        recipe, choices = _read_again(again, prompts, choices, watermark)
        bundle = str(recipe.find_bundle(bundle))
        prompts = [recipe.parameters["prompt"]]
        if backend == "auto":
            backend = recipe.parameters["backend"]
    if bundle is None:
        raise typer.BadParameter("Missing argument 'BUNDLE'. For example: hipa-generate emoji …")
    if not prompts:
        raise typer.BadParameter(
            "Missing argument 'PROMPT...'. For example: \"3d emoji of a red apple\""
        )

    # Before the bundle is loaded: a mistake is reported at once.
    check_count(len(prompts), choices["count"])
    root = resolve_bundle(bundle)
    opened = Bundle.open(root)
    inputs = [root] if again is None else [root, again]
    paths = image_outputs(
        out,
        len(prompts),
        choices["count"],
        choices["seed"],
        inputs=inputs,
        force=force,
        format=format,
    )
    if recipe is not None:
        adaptor = recipe.find_adaptor(opened, adaptor)
    size = (choices["height"], choices["width"])
    require_task(opened, "generate")
    check_request(
        opened,
        backend,
        prompts,
        seed=choices["seed"],
        count=choices["count"],
        adaptor=adaptor,
        size=size,
        truncate=choices["truncate"],
        prompt_weights=choices["prompt_weights"],
    )
    files = file_settings(opened, paths, quality=quality, watermark=watermark, c2pa=c2pa)
    if recipe is not None:
        files = _as_recorded(recipe, files)
        for difference in recipe.differences(opened, adaptor, backend):
            _say(f"differs: {difference}")
    step = opened.manifest.one_step
    check_image_size(files, opened, (size[0] or step.height, size[1] or step.width), paths)
    settings = _refine_settings(opened, backend, adaptor, refine, guidance, recipe)
    own_checker = chosen_checker(checker, allow_code)

    make_images(
        bundle,
        prompts,
        paths,
        out=out,
        adaptor=adaptor,
        backend=backend,
        low_memory=low_memory,
        force=force,
        verify=verify,
        cache=cache,
        files=files,
        watch=None if recipe is None else lambda image_HWC: _say(recipe.compare(image_HWC)),
        refine=settings,
        checker=own_checker,
        **choices,
    )


def _read_again(
    again: Path, prompts: list[str] | None, choices: dict[str, Any], watermark: bool | None
) -> tuple[Recipe, dict[str, Any]]:
    """The record of an image, and the choices that it was made with.

    Raises:
        HipaError: no such record, or options that it decides.

    """
    from hipa_deploy.commands.files.again import Recipe

    others_are_default = (
        choices["count"] == 1
        and not choices["seed"]
        and not choices["truncate"]
        and all(choices[name] is None for name in ("height", "width", "prompt_weights"))
    )
    if prompts or watermark is not None or not others_are_default:
        raise HipaError(
            "--again takes the prompt, the seed and everything else from the image. Leave out the "
            "prompt and the options but --adaptor, --backend, --out, --format, --quality, --c2pa, "
            "--checker, --allow-code and --force."
        )
    recipe = Recipe.read(again)
    recorded = recipe.parameters
    return recipe, {
        "seed": recorded["seed"],
        "count": 1,
        "height": recorded["height"],
        "width": recorded["width"],
        "truncate": bool(recorded.get("truncate")),
        "prompt_weights": bool(recorded.get("prompt_weights")),
    }


def _as_recorded(recipe: Recipe, files: FileSettings) -> FileSettings:
    """The file settings with the watermark that the image had, or without one."""
    from dataclasses import replace

    number = recipe.parameters.get("watermark")
    if number is None:
        return replace(files, watermark=False)
    try:
        return replace(files, watermark=int(number, 16))
    except ValueError:
        raise HipaError(
            f"{recipe.path}: its watermark is {number[:20]!r}. Expected hexadecimal digits."
        ) from None


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _refine_settings(
    bundle: Bundle,
    backend: str,
    adaptor: str | None,
    refine: str | None,
    guidance: float | None,
    recipe: Recipe | None,
) -> RefineSettings | None:
    """How to refine, as asked or as an image was; None for one step.

    Raises:
        HipaError: a value out of range, or a bundle, backend or adaptor that is not refined.

    """
    if recipe is not None:
        if refine is not None or guidance is not None:
            raise HipaError("--again refines as the image was. Leave out --refine and --guidance.")
        if "refine" not in recipe.parameters:
            return None
    elif refine is None:
        if guidance is not None:
            raise HipaError("--guidance is for --refine: one step has none. Leave out --guidance.")
        return None
    from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
    from hipa_deploy.generate.open_stages import resolve_backend
    from hipa_deploy.generate.refine.drafts import check_swap, recorded_settings
    from hipa_deploy.generate.refine.refiner import refine_settings, refinement_of

    refinement_of(bundle, resolve_backend(backend, bundle))
    if adaptor is not None:
        check_swap(bundle, AdaptorSwap.open(bundle, adaptor))
    if recipe is not None:
        return recorded_settings(bundle, recipe.parameters["refine"], f"{recipe.path}")
    steps = None
    if refine is not None and refine != "teacher":
        try:
            steps = int(refine)
        except ValueError:
            raise HipaError(
                f"--refine {refine!r} is no number of steps. Expected one, such as 25, or teacher."
            ) from None
    return refine_settings(bundle, steps, guidance)
