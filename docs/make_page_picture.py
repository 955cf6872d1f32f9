"""Make docs/images/page.png: the page of hipa-serve with numbers beside its parts.

    python docs/make_page_picture.py [BUNDLE]

BUNDLE is one of the embedded adaptor to inpaint; without it one is exported, which needs the extra
``export``. The script also needs the extra ``serve``, playwright, and Chromium. The page is the
real one: it repaints a part of an image of the embedded model.

The numbers are those of the list in docs/tutorials/service.md.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests know how to start a server and a browser

from hipa_deploy import embedded  # noqa: E402
from tests.browser import open_browser, open_page  # noqa: E402
from tests.served import running  # noqa: E402

OUT = ROOT / "docs/images/page.png"
SIZE = {"width": 1240, "height": 880}
COLOURS = 255  # of the palette; the picture stays small
SOURCE = "3d emoji of a red apple"
PROMPT = "3d emoji of a green apple"
HISTORY = ("3d emoji of a cat", "3d emoji of a rocket", SOURCE)
# What is numbered, in the order of the list in the tutorial.
PARTS = (
    "#tasks",
    "#prompt",
    "#dice",
    "#settings",
    "#drop",
    "#brush-tools",
    "#latency",
    "#compare-field",
    "#download",
    "#history",
)

# A number stands at the upper left corner of its part.
LABEL = """
  ([selector, number]) => {
    const box = document.querySelector(selector).getBoundingClientRect();
    const label = document.createElement("span");
    label.textContent = number;
    Object.assign(label.style, {
      position: "absolute", zIndex: 9, width: "24px", height: "24px", borderRadius: "12px",
      background: "#c2410c", color: "#fff", font: "600 14px/24px system-ui", textAlign: "center",
      left: `${Math.max(2, box.left + scrollX - 13)}px`, top: `${box.top + scrollY - 13}px`,
    });
    document.body.append(label);
  }
"""


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as name:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else exported(Path(name))
        with running("emoji", str(bundle), "--backend", "onnxruntime") as server:
            picture = taken(server.url)
    small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def exported(folder: Path) -> Path:
    """The bundle of the embedded adaptor to inpaint."""
    from hipa_deploy.export.export_bundle import export_bundle
    from hipa_deploy.export.export_options import ExportOptions

    bundle = folder / "emoji-inpaint"
    adaptor = embedded.ADAPTORS["emoji-inpaint"]
    export_bundle(ExportOptions(model="emoji", adaptor=adaptor, task="inpaint", out=bundle))
    return bundle


def taken(url: str) -> Image.Image:
    """A picture of the page at a URL."""
    options = {"viewport": SIZE, "color_scheme": "light"}
    with open_browser() as browser, open_page(browser, url, **options) as page:
        fill(page)
        for number, selector in enumerate(PARTS, start=1):
            page.evaluate(LABEL, [selector, number])
        return Image.open(io.BytesIO(page.screenshot()))


def fill(page: Any) -> None:
    """Make some images, and repaint the upper half of the last one."""
    for number, prompt in enumerate(HISTORY, start=1):
        page.fill("#prompt", prompt)
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#history li:nth-child({number})")
    page.click("#use")
    page.check("[value=inpaint]", force=True)
    page.wait_for_selector("#mask")
    page.fill("#prompt", PROMPT)
    page.evaluate("() => { document.querySelector('#brush-size').value = 40; }")
    box = page.locator("#mask").bounding_box()

    def place(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    page.mouse.move(*place(0.3, 0.6))
    page.mouse.down()
    page.mouse.move(*place(0.7, 0.6), steps=8)
    page.mouse.up()
    page.wait_for_selector(f"#history li:nth-child({len(HISTORY) + 1})")
    page.evaluate("() => scrollTo(0, 0)")


if __name__ == "__main__":
    main()
