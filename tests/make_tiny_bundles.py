"""Make tests/tiny_bundles.zip: a bundle of each task, of random weights, for batches of 1 to 8.

That of the task control is in tests/tiny_control.zip, with a ControlNet of random weights. And
tests/tiny_refine.zip: a bundle that refines, with an adaptor of random weights. And
tests/tiny_sdxl.tar.xz: a bundle of each task of a tiny SDXL, and one with baked prompts. Those
to generate refine.

    python tests/make_tiny_bundles.py

An export takes seconds, and a server of all tasks needs five of them. So they are kept.
"""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from pathlib import Path

from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes
from tests.export.conftest import make_adaptor
from tests.tiny_controlnet import make_controlnet
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

OUT = Path(__file__).parent / "tiny_bundles.zip"
CONTROL_OUT = Path(__file__).parent / "tiny_control.zip"
REFINE_OUT = Path(__file__).parent / "tiny_refine.zip"
SDXL_OUT = Path(__file__).parent / "tiny_sdxl.tar.xz"
REFINE_NAME = "tiny-refine"
TEACHER = {"sampler": "ddim", "steps": 7, "guidance": 3.5}
TASKS = {
    "tiny": {},
    "tiny-edit": {"task": "edit", "strengths": (0.75, 0.5)},
    "tiny-inpaint": {"task": "inpaint"},
    "tiny-upscale": {"task": "upscale"},
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED) as archive:
            for task, options in TASKS.items():
                axes = parse_axes("batch=1:4:8")
                out = folder / task
                export_bundle(ExportOptions(model=str(model), out=out, dynamic=axes, **options))
                add(archive, out)
        make_control_bundle(model, folder)
        make_refine_bundle(model, folder)
        make_sdxl_bundles(folder)


def make_control_bundle(model: Path, folder: Path) -> None:
    """Write CONTROL_OUT."""
    controlnet = make_controlnet(model, folder / "tiny-lines")
    out = folder / "tiny-control"
    axes = parse_axes("batch=1:4:8")
    export_bundle(ExportOptions(model=str(model), out=out, controlnet=controlnet, dynamic=axes))
    with zipfile.ZipFile(CONTROL_OUT, "w", zipfile.ZIP_DEFLATED) as archive:
        add(archive, out)


def make_refine_bundle(model: Path, folder: Path) -> None:
    """Write REFINE_OUT."""
    adaptor = make_adaptor(model, folder / "adaptor", recipe={"teacher": TEACHER})
    out = folder / REFINE_NAME
    options = ExportOptions(
        model=str(model), out=out, adaptor=adaptor, with_teacher=True,
        dynamic=parse_axes("batch=1:2:4"),
    )  # fmt: skip
    export_bundle(options)
    with zipfile.ZipFile(REFINE_OUT, "w", zipfile.ZIP_DEFLATED) as archive:
        add(archive, out)


def make_sdxl_bundles(folder: Path) -> None:
    """Write SDXL_OUT: as one stream, in which what the bundles have in common is there once."""
    model = make_sdxl(folder / "sdxl")
    axes = parse_axes("batch=1:2:4")
    adaptor = make_adaptor(
        model, folder / "sdxl-adaptor", recipe={"teacher": TEACHER}, resolution=(64, 64)
    )
    taught = {"adaptor": adaptor, "with_teacher": True}
    bundles = {f"sdxl-{name}": options or taught for name, options in TASKS.items()}
    bundles["sdxl-tiny-baked"] = {**taught, "prompts": model / "prompts.txt"}
    with tarfile.open(SDXL_OUT, "w:xz") as archive:
        for name, options in bundles.items():
            out = folder / name
            export_bundle(ExportOptions(model=str(model), out=out, dynamic=axes, **options))
            archive.add(out, out.name)


def add(archive: zipfile.ZipFile, bundle: Path) -> None:
    """Put a bundle into an archive."""
    for path in sorted(bundle.rglob("*")):
        archive.write(path, path.relative_to(bundle.parent))


if __name__ == "__main__":
    main()
