"""The measured quality in a card: report folders of ``hipa-evaluate --out``, of COCO too."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import MIB, read_json, read_text
from hipa_deploy.errors import HipaError, HipaWarning

FOLDER = "quality"  # of the report, in the published folder
NUMBERS = "report.json"
TEXT = "report.md"
PICTURES = ("samples.png", "premise.png", "spectra.png")  # a report on COCO has none
OF_THE_ADAPTOR = "Of the adaptor, in PyTorch, before it was merged."
WITH_THIS_ONE = (
    "Run hipa-evaluate --out with the adaptor that you publish, or for a bundle "
    "hipa-evaluate --coco with --rival BUNDLE."
)
AGAIN = "Expected a folder that hipa-evaluate --out wrote."


@dataclass(frozen=True)
class Report:
    """Report folders that were read and belong to what is published.

    Attributes:
        files: what is copied, by its name in ``quality/``.
        text: their texts without the headings; pictures are found from the published folder.

    """

    files: dict[str, Path]
    text: str

    def copy_to(self, published: Path) -> None:
        """Copy the reports' files into ``quality/`` of a folder."""
        target = published / FOLDER
        for name, source in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


@dataclass(frozen=True)
class Subject:
    """What is published, as a report may name it.

    Attributes:
        adaptor_sha256: of the adaptor's weights; of a bundle, of the adaptor merged into it.
        bundle_sha256: of the bundle's manifest; None where an adaptor is published.

    """

    adaptor_sha256: str | None
    bundle_sha256: str | None = None


def read_reports(folders: tuple[Path, ...], subject: Subject) -> Report | None:
    """Read the report folders of one card; None where there is none.

    Args:
        folders: of ``hipa-evaluate --out``: the comparison with the teacher, and one of each year
            of COCO.
        subject: what is published.

    Raises:
        HipaError: as ``read_report``; or two reports of one kind.

    """
    files: dict[str, Path] = {}
    texts = []
    for folder in folders:
        report = read_report(folder, subject)
        if files.keys() & report.files.keys():
            raise HipaError(
                f"--report {folder} is of the same kind as another one. Give one report of the "
                "comparison with the teacher, and one of each year of COCO."
            )
        files |= report.files
        texts.append(report.text)
    return Report(files, "\n\n".join(texts)) if texts else None


def check_report(folder: Path) -> None:
    """Check that a folder has a report's files, which takes no time.

    Raises:
        HipaError: a file is missing.

    """
    for name in (TEXT, NUMBERS):
        if not (folder / name).is_file():
            raise HipaError(f"--report {folder} has no {name}. {AGAIN}")


def read_report(folder: Path, subject: Subject) -> Report:
    """Read a report folder: the comparison with the teacher, or FID and CLIP score on COCO.

    A report says since version 0.2 which adaptor it measured. An older one gets a warning.

    Args:
        folder: of ``hipa-evaluate --out``.
        subject: what is published.

    Raises:
        HipaError: a file is missing or damaged, or the report measured something else.

    """
    check_report(folder)
    numbers = read_json(folder / NUMBERS, remedy=AGAIN)
    if not isinstance(numbers, dict) or not isinstance(numbers.get("rows"), dict):
        raise HipaError(f"--report {folder}: {NUMBERS} is no quality report. {AGAIN}")
    text = read_text(folder / TEXT, max_bytes=MIB)
    protocol = numbers.get("protocol")
    if isinstance(protocol, dict):
        return _coco_report(folder, numbers["rows"], protocol, text, subject)

    for name in PICTURES:
        if not (folder / name).is_file():
            raise HipaError(f"--report {folder} has no {name}. {AGAIN}")
    measured = numbers.get("adaptor_sha256")
    if "adaptor_sha256" in numbers and measured is None:
        raise HipaError(f"--report {folder} measured no adaptor. {WITH_THIS_ONE}")
    if measured is None:
        warnings.warn(
            f"report {folder} does not say which adaptor it measured: it is published unchecked.",
            HipaWarning,
            stacklevel=2,
        )
    elif measured != subject.adaptor_sha256:
        raise _of_another(folder)
    text = re.sub(r"\A# .*\n+", "", text)
    text = re.sub(r"\]\((\w+\.png)\)", rf"]({FOLDER}/\1)", text).strip()
    if subject.bundle_sha256 is not None:
        text = f"{OF_THE_ADAPTOR}\n\n{text}"
    return Report({name: folder / name for name in (TEXT, NUMBERS, *PICTURES)}, text)


def _coco_report(
    folder: Path,
    rows: dict[str, Any],
    protocol: dict[str, Any],
    text: str,
    subject: Subject,
) -> Report:
    """A report on COCO, whose rows say each which adaptor or bundle it is of.

    Its figures, intervals and protocol go into the card as its text has them. Its rows' files stay
    where they are: tens of thousands of images and their features.
    """
    year = protocol.get("year")
    adaptors = set()
    bundles: dict[str, str] = {}
    for name, row in rows.items():
        identity = row.get("identity") if isinstance(row, dict) else None
        if isinstance(identity, dict) and "bundle" in identity:
            bundles[str(identity["bundle"])] = name
        elif isinstance(identity, dict):
            adaptors.add(str(identity.get("adaptor")))
    if year not in (2014, 2017) or not (adaptors or bundles):
        raise HipaError(f"--report {folder}: {NUMBERS} is no report on COCO. {AGAIN}")

    of_adaptor = subject.adaptor_sha256 is not None and subject.adaptor_sha256 in adaptors
    own_row = bundles.get(str(subject.bundle_sha256))
    if own_row is None and not of_adaptor:
        raise _of_another(folder)

    # Headings of the card are one level above those of the report.
    text = re.sub(r"^(#+) ", r"##\1 ", text.strip(), flags=re.MULTILINE)
    if own_row is not None:
        text = f"Of this bundle in the row '{own_row}'.\n\n{text}"
    elif subject.bundle_sha256 is not None:
        text = f"{OF_THE_ADAPTOR}\n\n{text}"
    names = {f"coco-{year}/{name}": folder / name for name in (TEXT, NUMBERS)}
    return Report(names, text)


def _of_another(folder: Path) -> HipaError:
    return HipaError(f"--report {folder} measured something else (hashes differ). {WITH_THIS_ONE}")
