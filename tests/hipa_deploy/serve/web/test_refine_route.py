"""``/hipa/refine``: the final image of a draft, over HTTP."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from tests.refine_samples import GUIDANCE, SAMPLER, STEPS, refine_bundle
from tests.served import Server, running

ORDER = {"prompt": "a green pear", "seed": 5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return refine_bundle(tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def http(bundle: Bundle) -> Iterator[httpx.Client]:
    with (
        running(str(bundle.root), "--backend", "onnxruntime") as it,
        httpx.Client(base_url=it.url, timeout=60) as client,
    ):
        yield client
        assert [line for line in it.lines if line["event"] == "bug"] == []


def test_a_final_image_is_that_of_the_pipeline(http: httpx.Client, bundle: Bundle) -> None:
    answer = http.post("/hipa/refine", json={**ORDER, "steps": 3})
    (image,) = answer.json()["images"]
    pixels_HWC = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        final = pipe.refine(pipe(ORDER["prompt"], seed=5), 3)
    np.testing.assert_array_equal(pixels_HWC, final.images_BHWC[0])
    assert image["parameters"] == final.parameters[0]


def test_by_default_as_the_teacher(http: httpx.Client) -> None:
    (model,) = http.get("/hipa/models").json()["models"]
    assert model["refine"] == {"sampler": SAMPLER, "steps": STEPS, "guidance": GUIDANCE}
    answer = http.post("/hipa/refine", json={**ORDER, "count": 2})
    for image in answer.json()["images"]:
        refined = {**image["parameters"]["refine"]}
        refined.pop("unet")
        assert refined == model["refine"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 1), ("steps", 101), ("steps", 1001), ("guidance", 0), ("sampler", "euler")],
)
def test_fields_out_of_range(http: httpx.Client, field: str, value: object) -> None:
    answer = http.post("/hipa/refine", json={**ORDER, field: value})
    assert answer.status_code == 400
    assert field in answer.text


def test_the_owner_limits_the_steps(bundle: Bundle) -> None:
    """The teacher's own number counts too: the request below names none."""
    options = ("--backend", "onnxruntime", "--steps-limit", str(STEPS - 1))
    with running(str(bundle.root), *options) as server:
        answer = httpx.post(f"{server.url}/hipa/refine", json=ORDER, timeout=60)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "steps"
        assert f"{STEPS} steps are too many" in error["message"]
        assert f"at most {STEPS - 1}." in error["message"]
        answer = httpx.post(f"{server.url}/hipa/refine", json={**ORDER, "steps": 3}, timeout=60)
        assert answer.status_code == 200


def asked(server: Server) -> float:
    """How often the base model was asked."""
    text = httpx.get(f"{server.url}/metrics").text
    for line in text.splitlines():
        if line.startswith("hipa_stage_seconds_count") and 'stage="teacher"' in line:
            return float(line.split()[-1])
    return 0.0


def test_a_refining_that_is_given_up_stops(bundle: Bundle) -> None:
    options = ("--backend", "onnxruntime", "--steps-limit", "1000", "--time-limit", "0.5")
    with (
        running(str(bundle.root), *options) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def status(steps: int) -> int:
            return client.post("/hipa/refine", json={**ORDER, "steps": steps}).status_code

        # The first one loads the base model, which may take longer than the limit.
        deadline = time.monotonic() + 60
        while status(2) != 200:
            assert time.monotonic() < deadline
        assert status(1000) == 504
        time.sleep(0.3)  # far longer than the step under way
        stopped_at = asked(server)
        time.sleep(0.3)
        assert asked(server) == stopped_at
        assert status(2) == 200
        assert [line for line in server.lines if line["level"] == "error"] == []


def test_a_model_without_a_base_model(server: Server) -> None:
    answer = httpx.post(f"{server.url}/hipa/refine", json={**ORDER, "model": "tiny"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == ("The model tiny has no base model to refine with.")
    answer = httpx.post(f"{server.url}/hipa/refine", json={**ORDER, "model": "tiny-edit"})
    assert answer.status_code == 400
    assert "is to edit" in answer.text
