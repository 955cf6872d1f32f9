"""``hipa-serve --checker``: a user's function withholds images, and the answers say so."""

from __future__ import annotations

import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.images.example_source import example_image
from tests.served import Server, running

PROMPT = "a green pear"
REASON = "the second image"
# It sees all images of a request at once. Their number decides what it does.
SOURCE = f"""
def judge(images):
    assert images.ndim == 4 and images.dtype == "uint8"
    if len(images) == 3:
        raise RuntimeError("secret words")
    if len(images) == 4:
        return [True] * 4
    return ["{REASON}" if number == 1 else False for number in range(len(images))]
"""


@pytest.fixture(scope="module")
def strict(
    bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("checker")
    (folder / "served_checker.py").write_text(SOURCE, encoding="utf-8")
    roots = (str(bundles["tiny"].root), str(bundles["tiny-edit"].root))
    options = ("--backend", "onnxruntime", "--checker", "served_checker:judge", "--allow-code")
    with running(*roots, *options, PYTHONPATH=str(folder)) as server:
        yield server
        assert [line for line in server.lines if line["event"] == "bug"] == []


@pytest.fixture(scope="module")
def client(strict: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none is needed", max_retries=0)


def own(server: Server, count: int) -> httpx.Response:
    order = {"model": "tiny", "prompt": PROMPT, "seed": 5, "count": count}
    return httpx.post(f"{server.url}/hipa/generate", json=order, timeout=60)


def test_an_image_of_two_is_withheld(client: openai.OpenAI, strict: Server) -> None:
    answer = client.images.generate(prompt=PROMPT, model="tiny", n=2, extra_body={"seed": 5})
    assert isinstance(answer, openai.types.ImagesResponse)
    assert [image.seed for image in answer.data] == [5]
    assert answer.withheld == [{"seed": 6, "reason": REASON}]
    assert strict.wait_for("request", withheld=1)["status"] == 200
    # The own routes say it in the same words.
    theirs = own(strict, 2).json()
    assert theirs["withheld"] == answer.withheld
    assert [image["b64_json"] for image in theirs["images"]] == [answer.data[0].b64_json]


def test_an_edited_image_of_two_is_withheld(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.fromarray(np.asarray(example_image(32, 32, number=3))).save(file, "PNG")
    answer = client.images.edit(
        image=("pear.png", file.getvalue()),
        prompt=PROMPT,
        model="tiny-edit",
        n=2,
        extra_body={"seed": 5},
    )
    assert [image.seed for image in answer.data] == [5]
    assert answer.withheld == [{"seed": 6, "reason": REASON}]


def test_nothing_is_withheld(client: openai.OpenAI, strict: Server) -> None:
    answer = client.images.generate(prompt=PROMPT, model="tiny", extra_body={"seed": 5})
    assert (len(answer.data), answer.withheld) == (1, [])
    assert own(strict, 1).json()["withheld"] == []


def test_every_image_is_withheld(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Every image was withheld") as refused:
        client.images.generate(prompt=PROMPT, model="tiny", n=4)
    assert refused.value.code == "moderation_blocked"


def test_a_checker_that_fails_is_not_the_requests_fault(
    client: openai.OpenAI, strict: Server
) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        client.images.generate(prompt=PROMPT, model="tiny", n=3)
    assert failed.value.code == "backend_failed"
    assert "secret" not in str(failed.value)
    assert "secret words" in strict.wait_for("backend failed", model="tiny")["reason"]
    assert own(strict, 3).status_code == 500
    # It goes on.
    assert own(strict, 1).status_code == 200
    assert strict.status("/health/ready") == 200
