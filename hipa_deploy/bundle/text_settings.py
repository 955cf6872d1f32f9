"""How a prompt becomes a text context: one record for recipes, adaptors and bundles."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

MAX_CHUNKS = 3  # 231 tokens of CLIP's 77


class TextSettings(Record):
    """How prompts are encoded. Training, export and runtime use the same.

    Attributes:
        context_tokens: tokens of a context; None is as many as the text encoder reads at once.
        clip_skip: last layers of the text encoder that are left out, as in diffusers; of
            SD 1.x A1111's 'Clip skip' is one more, of SDXL two.
        prompt_weights: whether ``(word:1.3)`` is a weight, and not text.

    Example:
        >>> TextSettings(context_tokens=154).chunks(77)
        2

    """

    # The page of recipe keys shows this in place of the docstring.
    model_config = ConfigDict(json_schema_extra={"description": "How prompts are encoded."})

    context_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a text context: 77, 154 or 231. A prompt is encoded in chunks of 75 "
        "tokens, each between a start and an end token. By default 77, which CLIP reads at once.",
    )

    clip_skip: int = Field(
        default=0,
        ge=0,
        description="Last layers of the text encoder that are left out, counted as in diffusers: 1 "
        "is what AUTOMATIC1111's web UI calls Clip skip 2 of SD 1.x. Of SDXL, Clip skip 2 is 0.",
    )
    prompt_weights: bool = Field(
        default=False,
        description="Read `(word:1.3)`, `(word)` and `[word]` in prompts as weights, as "
        "AUTOMATIC1111's web UI does. By default brackets are text.",
    )

    def check(self, chunk_tokens: int, layers: int) -> None:
        """Check that the settings fit a text encoder.

        Args:
            chunk_tokens: tokens that it reads at once.
            layers: how many layers it has.

        Raises:
            HipaError: another number of tokens, or no layer left.

        """
        self.chunks(chunk_tokens)
        if self.clip_skip >= layers:
            raise HipaError(
                f"clip skip {self.clip_skip} leaves no layer: this model's text encoder has "
                f"{layers}. Expected 0 to {layers - 1}."
            )

    def chunks(self, chunk_tokens: int) -> int:
        """How many chunks a context has.

        Args:
            chunk_tokens: tokens that the text encoder reads at once, 77 for CLIP.

        Raises:
            HipaError: ``context_tokens`` is no multiple of it, or more than three times as many.

        """
        if self.context_tokens is None:
            return 1
        chunks, rest = divmod(self.context_tokens, chunk_tokens)
        if rest or not 1 <= chunks <= MAX_CHUNKS:
            sizes = [str(chunk_tokens * count) for count in range(1, MAX_CHUNKS + 1)]
            raise HipaError(
                f"context tokens: {self.context_tokens} do not fit this model's text encoder. "
                f"Expected one of: {', '.join(sizes)}."
            )
        return chunks


@dataclass(frozen=True)
class TextWishes:
    """What a command asks for; None leaves a setting to the adaptor.

    Attributes:
        context_tokens: tokens of a context.
        clip_skip: last layers of the text encoder that are left out.
        prompt_weights: whether ``(word:1.3)`` is a weight.

    """

    context_tokens: int | None = None
    clip_skip: int | None = None
    prompt_weights: bool | None = None


def choose_text(
    wishes: TextWishes,
    trained: TextSettings | None,
    chunk_tokens: int,
    layers: int,
    remedy: str = "Leave out --clip-skip.",
) -> tuple[TextSettings, str | None]:
    """How prompts are encoded: as asked for, else as the adaptor was trained, else the defaults.

    Args:
        wishes: what is asked for.
        trained: the adaptor's settings; None without an adaptor, or for one of another tool.
        chunk_tokens: tokens that the text encoder reads at once, 77 for CLIP.
        layers: how many layers it has.
        remedy: what to do about an adaptor that was trained with another clip skip.

    Returns:
        The settings, with the number of tokens filled in; and a warning, or None.

    Raises:
        HipaError: settings that do not fit the text encoder, or another clip skip than the
            adaptor's: its UNet has learned to read another layer.

    """
    base = trained or TextSettings()
    own_tokens = base.context_tokens or chunk_tokens
    tokens = own_tokens if wishes.context_tokens is None else wishes.context_tokens
    skip = base.clip_skip if wishes.clip_skip is None else wishes.clip_skip
    # The record would refuse it too, in words for a recipe.
    if skip < 0 or tokens < 1:
        raise HipaError(
            f"got clip skip {skip}, context tokens {tokens}. Expected clip skip 0 or more, and "
            f"context tokens {chunk_tokens} or more."
        )
    weights = base.prompt_weights if wishes.prompt_weights is None else wishes.prompt_weights
    chosen = TextSettings(context_tokens=tokens, clip_skip=skip, prompt_weights=weights)
    chosen.check(chunk_tokens, layers)
    if trained is not None and skip != trained.clip_skip:
        raise HipaError(
            f"the adaptor was trained with clip skip {trained.clip_skip}, not {skip}. {remedy}"
        )

    # As with another resolution: it works, and it is not what the adaptor has learned.
    if trained is not None and tokens != own_tokens:
        return chosen, (
            f"the adaptor was trained with contexts of {own_tokens} tokens, not {tokens}: "
            "images may be worse. To train with as many, set context_tokens in the recipe's table "
            "[text]."
        )
    return chosen, None
