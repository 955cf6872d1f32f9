"""The page in a real browser where something is wrong: keys, refusals, a service that is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hipa_deploy.bundle.folder import Bundle
from tests.browser import open_browser, open_page
from tests.served import Server, running, tiny_bundles

KEY = "a-key-of-plain-text"
PROMPT = "a green pear"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundles(tmp_path_factory.mktemp("bundles"))["tiny"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as it:
        yield it


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    options = ("--backend", "onnxruntime", "--prompt-limit", "400")
    with running(str(tiny.root), *options, HIPA_API_KEYS=KEY) as it:
        yield it


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page of somebody whose key is known."""
    script = f"sessionStorage.setItem('hipa-api-key', '{KEY}')"
    with open_page(browser, server.url, script=script) as it:
        yield it


def error_of(page: Any) -> str:
    page.wait_for_selector("#error")
    assert page.get_attribute("#error", "role") == "alert"
    return page.inner_text("#error-words")


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(browser: Any, server: Server) -> None:
    with open_page(browser, server.url, ready=False) as page:
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "a-key-that-is-wrong")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "() => document.querySelector('#key-words').textContent.startsWith('Incorrect API key')"
        )
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#service[data-state=ready]")
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Enter")
        page.wait_for_selector("#history button")
        assert page.evaluate("Object.values({...sessionStorage})") == [KEY]
        assert page.evaluate("Object.keys({...localStorage}).length + document.cookie.length") == 0
        assert page.input_value("#key") == ""
        page.reload()
        page.wait_for_selector("#service[data-state=ready]")


def test_without_a_key_the_page_says_so(browser: Any, server: Server) -> None:
    with open_page(browser, server.url, ready=False) as page:
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        assert "Incorrect API key" in error_of(page)
        assert page.inner_text("#service") == "Not connected"
        # The page has stopped asking, and says nothing else when an image is asked for.
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Enter")
        assert "Incorrect API key" in error_of(page)
        page.click("#retry")  # loads the page anew
        page.wait_for_selector("#key-dialog[open]")


@pytest.mark.parametrize("status", [400, 500])
def test_a_refusal_to_say_what_is_offered_stays_on_the_page(
    page: Any, tmp_path: Path, status: int
) -> None:
    a_png = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(a_png)
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route)
        route.fulfill(status=status, body="<h1>No</h1>")

    page.route("**/page/about", answer)
    page.reload()
    words = f"The service answered with status {status}."
    assert error_of(page) == words
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    assert error_of(page) == words
    page.set_input_files("#file", str(a_png))
    assert error_of(page) == words
    page.wait_for_timeout(1500)
    assert len(asked) == 1
    page.unroute("**/page/about")
    page.click("#retry")
    page.wait_for_selector("#service[data-state=ready]")


def test_what_the_service_refuses_is_said_in_its_words(page: Any) -> None:
    page.fill("#prompt", "pear " * 79)  # 395 characters, and more tokens than the model takes
    page.keyboard.press("Enter")
    assert "tokens" in error_of(page)
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    page.fill("#prompt", "pear " * 81 + "pear")
    assert "at most 400" in error_of(page)
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    for seed in ("-1", "1.5", "9223372036854775808", ""):
        page.fill("#prompt", PROMPT)
        page.fill("#seed", seed)
        page.wait_for_selector("#seed[aria-invalid]")
        assert "from 0 to 9223372036854775807" in error_of(page)
    page.fill("#seed", "007")
    page.wait_for_selector("#error", state="hidden")
    page.wait_for_selector("#result:not(.stale)")
    assert "seed 7 " in page.inner_text("#caption")


def test_a_busy_service_is_asked_again_when_it_says(page: Any) -> None:
    """The refusal is the service's own answer of ``QueueFullError``, with one second in it.

    Nothing here depends on how fast the machine is. The page does not ask while one types: then
    Enter would sometimes find the refusal already there, and ask again at once. The second
    request is answered when the refusal was read.
    """
    message = "Too many images are waiting. Try again in 1 seconds."
    refusal = {"message": message, "type": "rate_limit_error", "param": None, "code": "busy"}
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route)
        if len(asked) > 1:
            return
        headers = {"retry-after": "1", "content-type": "application/json"}
        route.fulfill(status=429, headers=headers, body=json.dumps({"error": refusal}))

    page.route("**/hipa/generate", answer)
    page.uncheck("#live")
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    assert error_of(page) == f"{message} The page tries again by itself."
    while len(asked) < 2:
        page.wait_for_timeout(20)
    asked[1].continue_()
    page.wait_for_selector("#history button")
    page.wait_for_selector("#error", state="hidden")
    assert len(asked) == 2


def test_a_service_that_ends_while_it_loads(page: Any, server: Server) -> None:
    state = "loading"

    def answer(route: Any) -> None:
        if state == "gone":
            route.abort()
            return
        content = route.fetch().json()
        for model in content["models"]:
            model["ready"] = state == "ready"
        route.fulfill(json=content)

    page.route("**/hipa/models", answer)
    page.reload()
    page.wait_for_selector("#service[data-state=loading]")
    state = "gone"
    page.wait_for_selector("#service[data-state=down]")
    # Without a moment in which it seems to load, between two questions a second apart.
    page.evaluate(
        """() => {
          window.states = [];
          const line = document.querySelector("#service");
          new MutationObserver(() => window.states.push(line.dataset.state))
            .observe(line, { attributes: true });
        }"""
    )
    page.wait_for_timeout(2200)
    assert "loading" not in page.evaluate("window.states")
    state = "ready"
    page.wait_for_selector("#service[data-state=ready]")


def test_a_service_that_comes_late_is_met_without_a_reload(page: Any, tmp_path: Path) -> None:
    is_there = False
    proxy = 0  # its status; none: nothing answers
    a_png = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(a_png)

    def answer(route: Any) -> None:
        if is_there:
            route.continue_()
        elif proxy:
            proxied.append(proxy)
            route.fulfill(status=proxy, body="<html>Bad gateway</html>")
        else:
            route.abort()

    proxied: list[int] = []
    page.route("**/page/about", answer)
    page.reload()
    page.wait_for_selector("#service[data-state=down]")
    assert "does not answer" in error_of(page)
    for proxy in (502, 429):
        while proxy not in proxied:
            page.wait_for_timeout(20)
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    assert "does not answer yet" in error_of(page)
    page.set_input_files("#file", str(a_png))
    assert "does not answer yet" in error_of(page)
    page.click("#retry")  # loads the page anew, where the browser has kept what was typed or not
    page.wait_for_selector("#service[data-state=down]")
    page.fill("#prompt", PROMPT)
    is_there = True
    page.wait_for_selector("#service[data-state=ready]")
    page.wait_for_selector("#error", state="hidden")
    page.wait_for_selector("#result:not(.stale)")  # what was typed has been asked for
    page.keyboard.press("Enter")
    page.wait_for_selector("#history button")


def test_an_image_comes_back_before_the_service_does(browser: Any, server: Server) -> None:
    """Its form is written when the models are known: the next image is one of the same order."""
    script = f"sessionStorage.setItem('hipa-api-key', '{KEY}')"
    is_there = True

    def answer(route: Any) -> None:
        if is_there:
            route.continue_()
        else:
            route.abort()

    with open_page(browser, server.url, script=script) as page:
        page.fill("#prompt", PROMPT)
        page.fill("#seed", "77")
        page.keyboard.press("Enter")
        page.wait_for_selector("#history button")
        page.route("**/page/about", answer)
        is_there = False
        page.reload()
        page.wait_for_selector("#service[data-state=down]")
        page.click("#history button")
        page.wait_for_selector("#result:not(.stale)")
        assert page.is_disabled("#use")
        assert page.is_hidden("#error")
        is_there = True
        page.wait_for_selector("#service[data-state=ready]")
        page.wait_for_function("() => !document.querySelector('#use').disabled")
        assert page.input_value("#prompt") == PROMPT
        assert page.input_value("#seed") == "77"
        assert page.is_hidden("#error")
        assert "stale" not in (page.get_attribute("#result", "class") or "")


def test_what_is_asked_while_the_models_load_is_made_when_they_have(page: Any) -> None:
    """The refusal is the service's own, but for its five seconds: a model may take minutes."""
    refusal = {"message": "The service is loading its models.", "code": "not_ready"}
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route)
        if len(asked) > 8:
            route.continue_()
            return
        route.fulfill(status=503, headers={"retry-after": "0"}, json={"error": refusal})

    page.route("**/hipa/generate", answer)
    page.uncheck("#live")
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#history button")
    page.wait_for_selector("#error", state="hidden")
    assert len(asked) == 9


@pytest.mark.parametrize("how", ["the button", "another prompt"])
def test_what_is_stopped_is_not_tried_again(page: Any, how: str) -> None:
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route)
        route.fulfill(status=429, headers={"retry-after": "2"}, json={"error": {"message": "No."}})

    page.route("**/hipa/generate", answer)
    page.uncheck("#live")
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    assert error_of(page).endswith("The page tries again by itself.")
    if how == "the button":
        page.click("#stop")
    else:
        page.fill("#prompt", "a red apple")
    page.wait_for_selector("#error", state="hidden")
    before = len(asked)
    page.wait_for_timeout(2500)
    assert len(asked) == before


def test_an_answer_that_is_not_the_services(page: Any) -> None:
    page.route("**/hipa/generate", lambda route: route.fulfill(status=502, body="<h1>Bad</h1>"))
    page.fill("#prompt", PROMPT)
    assert error_of(page) == "The service answered with status 502."


def test_a_closed_set_of_prompts_is_offered(page: Any) -> None:
    """What the page does with the prompts; that they are a bundle's is tested beside the routes."""
    known = ["a red apple", "a green pear", "a green car"]
    answer = {
        "prompts": {"tiny": {"example": known[0], "known": known}},
        "limits": {"prompt": 400, "body": 1 << 20, "pixels": 1 << 20},
    }
    page.route("**/page/about", lambda route: route.fulfill(json=answer))
    page.reload()
    page.wait_for_selector("#service[data-state=ready]")
    page.uncheck("#live")
    page.fill("#prompt", "green")
    assert page.locator("#idea-list button").all_inner_texts() == known[1:]
    page.locator("#idea-list button").first.click()
    page.wait_for_selector("#history button")
    assert page.input_value("#prompt") == known[1]


def test_a_service_that_has_stopped(page: Any, server: Server) -> None:
    """The last test of this file: it stops the server."""
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#history button")
    assert page.locator("#result.stale").count() == 0
    server.stop()
    page.fill("#prompt", "a red apple")
    page.keyboard.press("Enter")
    assert error_of(page).startswith("The service does not answer.")
    assert page.inner_text("#service") == "The service does not answer"
    # The image is still there, and is not taken for that of the new prompt.
    assert page.locator("#result.stale").count() == 1
    assert PROMPT in page.inner_text("#caption")
    assert page.is_visible("#retry")
    # What was kept can be seen all the same.
    page.locator("#history button").first.click()
    page.wait_for_selector("#result:not(.stale)")


def test_where_there_is_no_browser_the_tests_skip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HIPA_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install the package chromium"), open_browser():
        pass
