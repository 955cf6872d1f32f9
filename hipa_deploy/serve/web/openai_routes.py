"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``.

Source: the API reference at platform.openai.com/docs/api-reference/images, and the types of the
package ``openai``, whose client is tested against a running service.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from hipa_deploy.serve.image_files import BEST
from hipa_deploy.serve.served import Model
from hipa_deploy.serve.service import Delivery, ImageService, Order
from hipa_deploy.serve.web.answering import (
    DirectRoute,
    check_prompt_length,
    check_quality,
    chosen_model,
    deliver,
    seeds_from,
    size_of,
    withheld_images,
)
from hipa_deploy.serve.web.api_errors import ApiError
from hipa_deploy.serve.web.request_body import Form, json_fields
from hipa_deploy.serve.web.schemas import OpenAiFields
from hipa_deploy.serve.web.told_errors import OPENAI

router = APIRouter(route_class=DirectRoute)


def form_schema(fields: type[Any], *files: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """A form for the OpenAPI document, with files that it must have and ``optional`` ones."""
    schema = fields.model_json_schema()
    for name in (*files, *optional):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema.get("required", []), *files]
    return _body("multipart/form-data", schema)


def json_schema(fields: type[Any]) -> dict[str, Any]:
    """A JSON body for the OpenAPI document."""
    return _body("application/json", fields.model_json_schema())


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


@router.post("/v1/images/generations", openapi_extra=json_schema(OpenAiFields))
async def generations(request: Request) -> dict[str, Any]:
    """Images from a prompt."""
    service: ImageService = request.app.state.service
    fields = await json_fields(request, OpenAiFields)
    _check_fields(service, fields)
    model = chosen_model(service, fields.model, ["generate"])
    return await _answer(service, request, fields, _order(service, model, fields))


@router.post(
    "/v1/images/edits", openapi_extra=form_schema(OpenAiFields, "image", optional=["mask"])
)
async def edits(request: Request) -> dict[str, Any]:
    """Images from an image: an edit, or with a mask an inpainting."""
    service: ImageService = request.app.state.service
    async with Form(request, ["image", "image[]", "mask"]) as form:
        fields = form.fields(OpenAiFields)
        _check_fields(service, fields)
        image = form.file("image", "image[]", required=True)
        mask = form.file("mask")
        # Without a name: with a mask it is an inpainting, else whatever makes images from images.
        tasks = ["inpaint"] if mask and fields.model is None else ["edit", "inpaint"]
        model = chosen_model(service, fields.model, tasks)
        if mask and model.served.bundle.manifest.task == "edit":
            raise ApiError(
                400,
                f"The model {model.name} edits whole images. A mask needs a model to inpaint.",
                "invalid_value",
                param="mask",
            )
        order = _order(service, model, fields, image=image, mask=mask, alpha_mask=True)
        return await _answer(service, request, fields, order)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """All models."""
    service: ImageService = request.app.state.service
    data = [_model(model) for model in service.models.offered]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model}")
async def one_model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    service: ImageService = request.app.state.service
    found = service.models.by_name.get(model)
    if found is None:
        raise ApiError(404, "The model does not exist here.", "model_not_found", param="model")
    return _model(found)


def _model(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.served.created,
        "owned_by": "hipa-deploy",
    }


def _check_fields(service: ImageService, fields: OpenAiFields) -> None:
    """Refuse what OpenAI's API has and this service has not."""
    check_prompt_length(service, fields.prompt)
    check_quality(fields.output_format, fields.output_compression, BEST)
    if fields.response_format == "url":
        raise ApiError(
            400,
            "response_format: this service stores no images, so there are no URLs. Use b64_json, "
            "or POST /hipa/generate with Accept: image/png for the bytes themselves.",
            "invalid_value",
            param="response_format",
        )
    if fields.background == "transparent":
        raise ApiError(400, "background: images are opaque.", "invalid_value", param="background")
    if fields.stream or fields.partial_images:
        raise ApiError(
            400,
            "stream: images are made in one step and are not streamed.",
            "invalid_value",
            param="stream",
        )


def _order(service: ImageService, model: Model, fields: OpenAiFields, **from_image: Any) -> Order:
    height, width = size_of(fields.size)
    return Order(
        model=model,
        prompt=fields.prompt,
        seeds=seeds_from(service, fields.seed, fields.n or 1, "n"),
        height=height,
        width=width,
        format=fields.output_format,
        quality=fields.output_compression,
        **from_image,
    )


async def _answer(
    service: ImageService, request: Request, fields: OpenAiFields, order: Order
) -> dict[str, Any]:
    delivery = await deliver(service, request, order, OPENAI)
    return {
        "created": int(time.time()),
        "data": _images(delivery),
        "withheld": withheld_images(delivery),
        "background": "opaque",
        "output_format": fields.output_format,
        "size": f"{delivery.width}x{delivery.height}",
    }


def _images(delivery: Delivery) -> list[dict[str, Any]]:
    """Each image as base64, with the seed that makes it again: an addition of this service.

    Images that a safety checker withheld are missing: the field ``withheld`` has them.
    """
    images = []
    for file, parameters in zip(delivery.files, delivery.parameters, strict=True):
        encoded = base64.b64encode(file).decode()
        images.append({"b64_json": encoded, "seed": parameters["seed"]})
    return images
