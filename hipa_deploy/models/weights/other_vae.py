"""Another VAE in a model's place (``--vae``): a file that came with a fine-tune, or a folder.

The model with it is a folder in the user's cache that consists of links: to the parts of the model
itself, and to the other VAE. A VAE in one file, in the original layout of CompVis and Stability, is
converted once and found again by its content.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.files import new_folder, scratch_folder, user_cache
from hipa_deploy.errors import HipaError, as_line, brief, first_line
from hipa_deploy.models.weights.converted_once import converted_once
from hipa_deploy.models.weights.hub_cache import repository_name
from hipa_deploy.models.weights.load_part import check_part
from hipa_deploy.models.weights.part_config import build, defaults_of, known_values, read_config
from hipa_deploy.models.weights.weight_file import is_pickled, load_tensors, read_layout
from hipa_deploy.models.weights.weight_files import DIFFUSERS, current_name

if TYPE_CHECKING:
    from torch import Tensor

SECOND = "text_encoder_2"  # of SDXL's family
CONFIG = "config.json"
PART = "vae"
# How names begin in a whole checkpoint, whose VAE is taken, and in the file of a VAE of some tools.
PREFIXES = ("first_stage_model.", "vae.")
# What a VAE's own training leaves in its file: an averaged copy, and a discriminator.
BESIDE_VAE = ("model_ema.", "loss.")
# Each layout of a VAE with an encoder and a decoder has one of these.
ORIGINAL = "encoder.down.0.block.0.conv1.weight"
CURRENT = "encoder.down_blocks.0.resnets.0.conv1.weight"
# Of a tiny autoencoder, in its own layout and in diffusers'.
TINY = ("0.weight", "1.weight", "encoder.layers.0.weight", "decoder.layers.1.weight")
# How names begin beside the VAE's in a whole checkpoint, and the family of models that has them.
BESIDE_TEXT = {
    "conditioner.embedders.": "SDXL's family",
    "cond_stage_model.": "Stable Diffusion 1.x and 2.x",
}
EXPECTED = "Expected one of the model's family."
# What both must have in common, so that the model's latents are the other VAE's.
SAME = ("latent_channels", "in_channels", "out_channels", "scaling_factor", "shift_factor")


def check_vae(vae: Path) -> Path:
    """Return the path of a VAE, after a check of what can be known of it without the model.

    Raises:
        HipaError: there is nothing, or no VAE.

    """
    _check_there(vae)
    if vae.is_dir():
        _part_of(vae)
    else:
        _shapes(vae, _stored(vae))
    return vae


def _check_there(vae: Path) -> None:
    if not vae.exists():
        raise HipaError(
            f"--vae {vae} does not exist. Expected a file of a VAE's weights, or an AutoencoderKL "
            "folder."
        )


def with_vae(model: Path, vae: Path, name: str) -> Path:
    """Return a folder of links to a model's parts, with another VAE in the place of its own.

    Args:
        model: a diffusers folder; of its own VAE the configuration is enough.
        vae: an AutoencoderKL folder, a model's folder that has one, or a file of a VAE's weights:
            in the original layout, alone or in a whole checkpoint, or by diffusers' names.
        name: what the model is called; the folder has it in its name.

    Raises:
        HipaError: no such file or folder, it holds no VAE, or one that does not fit the model.

    Example:
        >>> with_vae(Path("sd15"), Path("vae-ft-mse-840000.safetensors"), "sd15").name
        'sd15 with vae-ft-mse-840000'

    """
    if vae.is_dir():
        part = _part_of(vae)
        _check_same(model, part)
        # A relative path may have no parent in it.
        place = part.resolve()
        whole = place.parent if place.name == PART else place
        called = Path(repository_name(whole) or whole).name
    else:
        _check_there(vae)
        part = _converted(model, vae)
        called = vae.stem
    return _linked(model, part, f"{name} with {called}")


def _part_of(folder: Path) -> Path:
    """The VAE's folder: what was given, or a part of it."""
    for part in (folder, folder / PART):
        if (part / CONFIG).is_file():
            listed = read_config(part, CONFIG).get("_class_name", "AutoencoderKL")
            if listed != "AutoencoderKL":
                hint = " A tiny decoder is given with --decoder." if "Tiny" in str(listed) else ""
                raise HipaError(
                    f"--vae {part} is of {brief(listed)}. Expected AutoencoderKL.{hint}"
                )
            return part
    raise HipaError(
        f"--vae {folder} has no {CONFIG}, and no {PART}/{CONFIG}. Expected an AutoencoderKL folder."
    )


def _check_same(model: Path, part: Path) -> None:
    """Check that a VAE's folder is for latents like the model's.

    Raises:
        HipaError: its configuration says something else, or its weights are not those that it
            describes.

    """
    from diffusers import AutoencoderKL

    own = _values(model / PART)
    other = _values(part)
    wanted = {key: own[key] for key in SAME if key in own}
    wanted["levels"] = len(own["block_out_channels"])
    got = {key: other.get(key) for key in wanted} | {"levels": len(other["block_out_channels"])}
    for key, value in wanted.items():
        if got[key] != value:
            raise HipaError(
                f"--vae {part} has {key}={brief(got[key])}, and the model's own VAE "
                f"{brief(value)}. It is for other latents: every image would be wrong. Give a VAE "
                "of this family of models."
            )
    check_part(AutoencoderKL, part)


def _values(part: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    known = known_values(AutoencoderKL, read_config(part, CONFIG), part / CONFIG)
    return {**defaults_of(AutoencoderKL), **known}


def _converted(model: Path, file: Path) -> Path:
    """The folder of a VAE in one file, with the configuration of the model's own VAE."""
    stored = _stored(file)
    shapes = _shapes(file, stored)
    _check_family(model, file, stored)
    values = _values(model / PART)
    return converted_once(
        "vaes", file, values, file.stat().st_size // 2, partial(_convert, file, shapes, values)
    )


def _stored(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a file.

    Raises:
        HipaError: the file cannot be read.

    """
    if is_pickled(file):
        return {name: tuple(weight.shape) for name, weight in load_tensors(file).items()}
    return {name: layout.shape for name, layout in read_layout(file).items()}


def _check_family(model: Path, file: Path, stored: Iterable[str]) -> None:
    """Check that a whole checkpoint is of the model's family, as the names of its text encoder say.

    The VAEs of both families have the same weights, and their latents are scaled otherwise.

    Raises:
        HipaError: it is of the other one.

    """
    prefixes = tuple(BESIDE_TEXT)
    found = {prefix for prefix in prefixes for name in stored if name.startswith(prefix)}
    own = prefixes[0] if (model / SECOND / CONFIG).is_file() else prefixes[1]
    if found and own not in found:
        raise HipaError(
            f"--vae {file} is a whole checkpoint of {BESIDE_TEXT[found.pop()]}, and the model is "
            f"of {BESIDE_TEXT[own]}. Its VAE is for other latents: every image would be wrong. "
            "Give a VAE of the model's family."
        )


def _shapes(file: Path, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names, as the VAE itself has them, and shapes of the VAE's tensors in a file.

    Args:
        file: for messages.
        stored: as ``_stored`` has them.

    Raises:
        HipaError: the file holds no VAE.

    """
    shapes = {}
    for name, inner in _inner_names(stored).items():
        shapes[inner] = stored[name]
    if ORIGINAL in shapes or CURRENT in shapes:
        return shapes
    if any(name in stored for name in TINY):
        raise HipaError(
            f"--vae {file} is a tiny autoencoder. It is given as a folder, with --decoder and "
            "--encoder."
        )
    raise HipaError(f"--vae {file} holds no VAE: no weight {ORIGINAL} in it, and no {CURRENT}.")


def _inner_names(names: Mapping[str, Any]) -> dict[str, str]:
    """The VAE's tensors in a file: the name there, and its name within the VAE."""
    prefix = ""
    for tried in PREFIXES:
        if any(name.startswith(tried) for name in names):
            prefix = tried
    found = {}
    for name in names:
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and not inner.startswith(BESIDE_VAE):
            found[name] = current_name(inner)
    return found


def _convert(
    file: Path, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any], out: Path
) -> None:
    """Write the VAE of a file as the diffusers folder ``out``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = load_tensors(file)
    tensors: dict[str, Tensor] = {}
    for name, inner in _inner_names(stored).items():
        # A copy: tensors that share memory cannot be stored.
        tensors[inner] = stored[name].clone().contiguous()
    if CURRENT not in shapes:
        tensors = _renamed(file, tensors, values)
    _check_names(file, tensors, values, out / CONFIG)
    given = sum(math.prod(shape) for shape in shapes.values())
    used = sum(weight.numel() for weight in tensors.values())
    if used != given:
        raise HipaError(
            f"--vae {file} has {given:,} weights, and the model's VAE has {used:,}. {EXPECTED}"
        )
    with new_folder(out) as scratch:
        text = json.dumps({"_class_name": "AutoencoderKL", **values}, indent=2, default=str)
        (scratch / CONFIG).write_text(text + "\n", encoding="utf-8")
        try:
            save_file(tensors, scratch / f"{DIFFUSERS}.safetensors")
        except (OSError, SafetensorError) as error:
            raise HipaError(
                f"--vae {file} cannot be stored in {out.parent}: {first_line(error)}"
            ) from None


def _renamed(
    file: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Weights of the original layout by diffusers' names; in float32, if their types differ.

    Raises:
        HipaError: diffusers cannot convert them.

    """
    from diffusers.loaders import single_file_utils

    # ``from_single_file`` calls it too, and then fails where a weight is missing: it does not say
    # which.
    convert: Any = single_file_utils.convert_ldm_vae_checkpoint
    with as_line(f"--vae {file} cannot be converted", EXPECTED):
        renamed: dict[str, Tensor] = convert(dict(tensors), dict(values))
    is_mixed = len({weight.dtype for weight in renamed.values()}) > 1
    for name, weight in renamed.items():
        renamed[name] = (weight.float() if is_mixed else weight).contiguous()
    return renamed


def _check_names(
    file: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], config: Path
) -> None:
    """Check that weights by diffusers' names are those of the VAE that a configuration describes.

    Args:
        file: for messages.
        tensors: its weights.
        values: of the configuration.
        config: where the configuration is to be, for messages.

    Raises:
        HipaError: a weight is missing, of another shape, or one too many.

    """
    from diffusers import AutoencoderKL

    module = build(AutoencoderKL, values, config)
    own = {name: list(weight.shape) for name, weight in module.state_dict().items()}
    shapes = {name: list(weight.shape) for name, weight in tensors.items()}
    lacking = sorted(own.keys() - shapes.keys())
    more = sorted(shapes.keys() - own.keys())
    other = [name for name in own if name in shapes and shapes[name] != own[name]]
    if not lacking and not more and not other:
        return
    if lacking:
        problem = f"lacks {lacking[0]}"
    elif more:
        problem = f"has {more[0]}, for which the model's VAE has no place"
    else:
        name = other[0]
        problem = f"has {name} of shape {shapes[name]}, and the model's VAE of {own[name]}"
    raise HipaError(f"--vae {file} {problem}. {EXPECTED}")


def _linked(model: Path, part: Path, name: str) -> Path:
    """The folder of links to the parts of a model, and to another VAE; it is brought up to date."""
    places = [str(model.resolve()), str(part.resolve())]
    key = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:24]
    out = user_cache() / "models" / key / name
    # A part that is a link itself may point elsewhere tomorrow: so it is linked to, not its target.
    links = {entry.name: model.resolve() / entry.name for entry in sorted(model.iterdir())}
    links[PART] = part.resolve()
    if not out.is_dir():
        try:
            with new_folder(out) as scratch:
                for link, target in links.items():
                    (scratch / link).symlink_to(target)
        except (HipaError, OSError):
            # Another process may have made the same folder meanwhile. Its links are equal.
            if not out.is_dir():
                raise
    _renew(out, links)
    return out


def _renew(folder: Path, links: Mapping[str, Path]) -> None:
    """Let a folder consist of these links; other processes that read it find every part there."""
    for entry in folder.iterdir():
        if entry.name not in links or not entry.is_symlink():
            _remove(entry)
    for name, target in links.items():
        link = folder / name
        if link.is_symlink() and link.readlink() == target:
            continue
        with scratch_folder(folder.parent, name) as holder:
            (holder / name).symlink_to(target)
            (holder / name).replace(link)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)  # another process may have removed it
