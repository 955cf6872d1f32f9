"""From the name of a model, encoder or decoder on the command line to the folder that holds it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

from hipa_deploy.disk.reading import name_problem, read_text
from hipa_deploy.embedded import DECODER, MODEL, NAME, hides_embedded
from hipa_deploy.errors import HipaError, HipaWarning, first_line
from hipa_deploy.models.kind import PARTS, SECOND, check_pipeline, has_second_encoder
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.hub_cache import HUB_PREFIX, repository_name
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.models.weights.weight_file import LORA_FILES, PICKLED, SAFETENSORS
from hipa_deploy.models.weights.weight_files import (
    DIFFUSERS,
    PRECISIONS,
    file_to_load,
    find_weights,
    listed_names,
)

TINY = "tiny"
INDEX = "model_index.json"
CONFIG = "config.json"
# The source of both: https://github.com/madebyollin/taesd. The second is for SDXL's latents.
TAESD = "madebyollin/taesd"
TAESDXL = "madebyollin/taesdxl"


def model_folder(
    name: str, config: str | None = None, vae: str | None = None, *, needs_vae: bool = True
) -> Path:
    """Return the diffusers folder of a base model; convert or download the model if necessary.

    Args:
        name: 'emoji' for the embedded model (unless a folder of that name exists), a diffusers
            folder, a repository's folder in the hub's cache (models--owner--name), a checkpoint in
            one file, or the id of a model on the Hugging Face hub. A checkpoint is converted into
            a folder in the user's cache.
        config: for a checkpoint whose weights do not tell what it is: see
            ``hipa_deploy.models.single_file.converted``.
        vae: another VAE for it, a folder or a file: see
            ``hipa_deploy.models.weights.other_vae.with_vae``; None is the model's own.
        needs_vae: whether a checkpoint without a VAE is refused, where ``vae`` is None.

    Raises:
        HipaError: there is no such folder or file and the hub does not provide it, the checkpoint
            cannot be converted, ``config`` is set for anything but a checkpoint, or the VAE does
            not fit.

    """
    if vae is not None:
        if not vae:
            raise HipaError(
                "--vae is empty. Expected a file of a VAE's weights, or an AutoencoderKL folder."
            )
        from hipa_deploy.models.weights.other_vae import check_vae, with_vae

        # Before a checkpoint is converted, which takes minutes.
        path = check_vae(_in_hub_cache(Path(vae)))
        folder = _own_folder(name, config, needs_vae=False)
        return with_vae(folder, path, Path(model_name(name, folder)).name)
    return _own_folder(name, config, needs_vae=needs_vae)


def _own_folder(name: str, config: str | None, *, needs_vae: bool) -> Path:
    """Return the folder of a model as it came; ``needs_vae`` as for ``single_file.converted``."""
    path = Path(name)
    if path.is_file():
        # A conversion needs torch, which a bundle runs without.
        from hipa_deploy.models.single_file import converted

        # A folder of configurations may be in the hub's cache too.
        place = config and str(_in_hub_cache(Path(config)))
        return converted(path, place, needs_vae=needs_vae)
    if config is not None:
        raise HipaError(
            f"--config is for a checkpoint in one file, and {name} is not one. Omit --config."
        )

    # A folder of the user goes before the embedded model, and both before the hub.
    if name == NAME and not hides_embedded(path):
        return MODEL
    if path.exists():
        return _diffusers_folder(path)
    check_model_name(name)
    return _fetch(name, _download_model)


def check_model_name(name: str) -> None:
    """Check that a model is there or may be on the hub; nothing is read, converted or fetched.

    Args:
        name: as for ``model_folder``.

    Raises:
        HipaError: it is neither a path that exists nor a hub id.

    """
    expected = (
        "Expected a diffusers model folder, a checkpoint in one file, a hub id like owner/name, "
        f"or {NAME}."
    )
    # An empty path is the current folder.
    if not name:
        raise HipaError(f"the name of the model is empty. {expected}")
    if Path(name).exists() or name == NAME:
        return
    if not _may_be_on_hub(name):
        raise HipaError(f"{name} does not exist. {expected}")


def _may_be_on_hub(name: str) -> bool:
    """Whether a name may be a hub id: it is no path, and not that of a file of weights."""
    if "/" not in name or name.startswith(("/", ".")):
        return False
    return Path(name).suffix.lower() not in (SAFETENSORS, *PICKLED)


def model_name(name: str, folder: Path) -> str:
    """Return what a manifest calls a model: a name that says something on another machine.

    Args:
        name: what the user called it.
        folder: its folder, from ``model_folder``.

    Example:
        >>> model_name("x", Path("/cache/models--owner--name/snapshots/0123"))
        'owner/name'

    """
    repository = repository_name(folder)
    if repository is not None:
        return repository
    path = Path(name)
    if name == NAME and not hides_embedded(path):
        return name
    return folder.resolve().name if path.exists() else name


def unpacked(name: str, config: str | None = None, vae: str | None = None) -> str:
    """Return ``name``, or the folder of a checkpoint in one file, or of a model with another VAE.

    Raises:
        HipaError: as for ``model_folder``.

    """
    if config is not None or vae is not None or Path(name).is_file():
        return str(model_folder(name, config, vae))
    return name


def resolve_encoder(name: str, model: str) -> Path | None:
    """Return the AutoencoderTiny folder for the value of ``--encoder``.

    Args:
        name: 'full' for the model's own VAE; 'tiny' for TAESD, or TAESDXL for SDXL's family, since
            the embedded decoder has no encoder of its own; or a folder.
        model: the base model, as for ``model_folder``.

    Returns:
        The folder, or None for 'full'.

    Raises:
        HipaError: the model does not exist, or the hub does not provide it or the tiny encoder.

    """
    if name == "full":
        return None
    if name == TINY:
        return _fetch_tiny(model_folder(model))
    return _in_hub_cache(Path(name))


def resolve_decoder(name: str, model: str) -> Path | None:
    """Return the AutoencoderTiny folder for the value of ``--decoder``.

    Args:
        name: 'full' for the model's own VAE; 'tiny' for the embedded decoder if ``model`` is the
            embedded one, for TAESDXL if it is of SDXL's family, and for TAESD otherwise; or a
            folder.
        model: the base model, as for ``model_folder``.

    Returns:
        The folder, or None for 'full'.

    Raises:
        HipaError: the model does not exist, or the hub does not provide it or the tiny decoder.

    """
    if name == "full":
        return None
    if name != TINY:
        return _in_hub_cache(Path(name))
    folder = model_folder(model)
    # With another VAE its folder is one of links: the latents are still the embedded model's.
    own = (folder / "unet").resolve() == (MODEL / "unet").resolve()
    return DECODER if own else _fetch_tiny(folder)


def _diffusers_folder(path: Path) -> Path:
    """Return the diffusers folder that a user means by a folder."""
    folder = _in_hub_cache(path)
    lora = next((folder / name for name in LORA_FILES if (folder / name).is_file()), None)
    if (folder / INDEX).exists():
        if lora is not None:
            warnings.warn(
                f"{lora} is not loaded with the model: only --lora {lora} merges it.",
                HipaWarning,
                stacklevel=2,
            )
    elif lora is not None:
        raise HipaError(
            f"{folder} has no model_index.json: it holds a LoRA, not a model. Give the base model "
            f"as --model, and this as --lora {lora}, or as --adaptor if hipa-train wrote it."
        )
    elif folder.is_dir():
        # Repositories also hold the whole model in one file, beside the parts or without them.
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in (SAFETENSORS, ".ckpt"):
                raise HipaError(
                    f"{folder} has no model_index.json. Expected a diffusers folder, or a "
                    f"checkpoint in one file, such as {file}"
                )
    return folder


def resolve_controlnet(name: str, model: str) -> Path:
    """Return the diffusers folder for the value of ``--controlnet``.

    Args:
        name: a ControlNetModel folder, a file of a ControlNet's weights, or a hub id.
        model: the base model, as for ``model_folder``.

    Raises:
        HipaError: there is no such folder or file and the hub does not provide it, or it is no
            ControlNet of the model's family.

    """
    from hipa_deploy.models.weights.controlnet import controlnet_folder

    path = Path(name)
    if path.exists():
        return controlnet_folder(_in_hub_cache(path), model_folder(model))
    check_controlnet_name(name)
    return controlnet_folder(_fetch(name, _download_controlnet), model_folder(model))


def check_controlnet_name(name: str) -> None:
    """Check that a ControlNet is there or may be on the hub; nothing is converted or fetched.

    Raises:
        HipaError: it is neither, or what is there is no ControlNet.

    """
    from hipa_deploy.models.weights.controlnet import check_there

    # An empty path is the current folder.
    if not name:
        raise HipaError(
            "--controlnet is empty. Expected a ControlNetModel folder, a file of a ControlNet's "
            "weights, or a hub id like owner/name."
        )
    if Path(name).exists() or not _may_be_on_hub(name):
        check_there(_in_hub_cache(Path(name)))


def _in_hub_cache(path: Path) -> Path:
    """Return the snapshot of a repository's folder in the hub's cache; any other folder as it is.

    The layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    snapshots = path / "snapshots"
    if not path.name.startswith(HUB_PREFIX) or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        revision = read_text(main, max_bytes=1000).strip()
        if name_problem(revision) is None and (snapshots / revision).is_dir():
            return snapshots / revision
    found = sorted(snapshot for snapshot in snapshots.iterdir() if snapshot.is_dir())
    if len(found) == 1:
        return found[0]
    raise HipaError(
        f"{path} has {len(found)} snapshots, and refs/main names none of them. "
        + (f"Give the folder of one, such as {found[0]}" if found else "Download the model again.")
    )


def _fetch_tiny(model: Path) -> Path:
    """Download the AutoencoderTiny for a model's latents into the hub's cache, or find it there."""
    from huggingface_hub import snapshot_download

    # Nothing in its files says which of the two latents it is for: both have four channels.
    repository = TAESDXL if ModelConfig.read(model).has_text_pair else TAESD
    name = repository.rpartition("/")[2]
    try:
        return _fetch(repository, snapshot_download)
    except HipaError as error:
        raise HipaError(
            f"the tiny decoder and encoder of this model are {name.upper()}'s. {error}. Where "
            f"there is a network, run: hf download {repository} --local-dir {name}. Then give that "
            f"folder: --decoder {name}, or --encoder {name}."
        ) from None


def _download_model(name: str) -> str:
    """Download a pipeline into the hub's cache, or find it there.

    Raises:
        HipaError: the repository holds no pipeline, or none that is supported.
        Exception: of the network or the hub.

    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # First one small file: another architecture may have tens of gigabytes.
    try:
        index = Path(hf_hub_download(name, INDEX))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise HipaError(
            f"{name} on the hub has no {INDEX}, so it is no diffusers pipeline. If it has a "
            f"checkpoint in one file, run: hf download {name} FILE --local-dir . and give that "
            "file. A LoRA is given with --lora."
        ) from None
    check_pipeline(Path(name), read_config(index.parent, INDEX))

    from diffusers import DiffusionPipeline

    folder: str = DiffusionPipeline.download(name)
    for variant in PRECISIONS[1:]:
        if not _lacks_weights(Path(folder)):
            break
        # Many repositories have one precision alone, which diffusers fetches only by its name. It
        # raises ValueError where there is none of that name.
        with contextlib.suppress(ValueError):
            folder = DiffusionPipeline.download(name, variant=variant)
    return folder


def _lacks_weights(folder: Path) -> bool:
    """Whether a part of the pipeline in ``folder`` has no weights that could be loaded."""
    parts = [*PARTS]
    if has_second_encoder(read_config(folder, INDEX)):
        parts.append(SECOND)
    for part in parts:
        try:
            find_weights(folder / part)
        except HipaError:
            return True
    return False


def _download_controlnet(name: str) -> str:
    """Download a ControlNet into the hub's cache, or find it there.

    Repositories of ControlNets have pictures, and the same weights in several files: only those
    that will be loaded are fetched.

    Raises:
        HipaError: the repository holds no ControlNet.
        Exception: of the network or the hub.

    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from hipa_deploy.models.weights.controlnet import check_there

    # First one small file: another network may have tens of gigabytes.
    try:
        folder = Path(hf_hub_download(name, CONFIG)).parent
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise HipaError(
            f"{name} on the hub has no {CONFIG}, so it is no ControlNetModel folder. If it has a "
            f"ControlNet in one file, run: hf download {name} FILE --local-dir . and give that "
            "file."
        ) from None
    try:
        check_there(folder)
    except HipaError as error:
        # Its words name the folder in the cache.
        raise HipaError(str(error).replace(str(folder), name)) from None

    chosen = file_to_load(_names_on_hub(name, folder))
    if chosen is None:
        raise HipaError(
            f"{name} on the hub has no weights of a ControlNet: no {DIFFUSERS} that ends in "
            ".safetensors or .bin. Give a repository that has them, or a folder."
        )
    file, is_index = chosen
    path = Path(hf_hub_download(name, file))
    if is_index:
        for shard in listed_names(path):
            hf_hub_download(name, shard)
    return str(folder)


def _names_on_hub(name: str, snapshot: Path) -> list[str]:
    """The names of a repository's files; without a network those that are in the hub's cache."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(name)
    except Exception:  # network and hub errors share no base class
        return [path.name for path in snapshot.iterdir()]


def _fetch(name: str, download: Callable[[str], str]) -> Path:
    """Call ``download`` with a hub id, and turn its failures into one line."""
    try:
        return Path(download(name))
    except HipaError:
        raise
    except Exception as error:  # network, authentication and hub errors share no base class
        raise HipaError(
            f"{name}: no such folder, and the hub did not provide it: {_hub_problem(name, error)}"
        ) from None


def _hub_problem(name: str, error: Exception) -> str:
    """What the hub said, with what to do where that is known; no full stop at the end."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"accept its terms on https://huggingface.co/{name}, and run: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no public repository of this name. For a private one run: hf auth login"
    if isinstance(error, HfHubHTTPError):
        # The first of its lines is the code alone.
        return " ".join(str(error).split())[:200]
    return first_line(error)
