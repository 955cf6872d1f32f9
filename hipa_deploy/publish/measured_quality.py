"""The measured quality in a card: the report folder of ``hipa-evaluate --out``."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.disk.reading import MIB, read_json, read_text
from hipa_deploy.errors import HipaError, HipaWarning

FOLDER = "quality"  # of the report, in the published folder
NUMBERS = "report.json"
TEXT = "report.md"
PICTURES = ("samples.png", "premise.png", "spectra.png")
AGAIN = "Expected a folder that hipa-evaluate --out wrote."


@dataclass(frozen=True)
class Report:
    """A report folder that was read and belongs to what is published.

    Attributes:
        folder: where it is.
        text: its text without the heading; pictures are found from the published folder.

    """

    folder: Path
    text: str

    def copy_to(self, published: Path) -> None:
        """Copy the report's files into ``quality/`` of a folder."""
        target = published / FOLDER
        target.mkdir()
        for name in (TEXT, NUMBERS, *PICTURES):
            shutil.copyfile(self.folder / name, target / name)


def read_report(folder: Path, adaptor_sha256: str | None) -> Report:
    """Read a report folder.

    A report says since version 0.2 which adaptor it measured. An older one gets a warning.

    Args:
        folder: of ``hipa-evaluate --out``.
        adaptor_sha256: of the adaptor that is published, or is merged into the bundle.

    Raises:
        HipaError: a file is missing or damaged, or the report measured another adaptor.

    """
    for name in (TEXT, NUMBERS, *PICTURES):
        if not (folder / name).is_file():
            raise HipaError(f"--report {folder} has no {name}. {AGAIN}")
    numbers = read_json(folder / NUMBERS, remedy=AGAIN)
    if not isinstance(numbers, dict) or "rows" not in numbers:
        raise HipaError(f"--report {folder}: {NUMBERS} is no quality report. {AGAIN}")
    measured = numbers.get("adaptor_sha256")
    if measured is None:
        warnings.warn(
            f"report {folder} does not say which adaptor it measured: it is published unchecked.",
            HipaWarning,
            stacklevel=2,
        )
    elif measured != adaptor_sha256:
        raise HipaError(
            f"--report {folder} measured another adaptor (hashes differ). Run hipa-evaluate --out "
            "with this one."
        )

    text = read_text(folder / TEXT, max_bytes=MIB)
    text = re.sub(r"\A# .*\n+", "", text)
    return Report(folder, re.sub(r"\]\((\w+\.png)\)", rf"]({FOLDER}/\1)", text).strip())
