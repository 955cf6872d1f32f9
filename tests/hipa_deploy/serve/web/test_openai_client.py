"""The client of the package ``openai`` against a running ``hipa-serve``."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.example_source import example_image, example_mask
from tests.served import Server

PROMPT = "a green pear"
Bundles = dict[str, Bundle]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


def pixels(image: openai.types.Image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))))


def png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_models_are_bundles_and_their_adaptors(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [
        "tiny", "tiny:double", "tiny:half", "tiny-control", "tiny-edit", "tiny-inpaint",
        "tiny-upscale",
    ]  # fmt: skip
    assert client.models.retrieve("tiny:half").owned_by == "hipa-deploy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")


def test_images_are_those_of_the_pipeline(client: openai.OpenAI, bundles: Bundles) -> None:
    answer = client.images.generate(prompt=PROMPT, model="tiny", n=3, extra_body={"seed": 5})
    assert answer.size == "32x32"
    assert [image.seed for image in answer.data] == [5, 6, 7]
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        expected = [pipe(PROMPT, seed=seed).images_BHWC[0] for seed in (5, 6, 7)]
    for image, image_HWC in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(image), image_HWC)


def test_a_seed_that_was_drawn_makes_the_image_again(client: openai.OpenAI) -> None:
    first = client.images.generate(prompt=PROMPT).data[0]
    other = client.images.generate(prompt=PROMPT).data[0]
    again = client.images.generate(prompt=PROMPT, extra_body={"seed": first.seed}).data[0]
    assert first.seed != other.seed
    assert again.b64_json == first.b64_json


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client: openai.OpenAI, kind: str) -> None:
    options = {} if kind == "png" else {"output_compression": 50}
    answer = client.images.generate(prompt=PROMPT, model="tiny", output_format=kind, **options)
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert (image.format, image.size) == (kind.upper(), (32, 32))
    assert answer.output_format == kind


@pytest.mark.parametrize(
    "options",
    [
        {"safety_identifier": "user-7", "complexity": "low", "quality": "xhigh"},
        {"quality": "max", "complexity": "high", "user": "user-7"},
        {"output_format": None, "output_compression": None, "quality": None, "complexity": None},
        {"safety_identifier": None, "n": None, "size": None, "stream": None, "background": None},
        {"frame_count": None, "frame_duration_ms": None, "svg": None},
    ],
    ids=str,
)
def test_options_that_change_nothing(client: openai.OpenAI, options: dict) -> None:
    seed = {"seed": 5}
    plain = client.images.generate(prompt=PROMPT, model="tiny", extra_body=seed)
    answer = client.images.generate(prompt=PROMPT, model="tiny", extra_body=seed, **options)
    assert answer.data[0].b64_json == plain.data[0].b64_json
    assert answer.output_format == "png"
    image = ("pear.png", png(example_image(48, 40, number=3)))
    edited = client.images.edit(image=image, prompt=PROMPT, model="tiny-edit", **options)
    assert len(edited.data) == 1


def test_an_edit(client: openai.OpenAI, bundles: Bundles) -> None:
    image_HWC = example_image(48, 40, number=3)
    answer = client.images.edit(
        image=("pear.png", png(image_HWC)),
        prompt=PROMPT,
        model="tiny-edit",
        n=2,
        extra_body={"seed": 5},
    )
    with OneStepPipeline.load(bundles["tiny-edit"].root, "onnxruntime") as pipe:
        expected = pipe.edit(image_HWC, PROMPT, seed=5, count=2).images_BHWC
    for image, expected_HWC in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(image), expected_HWC)


@pytest.mark.parametrize("where", ["mask", "image"])
def test_transparent_pixels_are_repainted(
    client: openai.OpenAI, bundles: Bundles, where: str
) -> None:
    image_HWC = example_image(32, 32, number=3)
    mask_HW = example_mask(32, 32)
    alpha_HW = np.where(mask_HW > 0, 0, 255).astype(np.uint8)
    # What is transparent is not black in every program: its colour must not matter.
    with_alpha_HWC = np.dstack([image_HWC, alpha_HW])
    mask = {"mask": ("mask.png", png(with_alpha_HWC))} if where == "mask" else {}
    answer = client.images.edit(
        image=("room.png", png(image_HWC if mask else with_alpha_HWC)),
        prompt=PROMPT,
        model="tiny-inpaint",
        extra_body={"seed": 5},
        **mask,
    )
    kept_HW = pixels(answer.data[0])[:, :8]  # far from the mask
    source_HWC = (
        image_HWC
        if where == "mask"
        else np.asarray(
            Image.alpha_composite(
                Image.new("RGBA", (32, 32), "white"), Image.fromarray(with_alpha_HWC)
            ).convert("RGB")
        )
    )
    np.testing.assert_array_equal(kept_HW, source_HWC[:, :8])
    with OneStepPipeline.load(bundles["tiny-inpaint"].root, "onnxruntime") as pipe:
        expected = pipe.inpaint(source_HWC, mask_HW, PROMPT, seed=5).images_BHWC[0]
    np.testing.assert_array_equal(pixels(answer.data[0]), expected)


def test_a_mask_in_a_photograph_that_is_stored_lying(
    client: openai.OpenAI, bundles: Bundles
) -> None:
    mask_HW = np.zeros((48, 32), np.float32)
    mask_HW[8:20, 10:30] = 1
    alpha_HW = np.where(mask_HW > 0, 0, 255).astype(np.uint8)
    upright_HWC = np.dstack([example_image(48, 32, number=3), alpha_HW])
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise
    file = io.BytesIO()
    Image.fromarray(np.rot90(upright_HWC).copy()).save(file, "PNG", exif=exif)
    answer = client.images.edit(
        image=("room.png", file.getvalue()),
        prompt=PROMPT,
        model="tiny-inpaint",
        extra_body={"seed": 5},
    )
    with OneStepPipeline.load(bundles["tiny-inpaint"].root, "onnxruntime") as pipe:
        source = Image.fromarray(upright_HWC)
        expected = pipe.inpaint(source, mask_HW, PROMPT, seed=5).images_BHWC[0]
    np.testing.assert_array_equal(pixels(answer.data[0]), expected)


def test_an_adaptor_is_a_model_and_does_not_mix(client: openai.OpenAI, bundles: Bundles) -> None:
    names = ("tiny", "tiny:half", "tiny:double")
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        expected = {}
        for name in names:
            pipe.swap_adaptor(name.partition(":")[2] or None)
            expected[name] = pipe(PROMPT, seed=5).images_BHWC[0]
    assert len({image.tobytes() for image in expected.values()}) == 3

    def ask(number: int) -> tuple[str, np.ndarray]:
        name = names[number % 3]
        answer = client.images.generate(prompt=PROMPT, model=name, extra_body={"seed": 5})
        return name, pixels(answer.data[0])

    with ThreadPoolExecutor(12) as pool:
        for name, image_HWC in pool.map(ask, range(24)):
            np.testing.assert_array_equal(image_HWC, expected[name])


def test_an_image_does_not_depend_on_its_company(
    client: openai.OpenAI, server: Server, bundles: Bundles
) -> None:
    prompts = [f"{letter} pear" for letter in "abcdefgh"]
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        alone = [pipe(text, seed=seed).images_BHWC[0] for seed, text in enumerate(prompts)]
    seen = len(server.lines)

    def ask(number: int) -> None:
        seed = number % len(prompts)
        answer = client.images.generate(
            prompt=prompts[seed], model="tiny", extra_body={"seed": seed}
        )
        np.testing.assert_array_equal(pixels(answer.data[0]), alone[seed])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(64)))
    sizes = server.wait_for("ready", bundle="tiny")["batch_sizes"]
    made = [line["batches"][0] for line in server.lines[seen:] if line.get("batches")]
    assert set(made) <= set(sizes)
    if len(sizes) > 1:
        assert max(made) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "param", "code"),
    [
        ({"model": "none"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "../../etc/passwd"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "tiny-edit"}, openai.BadRequestError, "model", "invalid_value"),
        ({"model": "tiny-control"}, openai.BadRequestError, "model", "invalid_value"),
        ({"n": 11}, openai.BadRequestError, "n", "invalid_value"),
        ({"n": "2"}, openai.BadRequestError, "n", "invalid_value"),
        ({"size": "64x64"}, openai.BadRequestError, "size", "invalid_value"),
        ({"size": "big"}, openai.BadRequestError, "size", "invalid_value"),
        ({"prompt": "a" * 4001}, openai.BadRequestError, "prompt", "string_above_max_length"),
        ({"prompt": "pear " * 70}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"response_format": "url"}, openai.BadRequestError, "response_format", "invalid_value"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "invalid_value"),
        ({"quality": "best"}, openai.BadRequestError, "quality", "invalid_value"),
        ({"output_compression": 5}, openai.BadRequestError, "output_compression", "invalid_value"),
        ({"frame_count": 2}, openai.BadRequestError, "frame_count", "unknown_parameter"),
        ({"output_format": "gif"}, openai.BadRequestError, "output_format", "invalid_value"),
        ({"extra_body": {"steps": 50}}, openai.BadRequestError, "steps", "unknown_parameter"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed", "invalid_value"),
    ],
    ids=str,
)
def test_errors_are_openais(
    client: openai.OpenAI,
    arguments: dict,
    error: type[openai.APIStatusError],
    param: str | None,
    code: str,
) -> None:
    with pytest.raises(error) as caught:
        client.images.generate(**{"prompt": PROMPT, "model": "tiny", **arguments})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
