"""The base model, as a card names it: its id on the hub and its licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hipa_deploy.bundle.manifest import ModelInfo
from hipa_deploy.embedded import MODEL, NAME
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.adaptor_folder import AdaptorMetadata
from hipa_deploy.models.locate import model_folder, model_name
from hipa_deploy.models.weights.weight_identity import has_identity, hint_of_0_1_0

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # an identifier of the hub, such as openrail++
_MOST = 96  # characters of a repository's name, https://huggingface.co/docs/huggingface_hub


@dataclass(frozen=True)
class BaseModel:
    """What a card says of the base model.

    Attributes:
        name: for people: the hub id, 'emoji', or the name of a folder.
        hub_id: owner/name; None where the model is not known to be on the hub.
        licence: the hub's identifier, such as creativeml-openrail-m; None where nothing says it.

    """

    name: str
    hub_id: str | None
    licence: str | None

    @property
    def folder(self) -> str:
        """What a loader of diffusers is given: the hub id, or a folder to be replaced."""
        return self.hub_id or f"path/to/{self.name}"

    @property
    def option(self) -> str:
        """What --model of hipa-deploy is given."""
        return NAME if self.name == NAME else self.folder


def check_hub_id(option: str, name: str) -> None:
    """Check the name of a repository.

    Raises:
        HipaError: it is not owner/name.

    """
    is_clean = ".." not in name and "--" not in name and len(name) <= _MOST
    if not (_HUB_ID.fullmatch(name) and is_clean and not name.endswith((".git", ".", "-"))):
        raise HipaError(
            f"{option} {name} is no name of a repository. Expected owner/name of letters, digits, "
            "'-', '_' and '.'."
        )


def check_licence(licence: str) -> None:
    """Check an identifier of a licence.

    Raises:
        HipaError: it cannot be one.

    """
    if not _LICENCE.fullmatch(licence):
        raise HipaError(
            f"--license {licence} is no identifier of a licence. Expected one of the hub's, such "
            "as openrail++, creativeml-openrail-m or apache-2.0."
        )


def base_of_adaptor(
    metadata: AdaptorMetadata,
    model: str | None,
    hub_id: str | None,
    licence: str | None,
    config: str | None = None,
) -> BaseModel:
    """The base model of an adaptor.

    Args:
        metadata: the adaptor's. It knows the model's hash, and not its name.
        model: the value of --model; None is the embedded model, if the adaptor is for that.
        hub_id: the value of --base-model.
        licence: the value of --license.
        config: the value of --config.

    Raises:
        HipaError: the model is missing, or no model is given and the adaptor is for another than
            the embedded one.

    """
    if model is None:
        if not has_identity(MODEL / "unet", metadata.base_unet_sha256):
            raise HipaError(
                "the card names the base model, and the adaptor knows only its hash. "
                "Give --model, a folder or a hub id."
            )
        model = NAME
    # Its UNet and its licence are asked for; the VAE may have come from elsewhere (--vae).
    folder = model_folder(model, config, needs_vae=False)
    name = model_name(model, folder)
    return _base(name, folder, hub_id, licence)


def base_of_bundle(
    info: ModelInfo,
    model: str | None,
    hub_id: str | None,
    licence: str | None,
    config: str | None = None,
) -> BaseModel:
    """The base model of a bundle.

    Args:
        info: the base model in the bundle's manifest.
        model: the value of --model; None leaves the licence to ``licence``.
        hub_id: the value of --base-model.
        licence: the value of --license.
        config: the value of --config.

    Raises:
        HipaError: the model is missing, has no weights, or is another than the bundle's.

    """
    if model is None:
        return _base(info.name, None, hub_id, licence)
    folder = model_folder(model, config, needs_vae=False)
    # Another model may have another licence.
    if not has_identity(folder / "unet", info.sha256):
        raise HipaError(
            f"the bundle was exported from another base model than {model} (UNet hashes differ). "
            f"Give --model as for the export: {info.name}. Or omit --model, and give --license."
            f"{hint_of_0_1_0(info.sha256)}"
        )
    return _base(info.name, folder, hub_id, licence)


def _base(name: str, folder: Path | None, hub_id: str | None, licence: str | None) -> BaseModel:
    if hub_id is None and _HUB_ID.fullmatch(name):
        hub_id = name
    if licence is None and folder is not None:
        licence = _stated_licence(folder)
    return BaseModel(hub_id or name, hub_id, licence)


def _stated_licence(folder: Path) -> str | None:
    """The licence in the front matter of a model folder's card; None where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    with as_line(f"{card} has no readable front matter", "Give --license."):
        licence = (metadata_load(card) or {}).get("license")
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None
