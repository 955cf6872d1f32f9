"""``hipa-generate``: images from prompts."""

from __future__ import annotations

from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    CacheOption,
    CountOption,
    ForceOption,
    HeightOption,
    OutOption,
    PromptsArgument,
    PromptWeightsOption,
    SeedOption,
    TruncateOption,
    VerifyOption,
    WidthOption,
    image_outputs,
    make_images,
    note_name,
)


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
    verify: VerifyOption = False,
    cache: CacheOption = True,
    force: ForceOption = False,
) -> None:
    """Generate images from prompts, in one step each.

    The same prompt and seed give the same image. Each PNG carries the parameters that made it.
    """
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_count, check_request

    # Before the bundle is loaded: a mistake is reported at once.
    check_count(len(prompts), count)
    root = resolve_bundle(bundle)
    paths = image_outputs(out, len(prompts), count, seed, inputs=[root], force=force)
    check_request(
        Bundle.open(root),
        backend,
        prompts,
        seed=seed,
        count=count,
        adaptor=adaptor,
        size=(height, width),
    )
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
        verify=verify,
        cache=cache,
    )
