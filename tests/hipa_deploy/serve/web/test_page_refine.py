"""The page's second button: the final image of a draft."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.browser import open_browser, open_page
from tests.hipa_deploy.serve.web.test_page import pixels, shown, wait_for_image
from tests.refine_samples import refine_bundle
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


def refined(server: Server, seed: str) -> np.ndarray:
    """What the API itself makes of the draft."""
    request = urllib.request.Request(
        f"{server.url}/hipa/refine",
        data=json.dumps({"model": "fine", "prompt": PROMPT, "seed": int(seed)}).encode(),
        headers={"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return pixels(answer.read())


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


def test_a_refining_that_failed_is_tried_again(page: Any, server: Server) -> None:
    """The button beside the error asks for the same once more, and not for another draft."""
    page.evaluate("() => { document.querySelector('#settings').open = true; }")
    page.select_option("#model", "fine")
    page.fill("#prompt", PROMPT)
    wait_for_image(page, PROMPT, "0")
    page.wait_for_function("() => !document.querySelector('#refine').disabled")
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
