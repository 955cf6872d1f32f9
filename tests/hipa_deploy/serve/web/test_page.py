"""The page in a real browser: typing, painting, restoring, keys, phones and dark rooms."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from hipa_deploy.images.compositing import seam_weight
from hipa_deploy.images.example_source import example_image
from hipa_deploy.images.png import png_bytes, read_parameters
from tests.browser import open_browser, open_page
from tests.served import Server, add_swaps, running, tiny_bundles

APPLE = "3d emoji of a red apple"
PEAR = "3d emoji of a green pear"
LONGEST_SEED = "9223372036854775807"  # 2**63 - 1: no number of JavaScript
PHONE = {"width": 390, "height": 844}
# Playwright does not show the files of a form that was sent.
KEEP_FORMS = """
  const send = window.fetch;
  window.fetch = (path, options) => {
    if (options?.body instanceof FormData) window.lastForm = [...options.body.entries()];
    return send(path, options);
  };
"""
FIRST_DECODED_LATE = """
  const decode = HTMLImageElement.prototype.decode;
  let isFirst = true;
  HTMLImageElement.prototype.decode = async function () {
    if (isFirst) {
      isFirst = false;
      await new Promise((resolve) => setTimeout(resolve, 1000));
      await decode.call(this);
      window.decodedLate = true;
      return;
    }
    await decode.call(this);
  };
"""
CONTRAST = Path(__file__).parent / "contrast.js"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The emoji model, and a tiny one for every task that begins with an image."""
    bundles = tiny_bundles(tmp_path_factory.mktemp("bundles"))
    add_swaps(bundles["tiny"], half=0.5)
    roots = [str(bundle.root) for bundle in bundles.values()]
    with running("emoji", *roots, "--backend", "onnxruntime") as it:
        yield it


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as it:
        yield it


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with open_page(browser, server.url, script=KEEP_FORMS) as it:
        yield it


def api_image(server: Server, **fields: Any) -> np.ndarray:
    """What the API itself makes, uint8 [H, W, 3]."""
    request = urllib.request.Request(
        f"{server.url}/hipa/generate",
        data=json.dumps({"model": "emoji", "seed": 0, **fields}).encode(),
        headers={"content-type": "application/json", "accept": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return pixels(answer.read())


def api_control(server: Server, control_HWC: np.ndarray, **fields: str) -> np.ndarray:
    """What the API itself makes of a control image, uint8 [H, W, 3]."""
    answer = httpx.post(
        f"{server.url}/hipa/control",
        data={"prompt": PEAR, **fields},
        files={"image": ("a.png", png(control_HWC), "image/png")},
        headers={"accept": "image/png"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return pixels(answer.content)


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def shown(page: Any, selector: str = "#result") -> np.ndarray:
    """The pixels of an image on the page, uint8 [H, W, 3]."""
    values, width = page.evaluate(
        """(selector) => {
          const image = document.querySelector(selector);
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const pen = canvas.getContext("2d");
          pen.drawImage(image, 0, 0);
          return [[...pen.getImageData(0, 0, canvas.width, canvas.height).data], canvas.width];
        }""",
        selector,
    )
    return np.array(values, np.uint8).reshape(-1, width, 4)[..., :3]


def wait_for_image(page: Any, prompt: str, seed: str = "0") -> None:
    """Until the image of a prompt is shown, and nothing newer is under way."""
    page.wait_for_function(
        """([prompt, seed]) => {
          const image = document.querySelector("#result");
          const words = document.querySelector("#caption").textContent;
          return image.alt === prompt && words.includes(`seed ${seed} `)
            && !image.hidden && !image.classList.contains("stale");
        }""",
        arg=[prompt, seed],
    )


def give_image(page: Any, file: bytes, name: str = "image.png", kind: str = "image/png") -> None:
    page.locator("#file").set_input_files(files=[{"name": name, "mimeType": kind, "buffer": file}])


def drop_image(page: Any, file: bytes, event: str = "drop") -> None:
    """Drop or paste a file, as a browser hands it over."""
    page.evaluate(
        """([bytes, event]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "image.png", { type: "image/png" }));
          const options = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(event === "drop"
            ? new DragEvent(event, { ...options, dataTransfer: data })
            : new ClipboardEvent(event, { ...options, clipboardData: data }));
        }""",
        [list(file), event],
    )


def form_parts(page: Any) -> dict[str, Any]:
    """The fields of the last form that the page sent: texts, and files as bytes."""
    fields = page.evaluate(
        """async () => {
          const fields = [];
          for (const [name, value] of window.lastForm) {
            fields.push([name, value instanceof File ? [...await value.bytes()] : value]);
          }
          return fields;
        }"""
    )
    return {name: bytes(value) if isinstance(value, list) else value for name, value in fields}


def paint(page: Any, *places: tuple[float, float]) -> None:
    """Draw a line over the mask, through places in parts of its width and height."""
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    for number, (x, y) in enumerate(places):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def test_typing_shows_the_image_of_the_api(page: Any, server: Server) -> None:
    assert APPLE in page.inner_text("#empty")
    page.fill("#seed", LONGEST_SEED)
    page.locator("#prompt").press_sequentially(APPLE)
    wait_for_image(page, APPLE, LONGEST_SEED)
    expected = api_image(server, prompt=APPLE, seed=int(LONGEST_SEED))
    np.testing.assert_array_equal(shown(page), expected)
    assert re.fullmatch(r"\d+ ms \(model \d+(, queue \d+)?\)", page.inner_text("#latency"))
    page.wait_for_selector("#history button")
    assert re.fullmatch(r"Image ready after \d+ milliseconds\.", page.inner_text("#status"))


def test_typing_fast_ends_with_the_last_prompt(page: Any, server: Server) -> None:
    """Answers are held back so that they come in the opposite order."""
    # Between typing and Enter a slow machine would ask too: then there were more than two requests.
    page.uncheck("#live")
    held: list[Any] = []
    page.route("**/hipa/generate", lambda route: held.append(route))
    for prompt in (APPLE, PEAR):
        page.fill("#prompt", prompt)
        with page.expect_request("**/hipa/generate"):
            page.keyboard.press("Enter")
    while len(held) < 2:
        page.wait_for_timeout(10)
    held[1].continue_()
    wait_for_image(page, PEAR)
    # The first request was aborted: it has failed, and can be answered no more.
    assert held[0].request.failure == "net::ERR_ABORTED"
    np.testing.assert_array_equal(shown(page), api_image(server, prompt=PEAR))


def test_an_image_that_is_decoded_late_replaces_no_newer_one(browser: Any, server: Server) -> None:
    """The first image takes a second to decode, in which the second one comes and is shown."""
    with open_page(browser, server.url, script=FIRST_DECODED_LATE) as page:
        page.uncheck("#live")
        for prompt in (APPLE, PEAR):
            page.fill("#prompt", prompt)
            with page.expect_response("**/hipa/generate"):
                page.keyboard.press("Enter")
        wait_for_image(page, PEAR)
        page.wait_for_function("() => window.decodedLate")
        page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")
        wait_for_image(page, PEAR)
        np.testing.assert_array_equal(shown(page), api_image(server, prompt=PEAR))


def test_an_image_of_another_prompt_is_dimmed(page: Any) -> None:
    page.fill("#prompt", APPLE)
    wait_for_image(page, APPLE)
    page.uncheck("#live")
    page.fill("#prompt", PEAR)
    page.wait_for_selector("#result.stale")
    assert APPLE in page.inner_text("#caption")


def test_adaptors_are_chosen(page: Any, server: Server) -> None:
    page.select_option("#model", "tiny")
    page.select_option("#adaptor", "tiny:half")
    page.fill("#prompt", PEAR)
    page.keyboard.press("Enter")
    wait_for_image(page, PEAR)
    assert "tiny:half" in page.inner_text("#caption")
    np.testing.assert_array_equal(shown(page), api_image(server, prompt=PEAR, model="tiny:half"))


def test_the_download_carries_the_parameters(page: Any, tmp_path: Path) -> None:
    page.fill("#prompt", APPLE)
    page.keyboard.press("Enter")
    wait_for_image(page, APPLE)
    with page.expect_download() as caught:
        page.click("#download")
    assert caught.value.suggested_filename == "3d-emoji-of-a-red-apple-0.png"
    path = tmp_path / "image.png"
    caught.value.save_as(path)
    parameters = read_parameters(path)
    assert (parameters["prompt"], parameters["seed"]) == (APPLE, 0)
    page.click("#facts summary")
    assert parameters["unet"] in page.inner_text("#fact-list")
    # The same file dropped on the page gives its prompt and seed back.
    page.fill("#prompt", PEAR)
    page.fill("#seed", "5")
    drop_image(page, path.read_bytes())
    wait_for_image(page, APPLE)
    assert page.input_value("#seed") == "0"


def api_file(server: Server, path: str, **fields: str) -> bytes:
    """A PNG that the API makes of an image."""
    answer = httpx.post(
        f"{server.url}/hipa/{path}",
        data={"prompt": PEAR, **fields},
        files={"image": ("a.png", png(example_image(32, 32, number=3)), "image/png")},
        headers={"accept": "image/png"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def test_a_dropped_png_brings_its_model_and_adaptor_back(page: Any, tmp_path: Path) -> None:
    page.select_option("#model", "tiny")
    page.select_option("#adaptor", "tiny:half")
    page.fill("#seed", LONGEST_SEED)
    page.fill("#prompt", PEAR)
    page.keyboard.press("Enter")
    wait_for_image(page, PEAR, LONGEST_SEED)
    made = shown(page)
    with page.expect_download() as caught:
        page.click("#download")
    caught.value.save_as(tmp_path / "image.png")
    page.reload()
    page.wait_for_selector("#service[data-state=ready]")
    assert page.input_value("#model") == "emoji"
    drop_image(page, (tmp_path / "image.png").read_bytes())
    wait_for_image(page, PEAR, LONGEST_SEED)
    assert page.input_value("#model") == "tiny"
    assert page.input_value("#adaptor") == "tiny:half"
    np.testing.assert_array_equal(shown(page), made)


@pytest.mark.parametrize(
    ("task", "field", "value"), [("edit", "strength", "0.5"), ("control", "scale", "0.25")]
)
def test_a_dropped_png_brings_its_task_and_settings_back(
    page: Any, server: Server, task: str, field: str, value: str
) -> None:
    """The image that it was made from is not in the file: the page asks for it."""
    file = api_file(server, task, seed="5", **{field: value})
    drop_image(page, file)
    page.wait_for_selector("#error")
    assert re.match("Drop, paste or choose an? (control )?image", page.inner_text("#error"))
    assert page.is_checked(f"[value={task}]")
    assert page.input_value("#model") == f"tiny-{task}"
    assert page.input_value(f"#{field}") == value
    drop_image(page, png(example_image(32, 32, number=3)))
    wait_for_image(page, PEAR, "5")
    np.testing.assert_array_equal(shown(page), pixels(file))


def test_a_dropped_png_brings_its_size_back(browser: Any, server: Server) -> None:
    """The models here have one size each, so that others are offered in their place."""
    hashes = httpx.get(f"{server.url}/page/about").json()["models"]["tiny"]
    models = httpx.get(f"{server.url}/hipa/models").json()["models"]
    for model in models:
        for side in ("width", "height"):
            model[side] |= {"max": 256, "multiple": 8}
    parameters = {"prompt": PEAR, "seed": 7, "height": 40, "width": 48, **hashes}
    file = png_bytes(example_image(40, 48, number=3), parameters)
    with open_page(browser, server.url) as page:
        page.route("**/hipa/models", lambda route: route.fulfill(json={"models": models}))
        page.route("**/hipa/generate", lambda route: route.fulfill(status=400, body=""))
        page.reload()
        page.wait_for_selector("#service[data-state=ready]")
        with page.expect_request("**/hipa/generate") as caught:
            drop_image(page, file)
        sent = caught.value.post_data_json
        assert sent == {"model": "tiny", "prompt": PEAR, "width": 48, "height": 40, "seed": 7}
        page.wait_for_selector("#error")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("elsewhere", "Its model elsewhere is not served here. The form names another one."),
        ("tiny", "Its model tiny is served here in another version, or without its adaptor."),
        (None, "It does not name its model."),
    ],
)
def test_a_dropped_png_of_a_model_that_is_not_served(
    page: Any, name: str | None, words: str
) -> None:
    page.fill("#prompt", APPLE)
    wait_for_image(page, APPLE)
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.url))
    parameters = {"prompt": PEAR, "seed": 7, "bundle": "0" * 64, "bundle_name": name}
    drop_image(page, png_bytes(example_image(32, 32, number=3), parameters))
    page.wait_for_selector("#error")
    assert page.inner_text("#error") == f"The prompt and the seed were read from the image. {words}"
    assert page.input_value("#prompt") == PEAR
    assert page.input_value("#seed") == "7"
    assert page.input_value("#model") == "emoji"
    page.wait_for_timeout(600)  # longer than the page waits for more keystrokes
    assert [url for url in asked if "/hipa/" in url] == [], "the user decides on another model"
    page.click("#make")
    wait_for_image(page, PEAR, "7")


def test_only_what_was_painted_is_made_anew(page: Any) -> None:
    source_HWC = example_image(32, 32, number=3)
    page.check("[value=inpaint]", force=True)
    page.fill("#prompt", PEAR)
    give_image(page, png(source_HWC))
    page.wait_for_selector("#mask")
    page.evaluate("document.querySelector('#feather').value = 0")
    with page.expect_request("**/hipa/inpaint"):
        paint(page, (0.25, 0.5), (0.75, 0.5))
    wait_for_image(page, PEAR)
    sent = form_parts(page)
    np.testing.assert_array_equal(pixels(sent["image"]), source_HWC)
    mask_HW = pixels(sent["mask"])[..., 0]
    assert set(np.unique(mask_HW)) == {0, 255}
    # A line of 6 pixels (20 percent) along row 16, from column 8 to column 24.
    assert mask_HW[15:17, 8:24].all()
    assert not mask_HW[:12].any()
    assert not mask_HW[20:].any()
    assert not mask_HW[:, :4].any()
    result_HWC = shown(page)
    inside = mask_HW > 0
    np.testing.assert_array_equal(result_HWC[~inside], source_HWC[~inside])
    assert np.abs(result_HWC[inside].astype(int) - source_HWC[inside]).mean() > 5
    # Before and after.
    np.testing.assert_array_equal(shown(page, "#before"), source_HWC)
    page.focus("#compare")
    page.keyboard.press("End")
    assert (
        page.evaluate("document.querySelector('#before').style.clipPath") == "inset(0px 0% 0px 0px)"
    )


def touch(page: Any, *places: tuple[float, float]) -> None:
    """Move a finger over the mask, through places in parts of its width and height."""
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    fingers = page.context.new_cdp_session(page)

    def send(kind: str, *points: dict[str, float]) -> None:
        # Playwright itself has taps alone.
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    at = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in places]
    send("touchStart", at[0])
    for point in at[1:]:
        send("touchMove", point)
    send("touchEnd")


def test_a_finger_paints_on_a_phone(browser: Any, server: Server) -> None:
    source_HWC = example_image(32, 32, number=3)
    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    with open_page(browser, server.url, script=KEEP_FORMS, **options) as page:
        page.tap("label:has([value=inpaint])")
        page.tap("label:has(#live)")
        page.fill("#prompt", PEAR)
        give_image(page, png(source_HWC))
        page.wait_for_selector("#mask")
        page.evaluate("document.querySelector('#feather').value = 0")
        page.locator("#mask").scroll_into_view_if_needed()
        scrolled = page.evaluate("scrollY")
        # Down the image, as a finger would scroll the page.
        touch(page, (0.5, 0.75), (0.5, 0.6), (0.5, 0.4), (0.5, 0.25))
        assert page.evaluate("scrollY") == scrolled, "the finger paints, and does not scroll"
        assert page.is_enabled("#undo")
        with page.expect_request("**/hipa/inpaint"):
            page.tap("#make")
        wait_for_image(page, PEAR)
        mask_HW = pixels(form_parts(page)["mask"])[..., 0]
        # A line of 6 pixels (20 percent) along column 16, from row 8 to row 24.
        assert mask_HW[8:24, 15:17].all()
        assert not mask_HW[:, :12].any()
        assert not mask_HW[:, 20:].any()
        assert not mask_HW[:4].any()
        result_HWC = shown(page)
        inside = mask_HW > 0
        np.testing.assert_array_equal(result_HWC[~inside], source_HWC[~inside])
        assert np.abs(result_HWC[inside].astype(int) - source_HWC[inside]).mean() > 5
        # A tap alone is a dot.
        page.tap("#clear")
        page.tap("#mask", position={"x": 40, "y": 40})
        with page.expect_request("**/hipa/inpaint"):
            page.tap("#make")
        wait_for_image(page, PEAR)
        dot_HW = pixels(form_parts(page)["mask"])[..., 0] > 0
        assert 20 < dot_HW.sum() < 60


def test_a_mask_is_erased_undone_cleared_and_restored(page: Any) -> None:
    page.check("[value=inpaint]", force=True)
    page.uncheck("#live")
    page.fill("#prompt", PEAR)
    give_image(page, png(example_image(64, 32, number=3)))  # height 64, width 32: it is cut
    page.wait_for_selector("#mask")
    assert "cut to its centre" in page.inner_text("#source-note")

    def mask() -> np.ndarray:
        with page.expect_request("**/hipa/inpaint"):
            page.click("#make")
        wait_for_image(page, PEAR)
        return pixels(form_parts(page)["mask"])[..., 0] > 0

    paint(page, (0.2, 0.2), (0.2, 0.8))
    first = mask()
    assert seam_weight(first, 0).sum() == first.sum() > 50
    paint(page, (0.8, 0.2), (0.8, 0.8))
    both = mask()
    assert (both & first).sum() == first.sum() < both.sum()
    page.click("#undo")
    np.testing.assert_array_equal(mask(), first)
    page.click("#erase")
    paint(page, (0.2, 0.2), (0.2, 0.4))
    page.click("#erase")
    assert mask().sum() < first.sum()
    page.click("#clear")
    page.click("#make")
    assert "Paint over the part" in page.inner_text("#error")
    # The keyboard paints too.
    page.focus("#mask")
    for key in ("ArrowLeft", "ArrowLeft", "Space"):
        page.keyboard.press(key)
    assert mask()[:, :16].any()
    # The newest image but four was made of the first mask.
    page.locator("#history button").nth(4).click()
    page.wait_for_selector("#history button:nth-child(1)[aria-current], #history li:nth-child(5)")
    page.wait_for_function("() => !document.querySelector('#clear').disabled")
    np.testing.assert_array_equal(mask(), first)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_comes_by_hand(page: Any, event: str) -> None:
    source_HWC = example_image(40, 40, number=3)
    page.check("[value=upscale]", force=True)
    drop_image(page, png(source_HWC), event)
    page.wait_for_function("() => document.querySelector('#result').naturalWidth > 0")
    result = shown(page)
    assert result.shape[0] == result.shape[1] > 40
    np.testing.assert_array_equal(shown(page, "#source-image"), source_HWC)


def test_an_edit_with_a_strength_and_a_large_photo(page: Any) -> None:
    page.check("[value=edit]", force=True)
    page.select_option("#strength", "0.5")
    page.fill("#prompt", PEAR)
    with page.expect_request("**/hipa/edit"):
        give_image(page, png(example_image(300, 400, number=3)))
    wait_for_image(page, PEAR)
    sent = form_parts(page)
    assert sent["strength"] == "0.5"
    assert pixels(sent["image"]).shape == (64, 64, 3)  # twice the model's size
    note = page.inner_text("#source-note").replace("\u00d7", "x")
    assert note == "400 x 300 pixels, cut to its centre and reduced: 64 x 64"


def test_a_control_image_is_followed(page: Any, server: Server) -> None:
    control_HWC = example_image(32, 32, number=3)
    page.check("[value=control]", force=True)
    assert page.inner_text("#source-title") == "Control image"
    assert "tiny-lines" in page.inner_text("#control-help")
    assert "control image" in page.inner_text("#empty")
    assert page.is_hidden("#strength-field")
    page.fill("#prompt", PEAR)
    page.fill("#seed", "5")
    with page.expect_request("**/hipa/control"):
        give_image(page, png(control_HWC))
    wait_for_image(page, PEAR, "5")
    sent = form_parts(page)
    assert sent["scale"] == "1"
    np.testing.assert_array_equal(pixels(sent["image"]), control_HWC)
    at_one = shown(page)
    np.testing.assert_array_equal(at_one, api_control(server, control_HWC, scale="1", seed="5"))
    # The slider by the keyboard: the image changes while it moves.
    page.focus("#scale")
    with page.expect_request(lambda request: "/hipa/control" in request.url):
        page.keyboard.press("Home")
    wait_for_image(page, PEAR, "5")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#scale-value") == "0.05"
    page.wait_for_function("() => window.lastForm.some(([, value]) => value === '0.05')")
    wait_for_image(page, PEAR, "5")
    weak = shown(page)
    np.testing.assert_array_equal(weak, api_control(server, control_HWC, scale="0.05", seed="5"))
    assert (weak != at_one).any()
    # The control image is compared with what followed it.
    np.testing.assert_array_equal(shown(page, "#before"), control_HWC)
    page.click("#make")
    wait_for_image(page, PEAR, "5")
    page.wait_for_selector("#history li:first-child button[aria-current]")
    # The history gives the image, the control image and the scale back.
    page.evaluate("document.querySelector('#scale').value = 2")
    page.locator("#history button").first.click()
    wait_for_image(page, PEAR, "5")
    assert page.input_value("#scale") == "0.05"
    page.wait_for_function("() => !document.querySelector('#source-image').hidden")
    np.testing.assert_array_equal(shown(page, "#source-image"), control_HWC)


def test_an_image_that_followed_another_is_edited_next(page: Any) -> None:
    """It is no control image itself: edges were drawn for one."""
    page.check("[value=control]", force=True)
    page.fill("#prompt", PEAR)
    drop_image(page, png(example_image(32, 32, number=3)))
    wait_for_image(page, PEAR)
    made = shown(page)
    with page.expect_request("**/hipa/edit"):
        page.click("#use")
    wait_for_image(page, PEAR)
    assert page.is_checked("[value=edit]")
    assert page.inner_text("#source-title") == "Your image"
    assert page.is_hidden("#control-help")
    assert page.is_hidden("#scale-field")
    np.testing.assert_array_equal(shown(page, "#source-image"), made)


def test_the_colours_around_a_hole_are_matched_if_wanted(page: Any) -> None:
    page.check("[value=inpaint]", force=True)
    page.fill("#prompt", PEAR)
    give_image(page, png(example_image(32, 32, number=3)))
    page.wait_for_selector("#mask")
    with page.expect_request("**/hipa/inpaint"):
        paint(page, (0.25, 0.5), (0.75, 0.5))
    wait_for_image(page, PEAR)
    assert form_parts(page)["match"] == "true"
    matched = shown(page)
    with page.expect_request("**/hipa/inpaint"):
        page.get_by_label("Match the colours around it").uncheck()
    wait_for_image(page, PEAR)
    assert form_parts(page)["match"] == "false"
    assert (shown(page) != matched).any()
    page.click("#make")
    wait_for_image(page, PEAR)
    page.wait_for_selector("#history li:first-child button[aria-current]")
    page.evaluate("document.querySelector('#match').checked = true")
    page.locator("#history button").first.click()
    page.wait_for_function("() => !document.querySelector('#match').checked")
    page.check("[value=edit]", force=True)
    assert page.is_hidden("#match-field")


def test_a_file_that_is_no_image_replaces_none_in_silence(page: Any) -> None:
    page.check("[value=edit]", force=True)
    page.fill("#prompt", PEAR)
    give_image(page, png(example_image(32, 32, number=3)))
    wait_for_image(page, PEAR)
    give_image(page, b"<svg/>", "image.png")
    page.wait_for_selector("#error")
    assert "cannot be read as an image" in page.inner_text("#error")
    assert page.is_hidden("#source-image")
    assert page.locator("#result.stale").count() == 1


def test_the_keyboard_alone_is_enough(page: Any, server: Server) -> None:
    keys = page.keyboard
    assert page.evaluate("document.activeElement.id") == "prompt"
    keys.type(APPLE)
    keys.press("Enter")
    wait_for_image(page, APPLE)
    keys.press("Control+Enter")
    page.wait_for_function("() => document.querySelector('#seed').value !== '0'")
    seed = page.input_value("#seed")
    wait_for_image(page, APPLE, seed)
    np.testing.assert_array_equal(shown(page), api_image(server, prompt=APPLE, seed=int(seed)))
    # To the history by the Tab key; every stop on the way shows that it has the focus.
    for _ in range(30):
        keys.press("Tab")
        outline = page.evaluate(
            """() => {
              const it = document.activeElement;
              const of = it.closest(".segments label") ?? it;
              return getComputedStyle(of).outlineStyle;
            }"""
        )
        assert outline != "none", page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("document.activeElement.closest('#history') !== null"):
            break
    keys.press("ArrowRight")
    keys.press("Enter")
    wait_for_image(page, APPLE, "0")
    assert page.input_value("#seed") == "0"
    # On a slow machine what was typed so far may have been kept too, as the last ones.
    kept = page.locator("#history button").count()
    assert kept >= 2
    keys.press("Delete")
    assert page.locator("#history button").count() == kept - 1
    # The history is there after a reload.
    page.reload()
    page.wait_for_selector("#history button")
    page.locator("#history button").first.click()
    wait_for_image(page, APPLE, seed)


def test_an_image_is_kept_once(page: Any) -> None:
    """Typed and looked at, then kept by Enter; later taken from the history and downloaded."""
    kept = page.locator("#history button")
    page.fill("#prompt", APPLE)
    page.wait_for_selector("#history button")
    with page.expect_response("**/hipa/generate"):
        page.keyboard.press("Enter")
    wait_for_image(page, APPLE)
    page.wait_for_selector("#history button[aria-current]")
    assert kept.count() == 1
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#history li:nth-child(2)")
    kept.nth(1).click()
    wait_for_image(page, APPLE)
    with page.expect_download():
        page.click("#download")
    assert kept.count() == 2


def test_escape_stops(page: Any) -> None:
    page.route("**/hipa/generate", lambda route: None)
    page.fill("#prompt", APPLE)
    with page.expect_event("requestfailed") as caught:
        keys = page.keyboard
        keys.press("Enter")
        page.wait_for_selector("#stop:enabled")
        keys.press("Escape")
    assert caught.value.failure == "net::ERR_ABORTED"
    assert page.inner_text("#status") == "Stopped."


def test_every_control_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas, a")]
          .filter((it) => it.id !== "file" && !(it.labels?.length || it.textContent.trim()
            || it.getAttribute("aria-label"))).map((it) => it.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("task", ["inpaint", "control"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_nothing_scrolls_sideways(
    browser: Any, server: Server, scheme: str, task: str
) -> None:
    options = {"color_scheme": scheme, "viewport": PHONE, "reduced_motion": "reduce"}
    with open_page(browser, server.url, **options) as page:
        page.check(f"[value={task}]", force=True)
        page.click("#settings summary")
        page.fill("#prompt", "word" * 40)  # a word that is wider than the screen
        give_image(page, png(example_image(32, 32, number=3)))
        page.wait_for_selector("#mask" if task == "inpaint" else "#source-image")
        page.evaluate("document.querySelector('#history').scrollIntoView()")
        page.fill("#seed", "x")
        page.wait_for_selector("#error")
        page.evaluate("document.querySelector('#key-dialog').show()")
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == PHONE["width"]
        ratios = page.evaluate(CONTRAST.read_text())
        assert len(ratios) > 25
        assert [text for text, ratio in ratios if ratio < 4.5] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(17, 20, 27)") == (scheme == "dark")
        moves = "getComputedStyle(document.querySelector('#result')).transitionDuration"
        assert page.evaluate(moves) in ("0s", "")
