"""What all routes that make images share: which model, the order's limits, errors as answers."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from hipa_deploy.errors import HipaError, RequestError
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.generate.noise import SEED_LIMIT
from hipa_deploy.serve.batcher import QueueFullError, StoppingError
from hipa_deploy.serve.served import Model
from hipa_deploy.serve.service import (
    Delivery,
    GoneError,
    ImageService,
    NotReadyError,
    Order,
    TimeLimitError,
)
from hipa_deploy.serve.web.api_errors import ApiError, queue_full
from hipa_deploy.serve.web.request_log import log
from hipa_deploy.serve.web.told_errors import OWN, Terms, told

# JSON numbers of JavaScript are exact up to 2**53. A drawn seed must survive such a client.
_DRAWN_SEEDS = 2**53
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)
_CLOSED = 499  # nobody reads it; nginx writes this number for a client that went away


class DirectRoute(APIRoute):
    """A route whose function gets the request itself, and whose answer is sent as it is.

    FastAPI would look for dependencies that there are none of, and check the answer, base64 and
    all, against its annotation.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""

        return self.answer

    async def answer(self, request: Request) -> Response:
        """What the function answers; what is no response yet becomes JSON."""
        content = await self.endpoint(request, **request.path_params)
        return content if isinstance(content, Response) else JSONResponse(content)


def chosen_model(service: ImageService, name: str | None, tasks: Sequence[str]) -> Model:
    """The model of a name; without a name the one that is for one of the tasks.

    Raises:
        ApiError: no such model, one for another task, or no name where several would fit.

    """
    if name is None:
        fitting = service.models.for_task(*tasks)
        if len(fitting) == 1:
            return fitting[0]
        if not fitting:
            raise ApiError(
                404,
                f"No model here is to {' or '.join(tasks)}. GET /hipa/models lists what there is.",
                "model_not_found",
                param="model",
            )
        names = ", ".join(model.name for model in fitting)
        raise ApiError(
            400,
            f"Name a model. For this request there are: {names}.",
            "missing_required_parameter",
            param="model",
        )
    model = service.models.by_name.get(name)
    if model is None:
        known = ", ".join(offered.name for offered in service.models.offered[:20])
        raise ApiError(
            404,
            f"The model does not exist here. There are: {known}.",
            "model_not_found",
            param="model",
        )
    if not model.is_offered:
        # The log says why: the reason names files.
        served = model.served
        raise ApiError(
            400,
            f"The model {name} is another adaptor of {served.name}, and {served.backend} takes "
            f"none as it was built here. Ask for {served.name}, or its owner: the log says why.",
            "invalid_value",
            param="model",
        )
    task = model.served.bundle.manifest.task
    if task not in tasks:
        raise ApiError(
            400,
            f"The model {model.name} is to {task}. This request is to {' or '.join(tasks)}. "
            f"Use POST /hipa/{task}.",
            "invalid_value",
            param="model",
        )
    return model


def check_refines(model: Model) -> None:
    """Refuse to refine with a model that cannot.

    Raises:
        ApiError: its bundle has no base model, or its backend does not run one.

    """
    served = model.served
    problem = None
    if served.bundle.manifest.refine is None:
        problem = "has no base model to refine with"
    elif not served.refines:
        problem = f"runs on {served.backend}, and no engine of its base model is built"
    if problem:
        raise ApiError(400, f"The model {model.name} {problem}.", "invalid_value", param="model")


def seeds_from(service: ImageService, first: int | None, count: int, param: str) -> range:
    """The seeds of an order; without a first one it is drawn.

    Raises:
        ApiError: more images than this service makes in a request, or more than seeds are left.

    """
    if count > service.limits.images:
        raise ApiError(
            400,
            f"{param}: {count} images are too many. "
            f"This service makes at most {service.limits.images} in a request.",
            "invalid_value",
            param=param,
        )
    if first is None:
        first = secrets.randbelow(_DRAWN_SEEDS - count)
    if first + count > SEED_LIMIT:
        raise ApiError(
            400,
            f"seed: the {count} images would have the seeds {first} to {first + count - 1}. "
            f"Expected at most {SEED_LIMIT - 1}. Choose a lower seed, or fewer images.",
            "invalid_value",
            param="seed",
        )
    return range(first, first + count)


def check_prompt_length(service: ImageService, prompt: str) -> None:
    """Refuse a prompt that is longer than this service reads.

    Raises:
        ApiError: it is.

    """
    most = service.limits.prompt
    if len(prompt) > most:
        raise ApiError(
            400,
            f"prompt: it has {len(prompt)} characters. Expected at most {most}.",
            "string_above_max_length",
            param="prompt",
        )


def check_steps(service: ImageService, steps: int) -> None:
    """Refuse to refine in more steps than this service allows.

    Raises:
        ApiError: they are more.

    """
    most = service.limits.steps
    if steps > most:
        raise ApiError(
            400,
            f"steps: {steps} steps are too many. This service refines in at most {most}.",
            "invalid_value",
            param="steps",
        )


def check_quality(output_format: str, compression: int, default: int) -> None:
    """Refuse a quality for a format that has none.

    Raises:
        ApiError: it is a PNG.

    """
    if output_format == "png" and compression != default:
        raise ApiError(
            400,
            "output_compression: a PNG has none. Ask for output_format jpeg or webp.",
            "invalid_value",
            param="output_compression",
        )


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Height and width of OpenAI's 'WIDTHxHEIGHT'; None for the bundle's own.

    Raises:
        ApiError: no such text.

    """
    if text in (None, "auto"):
        return None, None
    found = _SIZE.fullmatch(text or "")
    if found is None:
        raise ApiError(400, "size: expected WIDTHxHEIGHT or auto.", "invalid_value", param="size")
    return int(found[2]), int(found[1])


async def deliver(
    service: ImageService, request: Request, order: Order, terms: Terms = OWN
) -> Delivery:
    """Make the images of an order; every refusal becomes an answer.

    Args:
        service: makes them.
        request: that asks for them.
        order: what is asked for.
        terms: the words of the API that the request is of.

    Raises:
        ApiError: why there are none.

    """
    facts = request.scope["facts"]
    facts |= {"model": order.model.name, "images": len(order.seeds)}
    if request.app.state.log_prompts:
        facts["prompt"] = order.prompt

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    # From here on the queue knows of it: the service takes its place before anything else runs.
    request.scope["queued"]()
    try:
        delivery = await service.deliver(order, gone)
    except RequestError as error:
        raise told(error, order, terms) from None
    except NotFiniteError as error:
        log("not finite", logging.ERROR, model=order.model.name, reason=str(error))
        words = f"A network of {order.model.name} gave NaN or infinity. Nothing was made."
        raise ApiError(500, words, "not_finite") from None
    except HipaError as error:
        # Only the log names files: what failed is the owner's business, and not who asked for it.
        log("backend failed", logging.ERROR, model=order.model.name, reason=str(error))
        raise ApiError(500, f"{order.model.name} failed. Try again.", "backend_failed") from None
    except NotReadyError:
        raise ApiError(
            503,
            "The service is loading its models. Try again soon.",
            "not_ready",
            headers={"retry-after": "5"},
        ) from None
    except StoppingError:
        raise ApiError(
            503, "The service is stopping.", "stopping", headers={"retry-after": "5"}
        ) from None
    except QueueFullError as error:
        raise queue_full(error.retry_after) from None
    except TimeLimitError:
        raise ApiError(
            504,
            f"The images were not ready after {service.limits.seconds:g} seconds.",
            "timeout",
        ) from None
    except GoneError:
        raise ApiError(_CLOSED, "The client went away.", "client_closed") from None
    if delivery.flagged:
        facts["withheld"] = len(delivery.flagged)
    if not delivery.files:
        # The code of OpenAI's images API for images that its own filter withholds.
        reason = delivery.flagged[0].reason
        raise ApiError(
            400, f"Every image was withheld: {reason}.", "moderation_blocked", param="prompt"
        )
    facts |= {
        "queue_ms": round(delivery.queue_ms, 2),
        "make_ms": round(delivery.make_ms, 2),
        "encode_ms": round(delivery.encode_ms, 2),
        "batches": delivery.batches[:20],
    }
    return delivery


def withheld_images(delivery: Delivery) -> list[dict[str, Any]]:
    """The images of an order that a safety checker withheld, with seed and reason."""
    return [{"seed": one.seed, "reason": one.reason} for one in delivery.flagged]
