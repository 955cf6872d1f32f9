"""This service's own API: seeds, sizes, strengths, masks, upscaling, bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.example_source import example_image, example_mask
from hipa_deploy.images.png import read_parameters
from tests.served import Server

PROMPT = "a green pear"
IMAGE_HWC = example_image(32, 32, number=3)
MASK_HW = example_mask(32, 32)
Bundles = dict[str, Bundle]


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def png(image: np.ndarray) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return ("a.png", buffer.getvalue(), "image/png")


def images(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(image["b64_json"]) for image in answer.json()["images"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def test_the_bytes_are_those_of_the_command(http: httpx.Client, bundles: Bundles, tmp_path) -> None:
    order = {"prompt": PROMPT, "model": "tiny", "seed": 2**63 - 1}
    answer = http.post("/hipa/generate", json=order, headers={"accept": "image/*"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-hipa-seed"] == str(2**63 - 1)
    assert "make;dur=" in answer.headers["server-timing"]
    (tmp_path / "a.png").write_bytes(answer.content)
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        result = pipe(PROMPT, seed=2**63 - 1)
    assert read_parameters(tmp_path / "a.png") == result.parameters[0]
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels, result.images_BHWC[0])


def images_made(http: httpx.Client) -> str:
    """What the metrics say of the model 'tiny'."""
    lines = http.get("/metrics").text.splitlines()
    return next(line for line in lines if line.startswith('hipa_images_total{model="tiny"}'))


def test_several_images_are_json(http: httpx.Client) -> None:
    order = {"prompt": PROMPT, "model": "tiny", "seed": 5, "count": 3, "height": 32, "width": 32}
    answer = http.post("/hipa/generate", json=order)
    assert [image["seed"] for image in answer.json()["images"]] == [5, 6, 7]
    assert len(images(answer)) == len(answer.json()["batches"]) == 3
    before = images_made(http)
    refused = http.post("/hipa/generate", json=order, headers={"accept": "image/png"})
    assert refused.json()["error"]["param"] == "count"
    assert images_made(http) == before, "refused before they are made"


@pytest.mark.parametrize(
    ("accept", "fields", "kind"),
    [
        ("image/png", {}, "PNG"),
        ("image/webp", {}, "WEBP"),
        ("image/jpeg", {}, "JPEG"),
        ("IMAGE/WebP", {"output_format": None}, "WEBP"),
        ("image/webp", {"output_compression": 80}, "WEBP"),
        ("image/*", {}, "PNG"),
        ("image/*", {"output_format": "jpeg"}, "JPEG"),
        ("image/avif, image/*, image/webp", {}, "WEBP"),
        ("image/png;q=0.5, image/jpeg", {}, "JPEG"),
        ("image/jpeg;q=0, image/png", {}, "PNG"),
        ("*/*, image/webp", {}, "WEBP"),
        ("image/png, image/webp", {"output_format": "webp"}, "WEBP"),
    ],
)
def test_an_accepted_format_is_that_of_the_bytes(
    http: httpx.Client, accept: str, fields: dict[str, object], kind: str
) -> None:
    order = {"prompt": PROMPT, "model": "tiny", "seed": 5, **fields}
    answer = http.post("/hipa/generate", json=order, headers={"accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    assert Image.open(io.BytesIO(answer.content)).format == kind


def test_a_form_is_answered_in_an_accepted_format(http: httpx.Client) -> None:
    data = {"prompt": PROMPT, "seed": "5"}
    files = {"image": png(IMAGE_HWC)}
    for path in ("edit", "upscale", "control"):
        fields = {"prompt": PROMPT} if path == "upscale" else data
        answer = http.post(
            f"/hipa/{path}", data=fields, files=files, headers={"accept": "image/webp"}
        )
        assert Image.open(io.BytesIO(answer.content)).format == "WEBP"


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [
        ("*/*", "png"),
        ("text/html", "png"),
        ("application/json, image/webp;q=0.5", "png"),
        ("image/png, */*;q=0.1", "webp"),
    ],
)
def test_json_for_who_accepts_no_such_image(
    http: httpx.Client, accept: str, output_format: str
) -> None:
    order = {"prompt": PROMPT, "model": "tiny", "seed": 5, "output_format": output_format}
    answer = http.post("/hipa/generate", json=order, headers={"accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output_format"] == output_format


def test_a_format_that_is_not_accepted_is_refused(http: httpx.Client) -> None:
    order = {"prompt": PROMPT, "model": "tiny", "output_format": "webp"}
    before = images_made(http)
    answer = http.post("/hipa/generate", json=order, headers={"accept": "image/png, image/jpeg"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("output_format", "invalid_value")
    assert error["message"] == (
        "output_format: webp is not what the header Accept names: image/png, image/jpeg. "
        "Leave one of the two out."
    )
    assert images_made(http) == before, "refused before they are made"
    # A PNG has no quality, whoever names it.
    order = {"prompt": PROMPT, "model": "tiny", "output_compression": 80}
    answer = http.post("/hipa/generate", json=order, headers={"accept": "image/png"})
    assert answer.json()["error"]["param"] == "output_compression"


def test_a_prompt_that_is_too_long_may_be_cut(http: httpx.Client) -> None:
    order = {"prompt": "pear " * 80, "model": "tiny", "seed": 5}
    assert http.post("/hipa/generate", json=order).status_code == 400
    answer = http.post("/hipa/generate", json={**order, "truncate": True})
    assert answer.json()["images"][0]["parameters"]["truncate"] is True


@pytest.mark.parametrize("strength", [0.75, 0.5])
def test_edits_of_several_strengths(http: httpx.Client, bundles: Bundles, strength: float) -> None:
    data = {"prompt": PROMPT, "seed": "5", "strength": str(strength)}
    answer = http.post("/hipa/edit", data=data, files={"image": png(IMAGE_HWC)})
    with OneStepPipeline.load(bundles["tiny-edit"].root, "onnxruntime") as pipe:
        expected = pipe.edit(IMAGE_HWC, PROMPT, strength=strength, seed=5)
    np.testing.assert_array_equal(images(answer)[0], expected.images_BHWC[0])
    assert answer.json()["images"][0]["parameters"] == expected.parameters[0]


def test_white_is_repainted(http: httpx.Client, bundles: Bundles) -> None:
    files = {"image": png(IMAGE_HWC), "mask": png((MASK_HW * 255).astype(np.uint8))}
    data = {"prompt": PROMPT, "seed": "5", "feather": "2"}
    answer = http.post("/hipa/inpaint", data=data, files=files)
    with OneStepPipeline.load(bundles["tiny-inpaint"].root, "onnxruntime") as pipe:
        expected = pipe.inpaint(IMAGE_HWC, MASK_HW, PROMPT, seed=5, feather=2).images_BHWC[0]
    np.testing.assert_array_equal(images(answer)[0], expected)


def test_a_control_image_is_followed(http: httpx.Client, bundles: Bundles) -> None:
    files = {"image": png(IMAGE_HWC)}
    answers = {}
    with OneStepPipeline.load(bundles["tiny-control"].root, "onnxruntime") as pipe:
        for scale in ("0", "0.75", "2", None):
            data = {"prompt": PROMPT, "seed": "5"}
            if scale is not None:
                data["scale"] = scale
            answer = http.post("/hipa/control", data=data, files=files)
            expected = pipe.control(IMAGE_HWC, PROMPT, scale=float(scale or 1), seed=5)
            (answers[scale],) = images(answer)
            np.testing.assert_array_equal(answers[scale], expected.images_BHWC[0])
            assert answer.json()["images"][0]["parameters"] == expected.parameters[0]
    assert len({image.tobytes() for image in answers.values()}) == 4
    # Another picture gives another image, and at scale 0 the same one.
    other = {"image": png(example_image(32, 32, number=4))}
    for scale, is_same in (("0", True), ("0.75", False)):
        data = {"prompt": PROMPT, "seed": "5", "scale": scale}
        (image,) = images(http.post("/hipa/control", data=data, files=other))
        assert np.array_equal(image, answers[scale]) == is_same


def test_several_images_of_a_control_image(http: httpx.Client) -> None:
    data = {"prompt": PROMPT, "seed": "5", "count": "3", "height": "32", "width": "32"}
    answer = http.post("/hipa/control", data=data, files={"image": png(IMAGE_HWC)})
    assert [image["seed"] for image in answer.json()["images"]] == [5, 6, 7]
    assert len(images(answer)) == 3
    as_bytes = http.post(
        "/hipa/control",
        data={"prompt": PROMPT, "seed": "6"},
        files={"image": png(IMAGE_HWC)},
        headers={"accept": "image/png"},
    )
    assert as_bytes.headers["x-hipa-seed"] == "6"
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(as_bytes.content))), images(answer)[1]
    )


def test_a_model_for_control_images_is_for_nothing_else(http: httpx.Client) -> None:
    """Without a picture it would be another model; as an edit it would draw over the picture."""
    order = {"prompt": PROMPT, "model": "tiny-control"}
    for path in ("/v1/images/generations", "/hipa/generate", "/hipa/refine"):
        answer = http.post(path, json=order)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("model", "invalid_value")
        assert error["message"] == (
            "The model tiny-control is to control. This request is to generate. "
            "Use POST /hipa/control."
        )


def test_an_image_of_several_tiles(http: httpx.Client, bundles: Bundles) -> None:
    image = example_image(20, 36, number=1)
    answer = http.post("/hipa/upscale", data={"overlap": "4"}, files={"image": png(image)})
    with OneStepPipeline.load(bundles["tiny-upscale"].root, "onnxruntime") as pipe:
        expected = pipe.upscale(image, overlap=4)
    np.testing.assert_array_equal(images(answer)[0], expected.images_BHWC[0])
    assert answer.json()["images"][0]["parameters"] == expected.parameters[0]
    assert len(answer.json()["batches"]) > 1


def test_an_image_of_more_tiles_than_the_queue_holds(http: httpx.Client, server: Server) -> None:
    large = np.zeros((200, 400, 3), np.uint8)
    answer = http.post("/hipa/upscale", files={"image": png(large)})
    assert answer.status_code == 400
    assert "tiles" in answer.json()["error"]["message"]
    assert 'hipa_queue_images{bundle="tiny-upscale"} 0.0' in http.get("/metrics").text


@pytest.mark.parametrize("path", ["/health/ready", "/", "/v1/models", "/nothing"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    """Monitors and `curl -I` ask so, and HTTP has every server know it."""
    head = http.head(path)
    whole = http.get(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.content == b""
    assert http.head("/hipa/generate").status_code == 405


def test_a_path_with_a_slash_too_many_is_unknown(http: httpx.Client) -> None:
    """A redirection would lead from a proxy with TLS to plain HTTP, and the key with it."""
    answer = http.post("/v1/images/generations/", json={"prompt": PROMPT, "model": "tiny"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_models_say_what_they_take(http: httpx.Client) -> None:
    models = {model["id"]: model for model in http.get("/hipa/models").json()["models"]}
    assert models["tiny"]["task"] == "generate"
    assert models["tiny:half"]["adaptor"] == "half"
    assert models["tiny-edit"]["strengths"] == [0.75, 0.5]
    assert models["tiny-control"]["task"] == "control"
    assert models["tiny-control"]["controlnet"] == "tiny-lines"
    assert models["tiny-control"]["strengths"] == []
    assert models["tiny-edit"]["controlnet"] is None
    assert models["tiny"]["height"] == {"own": 32, "min": 32, "max": 32, "multiple": 1}
    assert models["tiny"]["batch_sizes"][0] == 1
    assert "/" not in str(models)


def test_the_openapi_document_has_every_route(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("/v1/images/generations", "/v1/images/edits", "/hipa/upscale", "/metrics"):
        assert path in paths
    form = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert {"image", "mask", "prompt"} <= form["schema"]["properties"].keys()
    # What a client made of the document must ask for.
    needed = {
        "/v1/images/generations": {"prompt"},
        "/v1/images/edits": {"prompt", "image"},
        "/hipa/edit": {"prompt", "image"},
        "/hipa/inpaint": {"prompt", "image", "mask"},
        "/hipa/upscale": {"image"},
        "/hipa/control": {"prompt", "image"},
    }
    for path, names in needed.items():
        body = paths[path]["post"]["requestBody"]
        (content,) = body["content"].values()
        assert body["required"]
        assert set(content["schema"]["required"]) == names, path
    # References lead to what is in the document, and not in the fields' own schema.
    assert "#/$defs" not in http.get("/openapi.json").text
