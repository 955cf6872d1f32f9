"""The folder of a repository: what of an adaptor or a bundle is published, and its card."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.signature import signature_path
from hipa_deploy.disk.reading import inside, read_json
from hipa_deploy.embedded import ADAPTORS, NAME, resolve_adaptor, resolve_bundle
from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    WEIGHTS,
    read_metadata,
    weights_sha256,
)
from hipa_deploy.models.locate import check_model_name, model_folder
from hipa_deploy.publish.adaptor_card import adaptor_card
from hipa_deploy.publish.base_model import BaseModel, base_of_adaptor, base_of_bundle
from hipa_deploy.publish.bundle_card import bundle_card
from hipa_deploy.publish.leaks import CARD, refuse_local_paths
from hipa_deploy.publish.measured_quality import Report, Subject, check_report, read_reports
from hipa_deploy.publish.peft_files import write_peft_files

SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Wishes:
    """What the user says of a repository.

    Attributes:
        repo: owner/name.
        model: the base model: a folder, a file or a hub id.
        base_model: its id on the hub, where ``model`` is a folder.
        licence: of the base model, where its folder does not say it.
        reports: report folders of hipa-evaluate.
        config: what a ``model`` in one file is of.

    """

    repo: str
    model: str | None = None
    base_model: str | None = None
    licence: str | None = None
    reports: tuple[Path, ...] = ()
    config: str | None = None


@dataclass(frozen=True)
class Publication:
    """What is published: it was checked, and nothing is written yet.

    Attributes:
        source: the adaptor's or the bundle's folder.
        files: names in it that are published. A list of what belongs there: a folder may hold a
            training's checkpoints, or engines of this machine.
        base: the base model.
        report: the measured quality.
        finish: writes the other files into the folder, and returns the card.

    """

    source: Path
    files: tuple[str, ...]
    base: BaseModel
    report: Report | None
    finish: Callable[[Path], str]

    def write(self, folder: Path) -> None:
        """Write the repository's files into an empty ``folder``.

        Raises:
            HipaError: a file is damaged, or names a folder of this machine.

        """
        for name in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(self.source, name), target)
        if self.report is not None:
            self.report.copy_to(folder)
        card = self.finish(folder)
        (folder / CARD).write_text(card, encoding="utf-8")
        refuse_local_paths(folder, [self.source.resolve().parent])


def check_paths(source: str, wishes: Wishes) -> None:
    """Check that what was named is there, before anything is read.

    Args:
        source: as for ``open_publication``.
        wishes: the user's.

    Raises:
        HipaError: a folder or a report does not exist.

    """
    _source_folder(source)
    for folder in wishes.reports:
        check_report(folder)
    if wishes.model is not None:
        check_model_name(wishes.model)


def open_publication(source: str, wishes: Wishes) -> Publication:
    """Check an adaptor or a bundle and everything that its card says.

    Args:
        source: a folder; 'emoji' is the embedded adaptor, 'emoji-bundle' the embedded bundle.
        wishes: the user's.

    Raises:
        HipaError: the folder is neither, is damaged, or does not fit the model or the report.

    """
    folder = _source_folder(source)
    if (folder / MANIFEST).is_file():
        publication = _open_bundle(folder, wishes)
    elif (folder / METADATA).is_file():
        publication = _open_adaptor(folder, wishes)
    else:
        raise HipaError(
            f"{source} is neither an adaptor nor a bundle: it has no {METADATA} and no {MANIFEST}. "
            "Expected a folder that hipa-train or hipa-export wrote."
        )
    _warn_of_gaps(publication.base)
    return publication


def _source_folder(source: str) -> Path:
    if Path(source).exists():
        return Path(source)
    if source == f"{NAME}-bundle":
        return resolve_bundle(NAME)
    if source in ADAPTORS:
        return resolve_adaptor(source)
    raise HipaError(f"{source} does not exist. Expected an adaptor's or a bundle's folder.")


def _open_adaptor(folder: Path, wishes: Wishes) -> Publication:
    metadata = read_metadata(folder)
    digest = weights_sha256(folder)
    config = read_json(folder / SCHEDULER, remedy="Copy the adaptor again.")
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise HipaError(f"{folder / SCHEDULER} names no scheduler. Copy the adaptor again.")
    report = read_reports(wishes.reports, Subject(digest))
    named = (wishes.model, wishes.base_model, wishes.licence, wishes.config)
    base = base_of_adaptor(metadata, *named)
    if wishes.model is not None:
        model = model_folder(wishes.model, wishes.config, needs_vae=False)
        read_metadata(folder, model)  # refuses another model

    def finish(published: Path) -> str:
        write_peft_files(published, metadata, base.hub_id)
        return adaptor_card(published, metadata, wishes.repo, base, report)

    names = [WEIGHTS, METADATA, SCHEDULER]
    if metadata.encoder_rank:
        names.append(ENCODER_WEIGHTS)
    return Publication(folder, tuple(names), base, report, finish)


def _open_bundle(folder: Path, wishes: Wishes) -> Publication:
    bundle = Bundle.open(folder)
    bundle.verify()
    adaptor = bundle.manifest.adaptor
    merged = None if adaptor is None else adaptor.sha256
    report = read_reports(wishes.reports, Subject(merged, bundle.sha256))
    info = bundle.manifest.base_model
    named = (wishes.model, wishes.base_model, wishes.licence, wishes.config)
    base = base_of_bundle(info, *named)
    _check_free(folder, bundle.manifest.files)

    def finish(published: Path) -> str:
        return bundle_card(published, bundle, wishes.repo, base, report)

    names = [MANIFEST, *bundle.manifest.files]
    signature = signature_path(folder / MANIFEST)
    if signature.is_file():
        names.append(signature.name)
    return Publication(folder, tuple(names), base, report, finish)


def _check_free(folder: Path, files: Iterable[str]) -> None:
    """The card is no file of the bundle's manifest, and must not replace one."""
    if CARD in files:
        raise HipaError(f"{folder} lists a {CARD} of its own. Export the bundle again.")


def _warn_of_gaps(base: BaseModel) -> None:
    """Say what the hub will not know."""
    gaps = []
    if base.hub_id is None:
        gaps.append("the base model's id on the hub (--base-model owner/name)")
    if base.licence is None:
        gaps.append("its licence (--license)")
    if gaps:
        warnings.warn(f"the card lacks {' and '.join(gaps)}.", HipaWarning, stacklevel=2)
