"""What is compared with an adaptor in one report: ``hipa-evaluate --rival``. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.images.source import require_task
from hipa_deploy.models.adaptor_folder import METADATA, read_metadata
from hipa_deploy.models.clip_tokenizer import text_sizes
from hipa_deploy.models.early_config import early_config
from hipa_deploy.models.lora.early_lora import check_adaptor, check_adaptor_path, check_lora
from hipa_deploy.models.one_step.one_step_method import OneStepMethod, check_fits, load_method
from hipa_deploy.models.weights.weight_identity import has_identity
from hipa_deploy.train.data.captions import FORMATS

LORA_FILES = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Rival:
    """A one-step method of others, and the LoRA that it is for.

    Attributes:
        method: how the step is taken.
        lora: its file or folder; None is the base model itself, such as SD-Turbo.

    """

    method: OneStepMethod
    lora: Path | None = None

    @property
    def row(self) -> str:
        """The name of its row in a report."""
        if self.lora is None:
            return f"{self.method.name}, one step"
        return f"{self.lora.stem} ({self.method.name}), one step"


@dataclass(frozen=True)
class OtherAdaptor:
    """Another adaptor of HiPA, which says its own step.

    Attributes:
        folder: that ``hipa-train`` wrote.

    """

    folder: Path

    @property
    def row(self) -> str:
        """The name of its row in a report."""
        return f"{_name(self.folder)} (HiPA), one step"


@dataclass(frozen=True)
class BundleContender:
    """An exported bundle, which the runtime runs.

    Attributes:
        folder: that ``hipa-export`` wrote.

    """

    folder: Path

    @property
    def row(self) -> str:
        """The name of its row in a report."""
        return f"{_name(self.folder)} (bundle)"


@dataclass(frozen=True)
class ImageFolder:
    """Images that something else made of the same prompts.

    Attributes:
        folder: of the files; ``hipa_deploy.train.evaluation.image_folder`` says how they are found.

    """

    folder: Path

    @property
    def row(self) -> str:
        """The name of its row in a report."""
        return f"{_name(self.folder)} (images)"


Contender = Rival | OtherAdaptor | BundleContender | ImageFolder


def contender_path(contender: Contender) -> Path | None:
    """The file or folder of a contender; None for the base model itself."""
    return contender.lora if isinstance(contender, Rival) else contender.folder


def check_contender_files(contenders: Sequence[Contender]) -> None:
    """Check what the files of adaptors and LoRAs show without the model that they are for.

    Raises:
        HipaError: as ``check_adaptor_path``.

    """
    for contender in contenders:
        path = contender_path(contender)
        if path is not None and isinstance(contender, Rival | OtherAdaptor):
            check_adaptor_path(path)


def _name(folder: Path) -> str:
    """The last part of a folder's name, of '.' too."""
    return folder.resolve().name


def parse_contender(text: str) -> Contender:
    """The contender that ``--rival`` names.

    Args:
        text: ``FILE_OR_FOLDER=METHOD`` or ``METHOD`` for a one-step method of others; or a folder:
            an adaptor's, a bundle's, or one of images.

    Raises:
        HipaError: there is no such file, folder or method; or a LoRA without its method.

    Example:
        >>> parse_contender("Hyper-SD15-1step-lora.safetensors=hyper-sd15").row
        'Hyper-SD15-1step-lora (hyper-sd15), one step'
        >>> parse_contender("my-bundle").row
        'my-bundle (bundle)'

    """
    folder = Path(text)
    if folder.is_dir():
        return _of_folder(folder, text)
    if folder.is_file() and folder.suffix.lower() in LORA_FILES:
        raise _without_method(text)
    if "=" not in text and len(folder.parts) > 1 and not folder.exists():
        raise HipaError(
            f"--rival {text} does not exist. Expected a folder of an adaptor, a bundle or images, "
            "or FILE=METHOD."
        )
    return parse_rival(text)


def _of_folder(folder: Path, text: str) -> Contender:
    if (folder / METADATA).exists():
        return OtherAdaptor(folder)
    if (folder / MANIFEST).exists():
        return BundleContender(folder)
    endings = {path.suffix.lower() for path in folder.iterdir()}
    if endings & set(LORA_FILES):
        raise _without_method(text)
    if endings & FORMATS:
        return ImageFolder(folder)
    raise HipaError(
        f"--rival {text}: the folder is no adaptor ({METADATA}), no bundle ({MANIFEST}), and has "
        "no images. Expected one of these, or FILE=METHOD."
    )


def _without_method(text: str) -> HipaError:
    return HipaError(
        f"--rival {text} is a LoRA, and does not say its step. Name its method too: "
        f"--rival {text}=lcm-sd15, or another that --one-step knows."
    )


def parse_rival(text: str) -> Rival:
    """The rival in ``[FILE_OR_FOLDER=]METHOD``.

    Raises:
        HipaError: there is no such file or method.

    Example:
        >>> parse_rival("Hyper-SD15-1step-lora.safetensors=hyper-sd15").row
        'Hyper-SD15-1step-lora (hyper-sd15), one step'

    """
    # The last sign: a path may have others.
    path, _, name = text.rpartition("=")
    return make_rival(name, Path(path) if path else None, f"--rival {text}")


def make_rival(name: str, lora: Path | None, option: str) -> Rival:
    """The rival of a method's name and a LoRA.

    Args:
        name: as for ``load_method``, but 'hipa'.
        lora: a file or folder.
        option: what the user said, for messages.

    Raises:
        HipaError: there is no such method or file; a method without the LoRA that it needs; an
            adaptor of HiPA, which says its step itself.

    """
    method = load_method(name)
    if method is None:
        raise HipaError(f"{option}: hipa is the step of --adaptor. Leave it out.")
    if lora is None:
        if method.needs_adaptor:
            raise HipaError(
                f"{option}: {name} is a LoRA. Name its file too: --rival FILE={name}, or --adaptor "
                f"FILE --one-step {name}."
            )
        return Rival(method)
    if not lora.exists():
        raise HipaError(
            f"{option}: {lora} does not exist. Expected a one-step LoRA's file or folder."
        )
    if (lora / METADATA).exists():
        raise HipaError(
            f"{option}: {lora} is an adaptor of HiPA, which says its own step. Give it as "
            f"--adaptor or --rival alone; for a model that is one-step itself give --adaptor none."
        )
    return Rival(method, lora)


def check_contenders(contenders: Sequence[Contender], model: Path) -> None:
    """Check what the headers of files show, before anything is loaded.

    Args:
        contenders: of one report.
        model: the diffusers folder of the base model.

    Raises:
        HipaError: two of one name; a method, LoRA or adaptor for another model or task; a bundle
            that is damaged or makes no image from text.

    """
    rows = [contender.row for contender in contenders]
    for contender in contenders:
        if rows.count(contender.row) > 1:
            raise HipaError(
                f"--rival: two of them are called {contender.row!r}. Rename one of the files."
            )
        if isinstance(contender, Rival):
            _check_rival(contender, model)
        elif isinstance(contender, OtherAdaptor):
            _check_other_adaptor(contender, model)
        elif isinstance(contender, BundleContender):
            require_task(Bundle.open(contender.folder), "generate")


def _check_rival(rival: Rival, model: Path) -> None:
    check_fits(rival.method, early_config(model))
    if rival.lora is not None:
        check_lora(rival.lora, model, ("unet", "text_encoder"))


def _check_other_adaptor(contender: OtherAdaptor, model: Path) -> None:
    metadata = check_adaptor(contender.folder, model)
    if metadata is not None and metadata.task != "generate":
        raise HipaError(
            f"adaptor {contender.folder} is for the task {metadata.task}. "
            "Expected one for text to image."
        )


def bundle_notes(
    contender: BundleContender, model: Path, text: TextSettings | None = None
) -> list[str]:
    """What a reader of a report should know of a bundle's row, a sentence each.

    Args:
        contender: the bundle.
        model: the diffusers folder of the base model of the report's other rows.
        text: how the prompts of the other rows are encoded; None is not compared.

    Raises:
        HipaError: not a bundle.

    """
    manifest = Bundle.open(contender.folder).manifest
    notes = [f"It is run by the runtime, in {manifest.precision}."]
    if not has_identity(model / "unet", manifest.base_model.sha256):
        notes.append("Its base model is another one than that of the other rows.")
    return notes + _text_notes(manifest.text, text, model)


def adaptor_notes(
    contender: OtherAdaptor, model: Path, text: TextSettings | None = None
) -> list[str]:
    """What a reader should know of another adaptor's row; arguments as for ``bundle_notes``."""
    metadata = read_metadata(contender.folder, model)
    teacher = metadata.recipe.get("teacher")
    guidance = teacher.get("guidance") if isinstance(teacher, dict) else None
    notes = []
    if isinstance(guidance, int | float):
        notes.append(f"It was trained on a teacher of guidance {guidance:g}.")
    return notes + _text_notes(metadata.text, text, model)


def _text_notes(own: TextSettings, others: TextSettings | None, model: Path) -> list[str]:
    """A sentence where a row reads prompts in another way than the other rows."""
    if others is None:
        return []
    at_once, _ = text_sizes(early_config(model))
    ways = []
    for settings in (own, others):
        tokens = settings.context_tokens or at_once
        ways.append((tokens, settings.clip_skip, settings.prompt_weights))
    if ways[0] == ways[1]:
        return []
    tokens, skip, weights = ways[0]
    brackets = "weights" if weights else "text"
    return [
        f"It reads prompts in a way of its own: {tokens} tokens, clip skip {skip}, brackets are "
        f"{brackets}."
    ]
