"""The page's second button: the final image of a draft."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hipa_deploy.images.png import read_parameters
from tests.browser import open_browser, open_page
from tests.hipa_deploy.serve.web.test_page import (
    CONTRAST,
    PHONE,
    drop_image,
    pixels,
    shown,
    wait_for_image,
)
from tests.refine_samples import STEPS, refine_bundle
from tests.served import Server, running

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = refine_bundle(tmp_path_factory.mktemp("refine"))
    with running("emoji", f"fine={bundle.root}", "--backend", "onnxruntime") as it:
        yield it


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with open_browser() as browser, open_page(browser, server.url) as it:
        yield it


def refined(server: Server, seed: str, **more: int) -> np.ndarray:
    """What the API itself makes of the draft."""
    fields = {"model": "fine", "prompt": PROMPT, "seed": int(seed), **more}
    request = urllib.request.Request(
        f"{server.url}/hipa/refine",
        data=json.dumps(fields).encode(),
        headers={"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return pixels(answer.read())


def show_draft(page: Any) -> None:
    """The draft of the prompt, of the model that refines."""
    page.evaluate("() => { document.querySelector('#settings').open = true; }")
    page.select_option("#model", "fine")
    page.fill("#prompt", PROMPT)
    wait_for_image(page, PROMPT, "0")
    page.wait_for_function("() => !document.querySelector('#refine').disabled")


def wait_for_final(page: Any, steps: int) -> None:
    page.wait_for_function(
        """(words) => document.querySelector("#caption").textContent.includes(words)""",
        arg=f"refined in {steps} steps",
    )


def test_a_draft_is_refined(page: Any, server: Server) -> None:
    page.fill("#prompt", "3d emoji of a red apple")
    wait_for_image(page, "3d emoji of a red apple")
    assert page.is_disabled("#refine"), "emoji has no base model to refine with"

    page.evaluate("() => { document.querySelector('#settings').open = true; }")
    page.select_option("#model", "fine")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "5")
    wait_for_image(page, PROMPT, "5")
    page.wait_for_function("() => !document.querySelector('#refine').disabled")
    draft = shown(page)
    page.click("#refine")
    page.wait_for_function(
        "() => document.querySelector('#caption').textContent.includes('refined')"
    )
    final = shown(page)
    np.testing.assert_array_equal(final, refined(server, "5"))
    assert (final != draft).any()
    assert page.is_disabled("#refine"), "a final image is not refined again"

    # Both are in the history; the draft comes back as a draft.
    kept = page.locator("#history button img, #history img")
    assert kept.count() >= 2


def test_the_steps_are_chosen_by_the_keyboard(page: Any, server: Server, tmp_path: Path) -> None:
    show_draft(page)
    assert page.input_value("#refine-steps") == str(STEPS)
    page.focus("#refine")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#refine-steps") == str(STEPS + 1)
    page.keyboard.press("Control+A")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    wait_for_final(page, 3)
    np.testing.assert_array_equal(shown(page), refined(server, "0", steps=3))
    assert page.is_disabled("#refine-steps")
    with page.expect_download() as caught:
        page.click("#download")
    caught.value.save_as(tmp_path / "final.png")
    assert read_parameters(tmp_path / "final.png")["refine"]["steps"] == 3

    # The draft comes back from the history, and is refined in another number of steps.
    page.locator("#history button").nth(1).click()
    page.wait_for_function("() => !document.querySelector('#refine').disabled")
    assert page.input_value("#refine-steps") == "3", "the user's number stays"
    page.fill("#refine-steps", "4")
    page.click("#refine")
    wait_for_final(page, 4)
    np.testing.assert_array_equal(shown(page), refined(server, "0", steps=4))
    # The first final image has its own number.
    page.locator("#history button").nth(1).click()
    wait_for_final(page, 3)
    assert page.input_value("#refine-steps") == "3"


@pytest.mark.parametrize("steps", ["", "1", "101", "2.5"])
def test_steps_that_the_service_would_refuse_are_not_sent(page: Any, steps: str) -> None:
    show_draft(page)
    asked: list[Any] = []
    page.route("**/hipa/refine", lambda route: asked.append(route))
    page.fill("#refine-steps", steps)
    page.click("#refine")
    page.wait_for_selector("#error")
    assert page.inner_text("#error") == "Steps: expected a whole number from 2 to 100."
    assert page.get_attribute("#refine-steps", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "refine-steps"
    assert page.locator("#result.stale").count() == 0
    assert asked == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_steps_fit_on_a_phone(server: Server, scheme: str) -> None:
    options = {"color_scheme": scheme, "viewport": PHONE, "has_touch": True}
    with open_browser() as browser, open_page(browser, server.url, **options) as page:
        show_draft(page)
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == PHONE["width"]
        ratios = page.evaluate(CONTRAST.read_text())
        assert {"Steps", "refine-steps", "Refine in many steps"} <= {text for text, _ in ratios}
        assert [text for text, ratio in ratios if ratio < 4.5] == []
        button = page.locator("#refine").bounding_box()
        field = page.locator("#refine-steps").bounding_box()
        assert field["height"] >= 40, "a finger needs some room"
        middles = [box["y"] + box["height"] / 2 for box in (button, field)]
        assert abs(middles[0] - middles[1]) < 2, "they stand side by side"
        page.fill("#refine-steps", "2")
        page.tap("#refine")
        wait_for_final(page, 2)


def test_a_dropped_final_image_brings_its_steps_back(page: Any, server: Server) -> None:
    """The draft is made at once; the final image is the user's to ask for."""
    request = urllib.request.Request(
        f"{server.url}/hipa/refine",
        data=json.dumps({"model": "fine", "prompt": PROMPT, "seed": 5, "steps": 4}).encode(),
        headers={"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        file = answer.read()
    drop_image(page, file)
    wait_for_image(page, PROMPT, "5")
    page.wait_for_function("() => !document.querySelector('#refine').disabled")
    assert page.input_value("#model") == "fine"
    assert page.input_value("#refine-steps") == "4"
    page.click("#refine")
    wait_for_final(page, 4)
    np.testing.assert_array_equal(shown(page), pixels(file))


def test_a_refining_that_failed_is_tried_again(page: Any, server: Server) -> None:
    """The button beside the error asks for the same once more, and not for another draft."""
    show_draft(page)
    tried: list[Any] = []

    def answer(route: Any) -> None:
        tried.append(route)
        if len(tried) == 1:
            route.fulfill(status=502, body="")
        else:
            route.continue_()

    page.route("**/hipa/refine", answer)
    page.click("#refine")
    page.wait_for_selector("#error")
    assert page.locator("#result.stale").count() == 0, "the draft is still that of the form"
    page.click("#retry")
    page.wait_for_function(
        "() => document.querySelector('#caption').textContent.includes('refined')"
    )
    assert len(tried) == 2
    np.testing.assert_array_equal(shown(page), refined(server, "0"))
