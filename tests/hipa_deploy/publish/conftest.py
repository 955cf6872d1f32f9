"""What the tests publish: the embedded adaptor, as a copy that they may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from hipa_deploy.embedded import ADAPTOR, MODEL
from hipa_deploy.models.adaptor_folder import METADATA
from hipa_deploy.publish.folders import Wishes, open_publication

PNG = b"\x89PNG"


@pytest.fixture
def adaptor(tmp_path: Path) -> Path:
    """The embedded adaptor, which is an average, as if its recipe had trained it from another."""
    folder = Path(shutil.copytree(ADAPTOR, tmp_path / "my-adaptor"))
    metadata = json.loads((folder / METADATA).read_text())
    del metadata["recipe"]["average"]
    metadata["recipe"]["source"]["images"] = None
    metadata["initial_sha256"] = "d" * 64
    (folder / METADATA).write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def model_with_licence(tmp_path: Path) -> Path:
    """The embedded model's folder with a card as those of the hub have."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "my-model"))
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report folder as hipa-evaluate writes it, of the embedded adaptor."""
    from hipa_deploy.models.adaptor_folder import weights_sha256

    folder = tmp_path / "quality"
    folder.mkdir()
    numbers = {"rows": {}, "adaptor_sha256": weights_sha256(ADAPTOR)}
    (folder / "report.json").write_text(json.dumps(numbers))
    text = "# Quality\n\n64 images.\n\n| | KID-Lite0 |\n|---|---|\n| HiPA | 0.1 |\n\n"
    (folder / "report.md").write_text(text + "![Samples](samples.png)\n")
    for name in ("samples.png", "premise.png", "spectra.png"):
        (folder / name).write_bytes(PNG)
    return folder


@pytest.fixture
def coco_report(tmp_path: Path) -> Path:
    """A report folder as hipa-evaluate --coco writes it, of the embedded adaptor."""
    from hipa_deploy.models.adaptor_folder import weights_sha256
    from hipa_deploy.train.coco.coco_report import RowFeatures, coco_markdown
    from hipa_deploy.train.coco.coco_report import coco_report as measure
    from hipa_deploy.train.coco.protocol import INCEPTION_SHA256, Protocol

    generator = np.random.default_rng(0)
    protocol = Protocol(
        year=2014, images=30_000, captions="random", captions_sha256="1" * 64, resolution=256,
        reference="all", reference_sha256="2" * 64, reference_images=40_504,
        inception_sha256=INCEPTION_SHA256, clip="clip-vit-g-14", clip_sha256="3" * 64,
        clip_size=(1408, 40, 1024),
    )  # fmt: skip
    real = generator.standard_normal((12, 4)).astype(np.float32)
    made = generator.standard_normal((12, 4)).astype(np.float32)
    clip = generator.uniform(0.2, 0.4, 12).astype(np.float32)
    row = RowFeatures(made, clip, (), {"adaptor": weights_sha256(ADAPTOR)})
    report = measure(protocol, real, {"HiPA, one step": row}, [f"caption {n}" for n in range(12)])
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "report.json").write_text(report.model_dump_json())
    (folder / "report.md").write_text(coco_markdown(report))
    (folder / "hipa-one-step").mkdir()  # images and features, which are not published
    return folder


def written(source: str | Path, out: Path, **wishes: object) -> Path:
    """Write what would be uploaded of ``source`` into the new folder ``out``."""
    out.mkdir()
    open_publication(str(source), Wishes("me/one-step", **wishes)).write(out)  # type: ignore[arg-type]
    return out


def front_matter(folder: Path) -> dict[str, object]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    fields: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return fields
