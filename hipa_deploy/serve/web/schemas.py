"""The fields of the requests, as OpenAI's images API and this service's own API have them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from hipa_deploy.generate.noise import SEED_LIMIT
from hipa_deploy.generate.pipeline import DEFAULT_FEATHER
from hipa_deploy.images.source import MAX_SCALE
from hipa_deploy.serve.image_files import BEST, Format

ModelName = Annotated[str, Field(max_length=250)]
Prompt = Annotated[str, Field(min_length=1, max_length=100_000)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Count = Annotated[int, Field(ge=1, le=10_000)]
Side = Annotated[int, Field(ge=1, le=65536)]
Quality = Annotated[int, Field(ge=0, le=100)]
OpenAiQuality = Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]


class Fields(BaseModel):
    """A request's fields: a field that nobody knows is an error, not a silence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName | None = None
    output_format: Format = "png"
    output_compression: Quality = BEST

    @model_validator(mode="before")
    @classmethod
    def _null_names_no_format(cls, data: Any) -> Any:
        """OpenAI's clients send null where a program passes None, as their types allow."""
        if not isinstance(data, dict):
            return data
        left_out = ("output_format", "output_compression")
        return {
            name: value for name, value in data.items() if value is not None or name not in left_out
        }


class OpenAiFields(Fields):
    """What both requests of OpenAI's images API have.

    Attributes:
        model: 'BUNDLE' or 'BUNDLE:ADAPTOR'; may be left out where one model fits.
        prompt: what the images show.
        n: images.
        size: 'WIDTHxHEIGHT', or 'auto' for the bundle's own.
        response_format: images come as base64. There are no URLs: this service stores nothing.
        output_format: of the files.
        output_compression: quality of a JPEG or WebP.
        seed: of the first image, an addition of this service; None draws one.
        user: accepted and not used. So are ``safety_identifier``, ``quality``, ``complexity``,
            ``style`` and ``moderation``: a one-step bundle has one quality, one style, and no
            moderation.
        background: pictures are opaque.
        stream: answers are not streamed: one step has nothing to show in between.
        partial_images: see ``stream``.
        input_fidelity: accepted and not used.

    """

    prompt: Prompt
    n: Count | None = None
    size: Annotated[str, Field(max_length=20)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    seed: Seed | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    quality: OpenAiQuality | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    input_fidelity: Literal["low", "high"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_asks_for_nothing(cls, data: Any) -> Any:
        """Leave out null of fields that are unknown here: OpenAI adds some with every model.

        Its clients send them where a program passes None. Of 2026 are ``frame_count``,
        ``frame_duration_ms`` and ``svg``.
        """
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or name in cls.model_fields
        }


class OwnFields(Fields):
    """What all requests of this service's own API have.

    Attributes:
        model: as ``OpenAiFields`` has it.
        output_format: of the files.
        output_compression: quality of a JPEG or WebP.
        truncate: cut a prompt that is too long, in place of refusing it.
        prompt_weights: read ``(word:1.3)`` as a weight; None is as the bundle was exported.

    """

    truncate: bool = False
    prompt_weights: bool | None = None


class GenerateFields(OwnFields):
    """Images from a prompt.

    Attributes:
        prompt: what the images show.
        seed: of the first image; the others take the next numbers. None draws one.
        count: images.
        height: in pixels; None is the bundle's own.
        width: in pixels; None is the bundle's own.

    """

    prompt: Prompt
    seed: Seed | None = None
    count: Count = 1
    height: Side | None = None
    width: Side | None = None


class RefineFields(GenerateFields):
    """Images of the base model in many steps, from the noise of the drafts.

    Attributes:
        steps: of the sampler; None is as many as the adaptor's teacher took.
        guidance: how strongly the prompt guides; None is the teacher's.
        sampler: None is the teacher's.

    """

    steps: Annotated[int, Field(ge=2, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=1, le=30, allow_inf_nan=False)] | None = None
    sampler: Literal["dpmsolver++", "ddim"] | None = None


class EditFields(GenerateFields):
    """An edit of an image.

    Attributes:
        strength: one of the bundle's strengths, in (0, 1]; None is the largest.

    """

    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None


class InpaintFields(GenerateFields):
    """An image of which a part is repainted.

    Attributes:
        feather: width of the seam, in pixels.
        match: shift the colours of the new part, so that they meet those around it.

    """

    feather: Annotated[int, Field(ge=0, le=4096)] = DEFAULT_FEATHER
    match: bool = True


class ControlFields(GenerateFields):
    """An image that follows a control image.

    Attributes:
        scale: how strongly: 0 is the prompt alone, 1 the ControlNet as it was trained.

    """

    scale: Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)] = 1.0


class UpscaleFields(OwnFields):
    """An image that is enlarged.

    Attributes:
        prompt: what the image shows; may be empty.
        overlap: pixels of the result by which tiles overlap; None is an eighth of a tile.

    """

    prompt: Annotated[str, Field(max_length=100_000)] = ""
    overlap: Annotated[int, Field(ge=0, le=65536)] | None = None
