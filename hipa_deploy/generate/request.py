"""The checks of a request for images that need nothing but the bundle's manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hipa_deploy.bundle.adaptor_swap import AdaptorSwap
from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.errors import HipaError, RequestError, brief, whole_number
from hipa_deploy.generate.noise import check_seeds
from hipa_deploy.generate.prompts import open_prompts
from hipa_deploy.generate.runner import check_backend

MAX_IMAGES = 10_000
MAX_CHARACTERS = 100_000  # of a prompt; with --truncate the rest of a long one is cut off


def check_request(
    bundle: Bundle,
    backend: str,
    prompts: Sequence[str],
    *,
    seed: int,
    count: int,
    adaptor: str | Path | None = None,
    size: tuple[int | None, int | None] = (None, None),
    truncate: bool = False,
    prompt_weights: bool | None = None,
) -> None:
    """Check a request before anything of the bundle is loaded.

    Args:
        bundle: the bundle.
        backend: a name of a backend, or 'auto'.
        prompts: what the images show.
        seed: of the first image of each prompt.
        count: images a prompt.
        adaptor: a name or folder of weights to swap in.
        size: height and width in pixels; None is the bundle's own.
        truncate: cut prompts that are too long.
        prompt_weights: read ``(word:1.3)`` as a weight; None is as the bundle says.

    Raises:
        HipaError: an unknown backend, a number out of range, a size that the bundle does not have,
            an adaptor that is missing or for another bundle, or a prompt that the bundle does not
            take.

    """
    check_backend(backend)
    check_count(len(prompts), count)
    check_seeds(seed, count)
    check_prompts(prompts)
    latent_shape(bundle, *size)
    if adaptor is not None:
        AdaptorSwap.open(bundle, adaptor, remembered=True)
    # The tokenizer opens in a moment, the stages of a large model in a minute.
    source = open_prompts(bundle)
    weights = source.reads_weights(prompt_weights)
    step = bundle.manifest.one_step
    in_pixels = (size[0] or step.height, size[1] or step.width)
    source.prepare(prompts, truncate=truncate, weights=weights, size=in_pixels)


def check_count(prompts: int, count: int) -> None:
    """Raise HipaError unless there is something to make, and not absurdly much."""
    count = whole_number(count, "count")
    if prompts < 1 or count < 1 or prompts * count > MAX_IMAGES:
        raise HipaError(
            f"got {prompts} prompts, count {count}. Expected 1 to {MAX_IMAGES} images in all."
        )


def listed(prompt: str | Sequence[str]) -> list[str]:
    """The prompts of a call, which takes one or several.

    Raises:
        HipaError: it is neither a text nor a list; what a list holds is for ``check_prompts``.

    """
    if isinstance(prompt, str):
        return [prompt]
    try:
        prompts = iter(prompt)
    except TypeError:  # also of an array without an axis
        raise HipaError(
            f"a prompt is {brief(prompt)}. Expected text, or a list of texts."
        ) from None
    return list(prompts)


def check_pairs(requests: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Check pairs of a prompt and a seed.

    Raises:
        HipaError: no pair, too many, something that is no such pair, or a value that cannot be
            used.

    """
    pairs = []
    if not isinstance(requests, Iterable):
        raise HipaError(f"the requests are {brief(requests)}. Expected pairs (prompt, seed).")
    for request in requests:
        if not isinstance(request, tuple | list) or len(request) != 2:
            raise HipaError(
                f"a request is {brief(request)}. Expected a pair (prompt, seed), such as "
                "('3d emoji of a red apple', 3)."
            )
        prompt, seed = request
        check_seeds(seed)
        pairs.append((prompt, int(seed)))
    check_count(len(pairs), 1)
    check_prompts([prompt for prompt, _ in pairs])
    return [(plain_text(prompt), seed) for prompt, seed in pairs]


def plain_text(prompt: str) -> str:
    """A prompt as Python's own text: numpy's, or a member of an Enum, is written as another."""
    return str.__str__(prompt)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise HipaError for a prompt that would take minutes to cut into tokens, or is no text."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise HipaError(f"a prompt is {brief(prompt)}. Expected text.")
        if len(prompt) > MAX_CHARACTERS:
            raise RequestError(
                f"a prompt has {len(prompt)} characters. Expected at most {MAX_CHARACTERS}.",
                argument="prompt",
                code="string_above_max_length",
            )
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise RequestError(
                f"the prompt {prompt[:40]!r} holds bytes that are no UTF-8. Write it in UTF-8.",
                argument="prompt",
                code="invalid_prompt",
            )
