"""Make tests/tiny_bundles.zip: a bundle of each task, of random weights, for batches of 1 to 8.

    python tests/make_tiny_bundles.py

An export takes seconds, and a server of all tasks needs four of them. So they are kept.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes
from tests.tiny_model import make_model

OUT = Path(__file__).parent / "tiny_bundles.zip"
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
                for path in sorted(out.rglob("*")):
                    archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
