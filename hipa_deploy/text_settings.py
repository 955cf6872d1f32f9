"""How a prompt becomes a text context: one record for recipes, adaptors and bundles."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

MAX_CHUNKS = 3  # 231 tokens of CLIP's 77


class TextSettings(Record):
    """How prompts are encoded. Training, export and runtime use the same.

    Attributes:
        context_tokens: tokens of a context; None is as many as the text encoder reads at once.
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

    prompt_weights: bool = Field(
        default=False,
        description="Read `(word:1.3)`, `(word)` and `[word]` in prompts as weights, as "
        "AUTOMATIC1111's web UI does. By default brackets are text.",
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
