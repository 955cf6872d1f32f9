"""``hipa-generate``: images from prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    CountOption,
    ForceOption,
    HeightOption,
    OutOption,
    PromptsArgument,
    PromptWeightsOption,
    SeedOption,
    TruncateOption,
    WidthOption,
    image_outputs,
    make_images,
    note_name,
)
from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.bundle.manifest import RefineSettings


def generate(
    bundle: BundleArgument,
    prompts: PromptsArgument,
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
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

    The same prompt and seed give the same image. Each PNG carries the parameters that made it. With
    --refine the many steps of the base model start from the seed's noise, as the one step does: a
    draft without it foretells the image.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_count, check_request

    # Before the bundle is loaded: a mistake is reported at once.
    check_count(len(prompts), count)
    root = resolve_bundle(bundle)
    paths = image_outputs(out, len(prompts), count, seed, inputs=[root], force=force)
    opened = Bundle.open(root)
    check_request(
        opened,
        backend,
        prompts,
        seed=seed,
        count=count,
        adaptor=adaptor,
        size=(height, width),
    )
    settings = _refine_settings(opened, backend, refine, guidance, adaptor)
    note_name(out, paths)

    make_images(
        bundle,
        prompts,
        paths,
        adaptor=adaptor,
        backend=backend,
        force=force,
        seed=seed,
        count=count,
        height=height,
        width=width,
        truncate=truncate,
        prompt_weights=prompt_weights,
        refine=settings,
    )


def _refine_settings(
    bundle: Bundle,
    backend: str,
    refine: str | None,
    guidance: float | None,
    adaptor: str | None,
) -> RefineSettings | None:
    """How to refine; None without ``--refine``.

    Raises:
        HipaError: a value out of range, or a bundle, backend or adaptor that is not refined.

    """
    if refine is None:
        if guidance is not None:
            raise HipaError("--guidance is for --refine: one step has none. Leave out --guidance.")
        return None
    from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
    from hipa_deploy.generate.open_stages import resolve_backend
    from hipa_deploy.generate.refine.drafts import check_swap
    from hipa_deploy.generate.refine.refiner import refine_settings

    steps = None
    if refine != "teacher":
        try:
            steps = int(refine)
        except ValueError:
            raise HipaError(
                f"--refine {refine!r} is no number of steps. Expected one, such as 25, or teacher."
            ) from None
    settings = refine_settings(bundle, steps, guidance, backend=resolve_backend(backend, bundle))
    if adaptor is not None:
        check_swap(bundle, AdaptorSwap.open(bundle, adaptor))
    return settings
