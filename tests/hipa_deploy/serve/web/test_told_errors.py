"""What the runtime refuses, over HTTP: the field, what is expected and what the client can do."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.bundle.manifest import Axis
from hipa_deploy.errors import RequestError
from hipa_deploy.generate.prompt_weights import LARGEST, weigh_context
from hipa_deploy.generate.prompts import BakedPrompts
from hipa_deploy.generate.refine.drafts import check_swap
from hipa_deploy.images.example_source import example_image
from hipa_deploy.marks.image_file import check_side_of_format, encode_image
from hipa_deploy.marks.watermark import check_side
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import Order
from hipa_deploy.serve.web.api_errors import ApiError
from hipa_deploy.serve.web.told_errors import OPENAI, OWN, told
from tests.served import Server

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
GENERATE = "/hipa/generate"
OWNER = "The owner of the model can "
LONG = "pear " * 30  # 122 tokens
IMAGE_HWC = example_image(32, 32, number=1)
WIDE_HWC = example_image(32, 96, number=1)
NOTHING_HW = np.zeros((32, 32), np.uint8)
# White at the left edge, which the centre crop to a square cuts away.
EDGE_HW = np.zeros((32, 96), np.uint8)
EDGE_HW[:, :4] = 255


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def refusal(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has nothing of a command line in it."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    assert "--" not in error["message"]
    assert "True" not in error["message"]
    assert "bundle" not in error["message"]
    # The owner's part stands at the end.
    assert OWNER not in error["message"] or error["message"].rpartition(OWNER)[2].count(".") == 1
    return error


def png(pixels: np.ndarray) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ("a.png", buffer.getvalue(), "image/png")


@pytest.mark.parametrize(
    ("path", "fields", "param", "code", "words"),
    [
        (
            GENERATIONS,
            {"size": "1024x512"},
            "size",
            "invalid_value",
            "size: 1024x512 is not a size of the model tiny. Expected 32x32, or auto. "
            f"{OWNER}export it for other sizes.",
        ),
        (
            GENERATE,
            {"height": 1024, "width": 32},
            "height",
            "invalid_value",
            "height: 1024 is not a height of the model tiny. Expected a height of 32 and a width "
            f"of 32. {OWNER}export it for other sizes.",
        ),
        (GENERATE, {"width": 40}, "width", "invalid_value", "width: 40 is not a width of"),
        (GENERATIONS, {"prompt": LONG}, "prompt", "context_length_exceeded", "the model reads 77"),
        (GENERATE, {"prompt": LONG}, "prompt", "context_length_exceeded", "the model reads 77"),
        (GENERATIONS, {"prompt": ""}, "prompt", "invalid_value", "at least 1 character"),
        (GENERATE, {"prompt": "\ud800"}, "prompt", "invalid_value", "prompt: "),
        (
            GENERATIONS,
            {"prompt": "a" * 4001},
            "prompt",
            "string_above_max_length",
            "Expected at most 4000",
        ),
        (
            GENERATE,
            {"prompt": "a (red:1.2.3) pear", "prompt_weights": True},
            "prompt",
            "invalid_prompt",
            "Expected a number, as in (word:1.3)",
        ),
        (
            GENERATE,
            {"prompt": f"a (red:{LARGEST * 2}) pear", "prompt_weights": True},
            "prompt",
            "invalid_prompt",
            f"Expected at most {LARGEST}",
        ),
        (
            GENERATIONS,
            {"seed": 2**63 - 1, "n": 2},
            "seed",
            "invalid_value",
            "Expected at most 9223372036854775807. Choose a lower seed, or fewer images.",
        ),
        (GENERATE, {"seed": 2**63 - 1, "count": 2}, "seed", "invalid_value", "the 2 images"),
    ],
)
def test_fields_of_json(
    http: httpx.Client, path: str, fields: dict, param: str, code: str, words: str
) -> None:
    order = {"prompt": "a", "model": "tiny", **fields}
    # As ASCII: the standard library writes half a pair of surrogates, and httpx does not.
    error = refusal(http.post(path, json=order) if order["prompt"].isascii() else half(http, order))
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]


def half(http: httpx.Client, order: dict) -> httpx.Response:
    """The answer to an order whose prompt is half a pair of surrogates."""
    content = b'{"prompt": "\\ud800", "model": "%s"}' % order["model"].encode()
    return http.post(GENERATE, content=content, headers={"content-type": "application/json"})


def test_only_where_there_is_such_a_field_a_prompt_can_be_cut(http: httpx.Client) -> None:
    order = {"prompt": LONG, "model": "tiny"}
    owners = f"{OWNER}export it to read 154 tokens."
    message = refusal(http.post(GENERATIONS, json=order))["message"]
    assert message.endswith(f"would be cut. Shorten it. {owners}")
    message = refusal(http.post(GENERATE, json=order))["message"]
    assert message.endswith(f'A request with "truncate": true has its prompt cut. {owners}')
    assert http.post(GENERATE, json={**order, "truncate": True}).status_code == 200

    parts = {"prompt": (None, LONG), "image": png(IMAGE_HWC)}
    message = refusal(http.post("/hipa/edit", files=parts))["message"]
    assert message.endswith(f"A request with truncate=true has its prompt cut. {owners}")
    parts["truncate"] = (None, "true")
    assert http.post("/hipa/edit", files=parts).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "files", "param", "code", "words"),
    [
        (
            "/hipa/edit",
            {"strength": "0.3"},
            {"image": IMAGE_HWC},
            "strength",
            "invalid_value",
            "strength 0.3 is not one of this model's. Expected one of: 0.75, 0.5. "
            f"{OWNER}export it for other strengths.",
        ),
        (
            EDITS,
            {"model": "tiny-edit", "size": "64x64"},
            {"image": IMAGE_HWC},
            "size",
            "invalid_value",
            "size: 64x64 is not a size of the model tiny-edit. Expected 32x32, or auto.",
        ),
        (
            "/hipa/control",
            {"scale": "3"},
            {"image": IMAGE_HWC},
            "scale",
            "invalid_value",
            "less than or equal to 2",
        ),
        (
            "/hipa/inpaint",
            {"feather": "5000"},
            {"image": IMAGE_HWC, "mask": NOTHING_HW},
            "feather",
            "invalid_value",
            "less than or equal to 4096",
        ),
        (
            "/hipa/upscale",
            {"overlap": "17"},
            {"image": IMAGE_HWC},
            "overlap",
            "invalid_value",
            "Expected 0 to 16",
        ),
        (
            "/hipa/upscale",
            {},
            {"image": np.zeros((400, 400, 3), np.uint8)},
            "image",
            "image_too_large",
            "Expected at most 64. Make it smaller.",
        ),
        (
            "/hipa/inpaint",
            {},
            {"image": IMAGE_HWC, "mask": NOTHING_HW},
            "mask",
            "invalid_mask",
            "no pixel is white",
        ),
        (
            "/hipa/inpaint",
            {},
            {"image": IMAGE_HWC, "mask": NOTHING_HW + 255},
            "mask",
            "invalid_mask",
            "every pixel is white",
        ),
        (
            "/hipa/inpaint",
            {},
            {"image": IMAGE_HWC, "mask": EDGE_HW},
            "mask",
            "invalid_mask",
            "Expected a mask of the image's size",
        ),
        (
            "/hipa/inpaint",
            {},
            {"image": WIDE_HWC, "mask": EDGE_HW},
            "mask",
            "invalid_mask",
            "Crop image and mask first",
        ),
        (
            EDITS,
            {"model": "tiny-inpaint"},
            {"image": IMAGE_HWC},
            "image",
            "invalid_mask",
            "no alpha channel",
        ),
        (
            EDITS,
            {"model": "tiny-inpaint"},
            {"image": np.dstack([WIDE_HWC, 255 - EDGE_HW])},
            "image",
            "invalid_mask",
            "Crop image and mask first",
        ),
        (
            EDITS,
            {"model": "tiny-inpaint"},
            {"image": WIDE_HWC, "mask": np.dstack([WIDE_HWC, EDGE_HW * 0])},
            "mask",
            "invalid_mask",
            "transparent everywhere",
        ),
        (
            EDITS,
            {"model": "tiny-inpaint"},
            {"image": WIDE_HWC, "mask": np.dstack([WIDE_HWC, EDGE_HW * 0 + 255])},
            "mask",
            "invalid_mask",
            "nowhere fully transparent",
        ),
    ],
)
def test_fields_of_forms(
    http: httpx.Client, path: str, fields: dict, files: dict, param: str, code: str, words: str
) -> None:
    parts: dict[str, Any] = {name: (None, value) for name, value in fields.items()}
    parts |= {"prompt": (None, "a")}
    parts |= {name: png(pixels) for name, pixels in files.items()}
    error = refusal(http.post(path, files=parts))
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"GIF89a" + bytes(50), "invalid_image_format"),
        (png(WIDE_HWC)[1][:300], "image_parse_error"),
    ],
)
def test_a_mask_that_cannot_be_read(http: httpx.Client, content: bytes, code: str) -> None:
    files = {"image": png(WIDE_HWC), "mask": ("m.png", content, "image/png")}
    error = refusal(http.post("/hipa/inpaint", data={"prompt": "a"}, files=files))
    assert (error["param"], error["code"]) == ("mask", code)
    assert "the mask" in error["message"]


def answer_to(raised: pytest.ExceptionInfo[RequestError], order: Order, terms: Any) -> ApiError:
    """The answer to an error, which has nothing of a command line in it."""
    answer = told(raised.value, order, terms)
    assert answer.status_code == 400
    assert "--" not in answer.message
    assert "bundle" not in answer.message
    return answer


@pytest.fixture
def order(bundles: dict[str, Bundle]) -> Order:
    model = Models([f"m={bundles['tiny'].root}"]).by_name["m"]
    return Order(model=model, prompt="a", seeds=[1], height=40, width=48)


def test_the_sizes_of_a_model_that_has_a_range(order: Order) -> None:
    bundle = order.model.served.bundle
    bundle.__dict__["axes"] = {"height": Axis(min=32, opt=32, max=64, multiple=16)}
    with pytest.raises(RequestError) as raised:
        latent_shape(bundle, 40, 32)
    answer = answer_to(raised, order, OPENAI)
    assert answer.param == "size"
    assert answer.message.startswith(
        "size: 48x40 is not a size of the model m. Expected WIDTHxHEIGHT with a width of 32 and "
        "a height of 32 to 64 in steps of 16, or auto."
    )
    answer = answer_to(raised, order, OWN)
    assert answer.param == "height"
    assert "a height of 32 to 64 in steps of 16 and a width of 32." in answer.message


def test_a_prompt_that_is_not_in_the_set(order: Order, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    np.save(tmp_path / "contexts.npy", np.zeros((2, 2, 3), np.float16))
    source = BakedPrompts(tmp_path / "prompts.txt", tmp_path / "contexts.npy")
    with pytest.raises(RequestError, match="export without --prompts") as raised:
        source.prepare(["a cab"], truncate=False)
    answer = answer_to(raised, order, OPENAI)
    assert (answer.param, answer.code) == ("prompt", "prompt_not_in_set")
    assert answer.message == (
        "'a cab' is not one of the 2 prompts that this model knows; the nearest is 'a cat'. "
        f"Choose one of them. {OWNER}export it for every prompt."
    )
    with pytest.raises(RequestError, match="Leave out that option") as raised:
        source.reads_weights(True)
    answer = answer_to(raised, order, OWN)
    assert answer.param == "prompt_weights"
    assert "Expected false, or nothing." in answer.message


def test_an_image_that_is_too_small_for_the_watermark(order: Order) -> None:
    with pytest.raises(RequestError, match="Leave the watermark out") as raised:
        check_side(32, 512)
    answer = answer_to(raised, order, OPENAI)
    assert (answer.param, answer.code) == ("size", "image_too_small")
    assert answer.message.endswith(f"Ask for a larger image. {OWNER}export it without a watermark.")
    assert answer_to(raised, order, OWN).param == "height"
    with pytest.raises(RequestError) as raised:
        check_side(512, 32, "image")
    assert answer_to(raised, order, OWN).param == "image"


def test_an_image_that_a_format_cannot_hold(order: Order) -> None:
    with pytest.raises(RequestError, match=r"Write PNG\.") as raised:
        check_side_of_format("webp", 20_000, 20)
    answer = answer_to(raised, order, OPENAI)
    assert answer.param == "output_format"
    assert answer.message.endswith("Ask for a PNG.")
    with pytest.raises(RequestError, match="a JPEG holds") as raised:
        encode_image(IMAGE_HWC, {"prompt": "a" * 70_000}, "jpeg")
    assert answer_to(raised, order, OWN).param == "output_format"


def test_weights_that_cancel_out(order: Order) -> None:
    context_BLD = np.ones((1, 2, 3), np.float32)
    with pytest.raises(RequestError) as raised:
        weigh_context(context_BLD, np.asarray([[1.0, -1.0]], np.float32), 2)
    answer = answer_to(raised, order, OWN)
    assert (answer.param, answer.code) == ("prompt", "invalid_prompt")
    assert answer.message.endswith("Choose weights nearer to 1.")


def test_an_adaptor_whose_drafts_are_not_refined(order: Order) -> None:
    swap: Any = SimpleNamespace(root="a", manifest=SimpleNamespace(loras=("another",)))
    with pytest.raises(RequestError, match="Swap it out") as raised:
        check_swap(order.model.served.bundle, swap)
    answer = answer_to(raised, order, OWN)
    assert answer.param == "model"
    assert "Ask for the model without the adaptor." in answer.message


def test_an_error_that_is_no_fields_names_none_and_no_folder(order: Order) -> None:
    root = order.model.served.bundle.root
    answer = told(RequestError(f"{root}/x is odd."), order, OWN)
    assert answer.param is None
    assert answer.message == "m/x is odd."
