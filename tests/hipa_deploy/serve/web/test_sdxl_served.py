"""Bundles of a tiny SDXL behind a running ``hipa-serve``: tasks, adaptors, batches, refining."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.example_source import example_image, example_mask
from tests.sdxl_samples import BAKED, NAME, sdxl_bundles
from tests.served import Server, add_swaps, running

PROMPT = "a red apple!!"  # SDXL's two tokenizers read exclamation marks differently
IMAGE_HWC = example_image(64, 64, number=3)
MASK_HW = example_mask(64, 64)
Bundles = dict[str, Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    made = sdxl_bundles(tmp_path_factory.mktemp("sdxl"))
    del made[BAKED]  # a set of its own would only take time to load
    add_swaps(made[NAME], half=0.5)
    return made


@pytest.fixture(scope="module")
def server(bundles: Bundles) -> Iterator[Server]:
    roots = [str(bundle.root) for bundle in bundles.values()]
    with running(*roots, "--backend", "onnxruntime") as it:
        yield it
        assert [line for line in it.lines if line["event"] == "bug"] == []
        assert it.other == []


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as it:
        yield it


@pytest.fixture(scope="module")
def pipe(bundles: Bundles) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(bundles[NAME].root, "onnxruntime") as loaded:
        yield loaded


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def images(answer: httpx.Response) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [pixels(image["b64_json"]) for image in answer.json()["images"]]


def png(image: np.ndarray) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return ("a.png", buffer.getvalue(), "image/png")


def test_an_image_does_not_depend_on_its_company(
    client: openai.OpenAI, pipe: OneStepPipeline, server: Server
) -> None:
    """Two prompts, eight seeds and two adaptors at once: each the image of a call alone."""
    orders = []
    for number in range(16):
        adaptor = "half" if number % 4 == 3 else None
        orders.append((f"{PROMPT} {number % 2}", number % 8, adaptor))
    expected = {}
    for adaptor in (None, "half"):
        pipe.swap_adaptor(adaptor)
        for order in orders:
            if order[2] == adaptor:
                expected[order] = pipe(order[0], seed=order[1]).images_BHWC[0]
    pipe.swap_adaptor(None)

    def ask(order: tuple[str, int, str | None]) -> np.ndarray:
        prompt, seed, adaptor = order
        model = f"{NAME}:{adaptor}" if adaptor else NAME
        answer = client.images.generate(prompt=prompt, model=model, extra_body={"seed": seed})
        return pixels(answer.data[0].b64_json)

    seen = len(server.lines)
    with ThreadPoolExecutor(16) as pool:
        for order, image_HWC in zip(orders, pool.map(ask, orders), strict=True):
            np.testing.assert_array_equal(image_HWC, expected[order])
    sizes = server.wait_for("ready", bundle=NAME)["batch_sizes"]
    made = [line["batches"][0] for line in server.lines[seen:] if line.get("batches")]
    assert set(made) <= set(sizes)
    assert len({image_HWC.tobytes() for image_HWC in expected.values()}) == len(set(orders))


@pytest.mark.parametrize("adaptor", [None, "half"])
def test_a_draft_is_refined(http: httpx.Client, pipe: OneStepPipeline, adaptor: str | None) -> None:
    """The base model's image is the same whichever adaptor made the draft."""
    model = f"{NAME}:{adaptor}" if adaptor else NAME
    order = {"prompt": PROMPT, "model": model, "seed": 5, "count": 2, "steps": 3}
    answer = http.post("/hipa/refine", json=order)
    expected = pipe.refine(pipe(PROMPT, seed=5, count=2), 3)
    for image_HWC, expected_HWC in zip(images(answer), expected.images_BHWC, strict=True):
        np.testing.assert_array_equal(image_HWC, expected_HWC)
    parameters = answer.json()["images"][0]["parameters"]
    assert parameters["refine"] == expected.parameters[0]["refine"]


def test_an_edit_at_each_strength(http: httpx.Client, bundles: Bundles) -> None:
    made = []
    with OneStepPipeline.load(bundles["sdxl-tiny-edit"].root, "onnxruntime") as editing:
        for strength in (0.75, 0.5):
            data = {"prompt": PROMPT, "seed": "5", "strength": str(strength)}
            answer = http.post("/hipa/edit", data=data, files={"image": png(IMAGE_HWC)})
            expected = editing.edit(IMAGE_HWC, PROMPT, strength=strength, seed=5).images_BHWC[0]
            made += images(answer)
            np.testing.assert_array_equal(made[-1], expected)
    assert np.any(made[0] != made[1])


def test_an_inpainting(client: openai.OpenAI, bundles: Bundles) -> None:
    alpha_HW = np.where(MASK_HW > 0, 0, 255).astype(np.uint8)
    answer = client.images.edit(
        image=png(IMAGE_HWC),
        mask=png(np.dstack([IMAGE_HWC, alpha_HW])),
        prompt=PROMPT,
        model="sdxl-tiny-inpaint",
        extra_body={"seed": 5},
    )
    with OneStepPipeline.load(bundles["sdxl-tiny-inpaint"].root, "onnxruntime") as inpainting:
        expected = inpainting.inpaint(IMAGE_HWC, MASK_HW, PROMPT, seed=5).images_BHWC[0]
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected)


def test_an_upscaling_in_tiles(http: httpx.Client, bundles: Bundles) -> None:
    small = example_image(40, 72, number=1)
    with OneStepPipeline.load(bundles["sdxl-tiny-upscale"].root, "onnxruntime") as upscaling:
        expected = upscaling.upscale(small, PROMPT, overlap=8).images_BHWC[0]
    answer = http.post(
        "/hipa/upscale", data={"prompt": PROMPT, "overlap": "8"}, files={"image": png(small)}
    )
    np.testing.assert_array_equal(images(answer)[0], expected)


def test_models_say_what_they_take(http: httpx.Client) -> None:
    models = {model["id"]: model for model in http.get("/hipa/models").json()["models"]}
    assert models[NAME]["refine"] == {"sampler": "ddim", "steps": 7, "guidance": 3.5}
    assert models["sdxl-tiny-edit"]["refine"] is None
    assert models[NAME]["height"]["own"] == 64
