"""This service's own API, for what OpenAI's lacks, and health and metrics."""

from __future__ import annotations

import base64
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from hipa_deploy.generate.refine.refiner import refine_settings
from hipa_deploy.serve.accept_header import NotAcceptedError, accepted_format
from hipa_deploy.serve.image_files import BEST, MEDIA_TYPES, Format
from hipa_deploy.serve.serve_metrics import CONTENT_TYPE
from hipa_deploy.serve.served import Model
from hipa_deploy.serve.service import Delivery, ImageService, Order
from hipa_deploy.serve.web.answering import (
    DirectRoute,
    check_prompt_length,
    check_quality,
    check_refines,
    check_steps,
    chosen_model,
    deliver,
    seeds_from,
    withheld_images,
)
from hipa_deploy.serve.web.api_errors import ApiError, error_response
from hipa_deploy.serve.web.openai_routes import form_schema, json_schema
from hipa_deploy.serve.web.request_body import Form, json_fields
from hipa_deploy.serve.web.schemas import (
    ControlFields,
    EditFields,
    GenerateFields,
    InpaintFields,
    OwnFields,
    RefineFields,
    UpscaleFields,
)

FieldsOfRoute = TypeVar("FieldsOfRoute", bound=OwnFields)

router = APIRouter(route_class=DirectRoute)


@router.post("/hipa/generate", openapi_extra=json_schema(GenerateFields))
async def generate(request: Request) -> Response:
    """Images from a prompt."""
    fields = _in_format(request, await json_fields(request, GenerateFields))
    return await _images_of(request, fields, "generate")


@router.post("/hipa/refine", openapi_extra=json_schema(RefineFields))
async def refine(request: Request) -> Response:
    """The final images of drafts: the same fields as of ``/hipa/generate``, in many steps."""
    service: ImageService = request.app.state.service
    fields = _in_format(request, await json_fields(request, RefineFields))
    model = _model(service, fields, "generate", fields.prompt)
    check_refines(model)
    settings = refine_settings(model.served.bundle, fields.steps, fields.guidance, fields.sampler)
    # Here and not of the fields: without a number it is the teacher's.
    check_steps(service, settings.steps)
    return await _images_of(request, fields, "generate", refine=settings)


@router.post("/hipa/edit", openapi_extra=form_schema(EditFields, "image"))
async def edit(request: Request) -> Response:
    """An image, edited as a prompt says."""
    async with Form(request, ["image"]) as form:
        fields = _in_format(request, form.fields(EditFields))
        image = form.file("image", required=True)
        return await _images_of(request, fields, "edit", image=image, strength=fields.strength)


@router.post("/hipa/inpaint", openapi_extra=form_schema(InpaintFields, "image", "mask"))
async def inpaint(request: Request) -> Response:
    """An image of which the part that is white in the mask is repainted."""
    async with Form(request, ["image", "mask"]) as form:
        fields = _in_format(request, form.fields(InpaintFields))
        image = form.file("image", required=True)
        mask = form.file("mask", required=True)
        return await _images_of(
            request,
            fields,
            "inpaint",
            image=image,
            mask=mask,
            feather=fields.feather,
            match=fields.match,
        )


@router.post("/hipa/control", openapi_extra=form_schema(ControlFields, "image"))
async def control(request: Request) -> Response:
    """Images from a prompt that follow a control image."""
    async with Form(request, ["image"]) as form:
        fields = _in_format(request, form.fields(ControlFields))
        image = form.file("image", required=True)
        return await _images_of(request, fields, "control", image=image, scale=fields.scale)


@router.post("/hipa/upscale", openapi_extra=form_schema(UpscaleFields, "image"))
async def upscale(request: Request) -> Response:
    """An image, enlarged by the model's factor."""
    service: ImageService = request.app.state.service
    async with Form(request, ["image"]) as form:
        fields = _in_format(request, form.fields(UpscaleFields))
        image = form.file("image", required=True)
        order = Order(
            model=_model(service, fields, "upscale", fields.prompt),
            prompt=fields.prompt,
            seeds=[0],
            image=image,
            overlap=fields.overlap,
            truncate=fields.truncate,
            prompt_weights=fields.prompt_weights,
            format=fields.output_format,
            quality=fields.output_compression,
        )
        return await _answer(service, request, order)


@router.get("/hipa/models")
async def models(request: Request) -> dict[str, Any]:
    """All models: what they are for, and what they take."""
    service: ImageService = request.app.state.service
    return {"models": [_described(model) for model in service.models.offered]}


@router.get("/health/live")
async def live(request: Request) -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Every bundle has made its first image."""
    service: ImageService = request.app.state.service
    if service.ready:
        return JSONResponse({"status": "ready"})
    return error_response(503, "The service is not ready.", "not_ready")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    service: ImageService = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _in_format(request: Request, fields: FieldsOfRoute) -> FieldsOfRoute:
    """The fields, with the format that the header Accept names where they name none.

    Raises:
        ApiError: the two contradict each other.

    """
    asked = fields.output_format if "output_format" in fields.model_fields_set else None
    accepted = _accepted(request, asked)
    if accepted is None:
        return fields
    return fields.model_copy(update={"output_format": accepted})


async def _images_of(request: Request, fields: GenerateFields, task: str, **more: Any) -> Response:
    service: ImageService = request.app.state.service
    order = Order(
        model=_model(service, fields, task, fields.prompt),
        prompt=fields.prompt,
        seeds=seeds_from(service, fields.seed, fields.count, "count"),
        height=fields.height,
        width=fields.width,
        truncate=fields.truncate,
        prompt_weights=fields.prompt_weights,
        format=fields.output_format,
        quality=fields.output_compression,
        **more,
    )
    return await _answer(service, request, order)


def _model(service: ImageService, fields: OwnFields, task: str, prompt: str) -> Model:
    """The model, once the fields that all requests share are checked."""
    check_prompt_length(service, prompt)
    check_quality(fields.output_format, fields.output_compression, BEST)
    return chosen_model(service, fields.model, [task])


async def _answer(service: ImageService, request: Request, order: Order) -> Response:
    """The bytes of one image where the client asks for an image, else JSON."""
    as_bytes = _accepted(request, order.format) is not None
    # Before any of them is made.
    if as_bytes and len(order.seeds) > 1:
        raise ApiError(
            400,
            "Several images do not fit into one answer as bytes. Ask for one, or for JSON.",
            "invalid_value",
            param="count",
        )
    delivery = await deliver(service, request, order)
    times = {
        "queue_ms": round(delivery.queue_ms, 3),
        "make_ms": round(delivery.make_ms, 3),
        "encode_ms": round(delivery.encode_ms, 3),
    }
    if as_bytes:
        timing = ", ".join(f"{name[:-3]};dur={value}" for name, value in times.items())
        headers = {"x-hipa-seed": str(order.seeds[0]), "server-timing": timing}
        media_type = MEDIA_TYPES[order.format]
        return Response(delivery.files[0], media_type=media_type, headers=headers)
    return JSONResponse(_described_delivery(delivery, order, times))


def _described_delivery(
    delivery: Delivery, order: Order, times: dict[str, float]
) -> dict[str, Any]:
    """All images with their parameters, for a client that asks for JSON."""
    images = []
    for file, parameters in zip(delivery.files, delivery.parameters, strict=True):
        images.append(
            {
                "b64_json": base64.b64encode(file).decode(),
                "seed": parameters["seed"],
                "parameters": parameters,
            }
        )
    return {
        "model": order.model.name,
        "width": delivery.width,
        "height": delivery.height,
        "output_format": order.format,
        "images": images,
        "withheld": withheld_images(delivery),
        **times,
        "batches": delivery.batches,
    }


def _described(model: Model) -> dict[str, Any]:
    served = model.served
    manifest = served.bundle.manifest
    axes = served.bundle.axes
    sizes = {}
    for side, own in (("height", manifest.one_step.height), ("width", manifest.one_step.width)):
        axis = axes.get(side)
        sizes[side] = {
            "own": own,
            "min": axis.min if axis else own,
            "max": axis.max if axis else own,
            "multiple": axis.multiple if axis else 1,
        }
    return {
        "id": model.name,
        "task": manifest.task,
        "adaptor": model.adaptor,
        **sizes,
        "strengths": [entry.strength for entry in manifest.strengths],
        "upscale": manifest.upscale,
        "controlnet": manifest.control.name if manifest.control else None,
        "refine": manifest.refine.settings.model_dump()
        if manifest.refine and served.refines
        else None,
        "backend": served.backend,
        "batch_sizes": list(served.batch_sizes) if served.batch_sizes else None,
        "ready": served.ready,
    }


def _accepted(request: Request, asked: Format | None) -> Format | None:
    """The format of the bytes that a client wants; None where it wants JSON.

    Raises:
        ApiError: it accepts images alone, and none in the format that it asks for.

    """
    try:
        return accepted_format(request.headers.getlist("accept"), asked)
    except NotAcceptedError as error:
        raise ApiError(
            400,
            f"output_format: {asked} is not what the header Accept names: "
            f"{', '.join(error.named)}. Leave one of the two out.",
            "invalid_value",
            param="output_format",
        ) from None
