"""What the tests publish: the embedded adaptor, as a copy that they may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hipa_deploy.embedded import ADAPTOR, MODEL
from hipa_deploy.publish.folders import Wishes, open_publication

PNG = b"\x89PNG"


@pytest.fixture
def adaptor(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ADAPTOR, tmp_path / "my-adaptor"))


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
