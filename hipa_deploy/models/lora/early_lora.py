"""What a LoRA, an adaptor or an embedding shows without torch, before anything is loaded.

``read_lora`` checks all of it again, and more: every kind of file, and every formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hipa_deploy.disk.files import check_name
from hipa_deploy.disk.reading import check_regular
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    WEIGHTS,
    AdaptorMetadata,
    read_metadata,
)
from hipa_deploy.models.kind import SECOND, has_second_encoder
from hipa_deploy.models.lora.find_lora import find_lora
from hipa_deploy.models.lora.kinds import Shaped, kind_of
from hipa_deploy.models.lora.lora_file import by_layer, check_family
from hipa_deploy.models.lora.names import ModuleNames
from hipa_deploy.models.style import Style
from hipa_deploy.models.weights.early_check import check_tensors, known_shapes
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.models.weights.pickled import MAX_PICKLED, check_stored
from hipa_deploy.models.weights.weight_file import PICKLED, SAFETENSORS, read_layout

# Of an embedding for SDXL, the tensor of each text encoder.
SDXL_KEYS = {"clip_l": "text_encoder", "clip_g": SECOND}

Shapes = Mapping[str, tuple[int, ...]]


def check_adaptor(adaptor: Path, model: Path) -> AdaptorMetadata | None:
    """Check an adaptor's folder, or a LoRA of another tool, for the model in a diffusers folder.

    Returns:
        The adaptor's metadata; None for a LoRA of another tool.

    Raises:
        HipaError: there is none, it is damaged, half, not finite or for another model.

    """
    metadata = check_adaptor_path(adaptor)
    check_lora(adaptor, model, ("unet",))
    if (adaptor / ENCODER_WEIGHTS).exists():
        check_lora(adaptor / ENCODER_WEIGHTS, model, ("vae",))
    if metadata is not None:
        # Last, as the hash of a large model takes seconds.
        read_metadata(adaptor, model)
    return metadata


def check_adaptor_path(adaptor: Path) -> AdaptorMetadata | None:
    """Check what an adaptor's folder, or a LoRA, shows without its model.

    So a mistake is said before a model is fetched or converted, which may take minutes.

    Returns:
        The adaptor's metadata; None for a LoRA of another tool.

    Raises:
        HipaError: there is none, or a file of it is missing, damaged or not finite.

    """
    check_name(adaptor)
    if not adaptor.exists():
        raise HipaError(
            f"{adaptor} does not exist. Expected an adaptor folder, as hipa-train writes it, "
            "or a LoRA's .safetensors file."
        )
    metadata = None
    if (adaptor / METADATA).exists():
        metadata = read_metadata(adaptor)
        if not (adaptor / WEIGHTS).is_file():
            raise HipaError(f"{adaptor}: no {WEIGHTS} in it. Copy the adaptor again.")
    _check_own_files(adaptor)
    if (adaptor / ENCODER_WEIGHTS).exists():
        check_tensors(adaptor / ENCODER_WEIGHTS)
    return metadata


def _check_own_files(lora: Path) -> None:
    """Raise HipaError unless the files of a LoRA are there and whole."""
    for file in find_lora(lora):
        _check_own_file(file.path)


def _check_own_file(path: Path) -> None:
    if path.suffix.lower() == SAFETENSORS:
        check_tensors(path)
    else:
        check_stored(path, MAX_PICKLED, "Copy the file again.")


def check_before_model(model: str, style: Style, *adaptors: Path | None) -> None:
    """Check all that a command merges, before its model is fetched or converted.

    Args:
        model: the value of ``--model``.
        style: the LoRAs and embeddings.
        adaptors: folders of adaptors, or files of LoRAs, that are merged besides; None is passed
            over.

    Raises:
        HipaError: as ``check_adaptor_path``, ``check_style_files`` and ``check_checkpoint_family``.

    """
    for adaptor in adaptors:
        if adaptor is not None:
            check_adaptor_path(adaptor)
    check_style_files(style)
    check_checkpoint_family(model, style, *adaptors)


def check_style_files(style: Style) -> None:
    """Check what the files of ``--lora`` and ``--embedding`` show without a model.

    Raises:
        HipaError: one is missing, damaged, not finite or of another kind.

    """
    for lora in style.loras:
        _check_own_files(lora.path)
    for embedding in style.embeddings:
        _check_embedding(embedding.path)


def check_checkpoint_family(model: str, style: Style, *adaptors: Path | None) -> None:
    """Check that LoRAs are of the family of a checkpoint in one file, before it is converted.

    Args:
        model: the value of ``--model``. What is no file is checked when its folder is there.
        style: the LoRAs.
        adaptors: folders and files that are merged besides; None is passed over.

    Raises:
        HipaError: one is for another family, or the checkpoint is damaged.

    """
    files = [file for lora in style.loras for file in find_lora(lora.path)]
    for adaptor in adaptors:
        if adaptor is not None:
            files += find_lora(adaptor)
    if not files or not Path(model).is_file():
        return
    from hipa_deploy.models.single_file import text_width

    width = text_width(Path(model))
    for file in files:
        if width is not None and file.path.suffix.lower() == SAFETENSORS:
            check_family(file.path, read_layout(file.path), width)


def _check_embedding(path: Path) -> None:
    if path.suffix.lower() not in (SAFETENSORS, *PICKLED):
        endings = ", ".join((SAFETENSORS, *PICKLED))
        raise HipaError(f"{path} is no embedding file. Expected one that ends in: {endings}.")
    _check_own_file(path)


def check_style(style: Style, model: Path) -> None:
    """Check the files of ``--lora`` and ``--embedding`` for the model in a diffusers folder.

    Raises:
        HipaError: one is damaged, half, not finite or for another model.

    """
    parts = ["unet", "text_encoder"]
    has_pair = has_second_encoder(read_config(model, "model_index.json"))
    if has_pair:
        parts.append(SECOND)
    for lora in style.loras:
        check_lora(lora.path, model, parts)
    for embedding in style.embeddings:
        _check_embedding(embedding.path)
        if embedding.path.suffix.lower() == SAFETENSORS:
            names = read_layout(embedding.path)
            if has_pair:
                is_for_both(embedding.path, names)
            elif SDXL_KEYS.keys() & names.keys():
                raise HipaError(
                    f"{embedding.path} is an embedding for SDXL, with vectors for two text "
                    "encoders. Expected one for SD 1.x or 2.x, as the model is."
                )


def is_for_both(path: Path, names: Iterable[object]) -> bool:
    """Whether an embedding's file has vectors for SDXL's two text encoders.

    Args:
        path: the file, for the message.
        names: of its tensors.

    Raises:
        HipaError: it has those for one of the two alone, or more than both.

    """
    given = set(names)
    if not given & set(SDXL_KEYS):
        return False
    if given != set(SDXL_KEYS):
        found = ", ".join(sorted(map(str, given))[:3])
        raise HipaError(f"{path} holds {found}. Expected clip_l and clip_g, and no more.")
    return True


def check_lora(path: Path, model: Path, parts: Sequence[str]) -> None:
    """Check a LoRA's file or folder for ``parts`` of the model in a diffusers folder.

    Files that torch has pickled are left for later, and so is the rest of a model of such files.

    Raises:
        HipaError: as for ``read_lora``.

    """
    shapes: dict[str, Shapes] = {}
    for part in parts:
        known = known_shapes(model / part)
        if known is not None:
            shapes[part] = known
    for file in find_lora(path):
        check_regular(file.path)
        if file.path.suffix.lower() != SAFETENSORS:
            continue
        layouts = check_tensors(file.path)
        if len(shapes) < len(parts):
            continue
        for key, roles in by_layer(file.path, layouts, _modules(shapes), file.part).items():
            try:
                kind = kind_of(str(key), roles)
                if kind == "lora":
                    _check_pair(str(key), roles, shapes[key.part][f"{key.module}.weight"])
            except HipaError as error:
                raise HipaError(f"{file.path}: {error}") from None


def _modules(shapes: Mapping[str, Shapes]) -> ModuleNames:
    """The layers with a weight, by the names of a model's tensors."""
    names: dict[str, Iterable[str]] = {}
    context_width = None
    for part, tensors in shapes.items():
        modules = []
        for name, shape in tensors.items():
            module, _, end = name.rpartition(".")
            if end == "weight":
                modules.append(module)
            if name.endswith("attn2.to_k.weight") and shape:
                context_width = shape[-1]
        names[part] = modules
    return ModuleNames(names, context_width)


def _check_pair(layer: str, roles: Mapping[str, Shaped], weight: tuple[int, ...]) -> None:
    """Raise HipaError unless two matrices fit each other and the weight that they change."""
    down = tuple(roles["down"].shape)
    up = tuple(roles["up"].shape)
    if "mid" in roles:  # a core tensor stands between: the formula checks it
        return
    fits = len(down) > 1 and len(up) > 1 and len(weight) > 1
    fits = fits and down[0] == up[1] and down[1] == weight[1] and up[0] == weight[0]
    if not fits:
        raise HipaError(
            f"layer {layer}: matrices of shape {list(down)} and {list(up)} do not fit the "
            f"model's weight of shape {list(weight)}. Use the LoRA with the model family that it "
            "was trained on."
        )
