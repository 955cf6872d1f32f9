"""Conversion of a checkpoint in one file to a diffusers folder in the user's cache.

The original layout is that of the CompVis and Stability repositories; it names weights otherwise
than diffusers and has no configuration files. A checkpoint is converted once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from hipa_deploy.bundle.tokenizer_file import MAX_TOKENIZER
from hipa_deploy.disk.files import check_space, new_folder, user_cache
from hipa_deploy.disk.hashing import file_sha256, folder_sha256
from hipa_deploy.disk.reading import check_file
from hipa_deploy.errors import HipaError, as_line, brief, first_line
from hipa_deploy.models.clip_tokenizer import load_tokenizer
from hipa_deploy.models.configurations import (
    INDEX,
    MODELS,
    context_width,
    input_channels,
    model_index,
    transformer_count,
    write_config,
    write_files,
)
from hipa_deploy.models.kind import listed_class
from hipa_deploy.models.model_config import SCHEDULER, ModelConfig
from hipa_deploy.models.text_pair import forces_zeros
from hipa_deploy.models.weights.load_part import BESIDE_TEXT
from hipa_deploy.models.weights.other_vae import BESIDE_VAE
from hipa_deploy.models.weights.part_config import defaults_of, read_config
from hipa_deploy.models.weights.weight_file import (
    SAFETENSORS,
    is_pickled,
    load_tensors,
    read_layout,
)
from hipa_deploy.models.weights.weight_files import current_name
from hipa_deploy.models.weights.weight_identity import COMPUTED

if TYPE_CHECKING:
    from torch import Tensor

UNET = "model.diffusion_model."
FIRST_LAYER = UNET + "input_blocks.0.0.weight"
CROSS_ATTENTION = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# Of SDXL, the second level is the first with attention.
SDXL_CROSS_ATTENTION = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
TRANSFORMER = re.compile(rf"{re.escape(UNET)}.*\.transformer_blocks\.\d+\.attn2\.to_k\.weight")
PARTS = {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
ENCODERS = "conditioner.embedders."  # of SDXL
SDXL_PARTS = {
    "unet": UNET,
    "vae": "first_stage_model.",
    "text_encoder": ENCODERS + "0.transformer.",
    "text_encoder_2": ENCODERS + "1.model.",
}
REFINER = ENCODERS + "0.model."
# Tensors by which some tools mark a model that does not predict eps in the usual schedule, and what
# the scheduler of such a model says.
MARKS: dict[str, tuple[str, str | bool]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
EDM_MARKS = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
# Where a header may say what its UNet predicts: Stability AI's ModelSpec, and ComfyUI's words.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
# What it may say there, by the names that schedulers have for it.
PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
# Ends of tensors that hold a scale of another one, which is stored in float8.
SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale", "scaled_fp8")
TEXT = PARTS["text_encoder"] + "transformer."
# Of the names in a text encoder: CLIP's and OpenCLIP's module, and the number of a layer.
CLIP_ROOT = re.compile(r"(transformer\.(?!resblocks)|model\.)?(text_model\.)?")
CLIP_LAYER = re.compile(r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")
TEXT_TO_IMAGE = 4  # channels of a UNet's input: the latents
CHANNELS = (TEXT_TO_IMAGE, 9)  # for inpainting, noise, mask and source
# The names of precisions in safetensors and in torch.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
EXPECTED = "Expected an SD 1.x, 2.x or SDXL checkpoint"
# The shape of every tensor in a file, by name.
Shapes = dict[str, tuple[int, ...]]


def converted(checkpoint: Path, config: str | None = None, *, needs_vae: bool = True) -> Path:
    """Return the diffusers folder of a checkpoint of SD 1.x, 2.x or SDXL; convert it once.

    The folder is found again by the contents of the checkpoint and of the configurations. Weights
    keep the precision that they are stored in. Where an averaged copy (EMA) lies beside the plain
    weights, the plain ones are used, as diffusers does.

    Args:
        checkpoint: a file in the original layout: .safetensors, or .ckpt, .pt, .pth or .bin, which
            torch reads without running code of it.
        config: one of ``MODELS``, or a diffusers folder whose configurations and tokenizer are
            used; None for SD 1.x and SDXL, which the weights tell.
        needs_vae: whether a file without a VAE is refused. Otherwise its folder has the
            configuration of one, and no weights: another VAE takes that place (``--vae``).

    Raises:
        HipaError: the file holds something else, is damaged or incomplete; or ``config`` is
            missing for SD 2.x, or does not fit the weights; or the disk of the cache is full.

    Example:
        >>> converted(Path("v1-5-pruned.safetensors")).name
        'v1-5-pruned'

    """
    shapes = _read_shapes(checkpoint)
    _check_kind(checkpoint, shapes)
    _check_parts(checkpoint, shapes, needs_vae=needs_vae)
    config = _choose_config(checkpoint, shapes, config)
    _check_prediction(checkpoint, config)
    _check_marks(checkpoint, shapes, config)
    # A name may have square brackets, which rich would take for a style.
    status = f"reading {escape(checkpoint.name)}; the first time it becomes a diffusers folder"
    # Hashing and converting a file of several GB take a while.
    with Console(stderr=True).status(status):
        out = user_cache() / "models" / _key(checkpoint, config) / checkpoint.stem
        if not _is_complete(out):
            _check_space(checkpoint, shapes, out)
            try:
                _convert(checkpoint, config, shapes, out)
            except (HipaError, OSError):
                # Another process may have converted the same file meanwhile. Its result is equal.
                if not _is_complete(out):
                    raise
    return out


def text_width(checkpoint: Path) -> int | None:
    """The width of a checkpoint's text contexts, by its header alone: 768 is SD 1.x.

    None where the header does not show it, or torch has pickled the file.

    Raises:
        HipaError: it is no file of weights, or is damaged.

    """
    if is_pickled(checkpoint):
        return None
    layout = read_layout(checkpoint)
    for name in (CROSS_ATTENTION, SDXL_CROSS_ATTENTION):
        if name in layout and len(layout[name].shape) == 2:
            return layout[name].shape[1]
    return None


def _check_space(checkpoint: Path, shapes: Shapes, out: Path) -> None:
    """Check that the disk has space for a conversion, which takes minutes.

    Raises:
        HipaError: it has less than the weights that are used take in the checkpoint.

    """
    prefixes = tuple(_parts_of(shapes).values())
    every = sum(map(math.prod, shapes.values()))
    used = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))
    try:
        check_space(out, checkpoint.stat().st_size * used // max(every, 1))
    except HipaError as error:
        raise HipaError(f"{error} HIPA_CACHE sets another folder for the cache.") from None


def _is_complete(out: Path) -> bool:
    """Whether a conversion is there: its folder gets its name when it is whole."""
    return (out / INDEX).is_file()


def _read_shapes(checkpoint: Path) -> Shapes:
    """Read names and shapes of all tensors, by the current names.

    Raises:
        HipaError: the file cannot be read, or two names of it mean one weight.

    """
    if is_pickled(checkpoint):
        stored = {name: tuple(weight.shape) for name, weight in load_tensors(checkpoint).items()}
    else:
        stored = {name: layout.shape for name, layout in read_layout(checkpoint).items()}
    names: dict[str, str] = {}
    for name in stored:
        current = _current_name(name)
        if current in names and not current.endswith(COMPUTED):
            # A merge of two models with other names has the weights of both.
            raise HipaError(
                f"model {checkpoint} has two tensors of one weight, {names[current]} and {name}. "
                "Which of them is right cannot be known. Merge or convert the model again."
            )
        names[current] = name
    return {current: stored[name] for current, name in names.items()}


def _current_name(name: str) -> str:
    """Return the name that diffusers expects for a tensor in the original layout.

    Checkpoints of the first DreamBooth trainings name the text encoder without 'text_model', and so
    do those that a tool writes beside transformers 5.6 or newer. A1111 and sd-scripts insert it as
    well.
    """
    for prefix in (TEXT, SDXL_PARTS["text_encoder"]):
        if name.startswith(prefix):
            return prefix + current_name(name.removeprefix(prefix))
    return name


def _check_kind(checkpoint: Path, shapes: Shapes) -> None:
    """Check that a file holds the UNet of a text-to-image model of SD 1.x, 2.x or SDXL."""
    # The kinds that people mistake for such a checkpoint get a message of their own.
    if any(name.startswith(REFINER) for name in shapes):
        raise HipaError(
            f"model {checkpoint} is SDXL's refiner, which finishes images of another model in many "
            "steps. Use SDXL's base model."
        )
    if FIRST_LAYER not in shapes:
        lora = any("lora" in name for name in shapes)
        if lora:
            raise HipaError(
                f"model {checkpoint} holds LoRA weights, not a model. {EXPECTED} in the original "
                f"layout. Give that as --model, and this as --lora {checkpoint}."
            )
        raise HipaError(
            f"model {checkpoint} has no weight {FIRST_LAYER}. {EXPECTED} in the original layout."
        )

    # The first convolution's weight is [320, channels, 3, 3].
    if len(shapes[FIRST_LAYER]) != 4:
        raise HipaError(f"model {checkpoint} is damaged: {FIRST_LAYER} is no convolution.")
    channels = shapes[FIRST_LAYER][1]
    if channels not in CHANNELS:
        raise HipaError(
            f"model {checkpoint}: its UNet takes {channels} channels (made for editing?). Expected "
            "4, or 9 for inpainting. Use a text-to-image or an inpainting model."
        )

    edm = [name for name in EDM_MARKS if name in shapes]
    if edm:
        raise HipaError(
            f"model {checkpoint} has the mark {edm[0]}: it was made for EDM's noise schedule. "
            "Expected a model of DDPM's, such as SD 1.x, 2.x or SDXL."
        )

    # Without their scales the weights are those of another model.
    scales = [name for name in shapes if name.endswith(SCALES)]
    if scales:
        raise HipaError(
            f"model {checkpoint} has weights in float8 with scales of their own ({scales[0]}), "
            "which are not read. Use the model in float16, bfloat16 or float32."
        )


def _check_parts(checkpoint: Path, shapes: Shapes, *, needs_vae: bool) -> None:
    """Check that a file has all parts of a model.

    Files of a UNet alone are common too: their VAE and text encoder would be random.
    """
    lacking = [part for part in _parts_of(shapes) if not _has_part(shapes, part)]
    if lacking == ["vae"]:
        if not needs_vae:
            return
        raise HipaError(
            f"model {checkpoint} has no vae (no weight {PARTS['vae']}…). Give the VAE that it was "
            "made with: --vae FILE_OR_FOLDER."
        )
    if lacking:
        raise HipaError(
            f"model {checkpoint} has no {lacking[0]} (no weight {_parts_of(shapes)[lacking[0]]}…). "
            f"{EXPECTED} with all its parts."
        )


def _has_part(shapes: Iterable[str], part: str) -> bool:
    prefix = _parts_of(shapes)[part]
    return any(name.startswith(prefix) for name in shapes)


def _parts_of(shapes: Iterable[str]) -> dict[str, str]:
    """Return how the names of each part begin in a file with these names."""
    is_sdxl = any(name.startswith(ENCODERS) for name in shapes)
    return SDXL_PARTS if is_sdxl else PARTS


def _choose_config(checkpoint: Path, shapes: Shapes, config: str | None) -> str:
    """Return the configuration to convert with: one of ``MODELS``, or a diffusers folder."""
    if config is not None and config not in MODELS:
        if not (Path(config) / INDEX).is_file():
            names = ", ".join(MODELS)
            raise HipaError(
                f"--config {config} is not a diffusers folder. "
                f"Expected one with a tokenizer, or: {names}."
            )
        for path in Path(config).rglob("*.json"):
            check_file(path, MAX_TOKENIZER, "Copy the model again.")  # they are hashed below
        _check_folder(checkpoint, shapes, Path(config))
        return config

    # The width of the text context tells SD 1.x (768) from SD 2.x (1024) and SDXL (2048); SDXL and
    # its relatives are told apart by the number of their transformers.
    width = _context_width(shapes)
    channels = shapes[FIRST_LAYER][1]
    transformers = _count_transformers(shapes)
    fitting = _fitting(shapes)
    fitting = _with_same_marks(checkpoint, shapes, fitting, config)
    if config in fitting:
        return str(config)
    _, said = _said_prediction(checkpoint)
    if config is None and len(fitting) > 1 and said is not None:
        fitting = [name for name in fitting if MODELS[name]["prediction_type"] == said] or fitting

    if width:
        got = f"its text contexts are {width} wide"
        if width == context_width("sdxl"):
            got += f", its UNet has {transformers} transformers"
        if channels != TEXT_TO_IMAGE:
            got += f" and its UNet takes {channels} channels"
    else:
        got = "it has no text contexts where SD 1.x, 2.x and SDXL have them"
    if not fitting:
        raise HipaError(
            f"model {checkpoint}: {got}. Name the model it was made from: --config FOLDER."
        )
    if config is not None:
        raise HipaError(
            f"model {checkpoint}: {got}, unlike {config}'s. "
            f"Expected --config {' or '.join(fitting)}."
        )

    # The two models of SD 2.x have the same shapes and predict different things.
    if len(fitting) > 1:
        raise HipaError(
            f"model {checkpoint} is SD 2.x, whose 512-pixel (eps) and 768-pixel (v) weights look "
            f"alike. Say which it is: --config {' or --config '.join(fitting)}."
        )
    return fitting[0]


def _count_transformers(shapes: Shapes) -> int:
    return sum(TRANSFORMER.fullmatch(name) is not None for name in shapes)


def _fitting(shapes: Shapes) -> list[str]:
    """The names of those of ``MODELS`` whose UNet takes what a checkpoint's takes."""
    taken = (_context_width(shapes), shapes[FIRST_LAYER][1])
    fitting = []
    for name in MODELS:
        if (context_width(name), input_channels(name)) != taken:
            continue
        if transformer_count(name) in (None, _count_transformers(shapes)):
            fitting.append(name)
    return fitting


def _context_width(shapes: Shapes) -> int:
    """The width of a checkpoint's text contexts; 0 where its UNet has none in the usual places."""
    attention = shapes.get(CROSS_ATTENTION) or shapes.get(SDXL_CROSS_ATTENTION, ())
    return attention[1] if len(attention) == 2 else 0


def _any_context_width(shapes: Shapes) -> int:
    """The width of the text contexts of any transformer; 0 where there is none."""
    for name, shape in shapes.items():
        if TRANSFORMER.fullmatch(name) and len(shape) == 2:
            return shape[1]
    return 0


def _check_folder(checkpoint: Path, shapes: Shapes, folder: Path) -> None:
    """Check that a folder of configurations is of a checkpoint's kind, as far as its header shows.

    Whether it fits every weight is found out in the conversion.

    Raises:
        HipaError: it is of another kind, or cannot be read.

    """
    config = ModelConfig.read(folder)
    has_text_pair = _parts_of(shapes) is SDXL_PARTS
    if config.has_text_pair != has_text_pair:
        kinds = ("one text encoder", "two text encoders, as SDXL has")
        raise HipaError(
            f"--config {folder} has {kinds[config.has_text_pair]}, and the checkpoint "
            f"{kinds[has_text_pair]}. Name the model that it was made from."
        )
    channels = shapes[FIRST_LAYER][1]
    width = _any_context_width(shapes)
    got = f"{channels} channels"
    own = f"{config.unet['in_channels']} channels"
    own_width = config.unet["cross_attention_dim"]
    if width and isinstance(own_width, int):
        got += f" and text contexts that are {width} wide"
        own += f" and text contexts that are {own_width} wide"
    if got != own:
        choices = " or --config ".join([*_fitting(shapes), "FOLDER"])
        raise HipaError(
            f"model {checkpoint}: its UNet takes {got}, and that of --config {folder} takes {own}. "
            f"Name the model that it was made from: --config {choices}."
        )


def _with_same_marks(
    checkpoint: Path, shapes: Shapes, fitting: list[str], config: str | None
) -> list[str]:
    """Return those of ``fitting``, names in ``MODELS``, that predict what a file's marks say.

    Raises:
        HipaError: none does, or ``config`` does not.

    """
    marks = [name for name in MARKS if name in shapes]
    wanted = dict(MARKS[mark] for mark in marks)
    same = [name for name in fitting if wanted.items() <= MODELS[name].items()]
    if marks and (not same or config in set(fitting) - set(same)):
        choice = f"{' or --config '.join(same)}." if same else "FOLDER."
        raise HipaError(
            f"model {checkpoint} has the mark {marks[0]}: it does not predict eps in the usual "
            f"schedule. Name a model or a diffusers folder with its scheduler: --config {choice}"
        )
    return same


def _said_prediction(checkpoint: Path) -> tuple[str, str | None]:
    """What the UNet predicts, where the file's header says it: the key there, and the value."""
    if not is_pickled(checkpoint):
        from safetensors import safe_open

        with safe_open(checkpoint, "numpy") as file:
            header = file.metadata() or {}
        for key in PREDICTION_KEYS:
            if header.get(key) in PREDICTIONS:
                return key, PREDICTIONS[header[key]]
    return "", None


def _check_prediction(checkpoint: Path, config: str) -> None:
    """Check that a file does not say that it predicts something else than its configuration.

    Raises:
        HipaError: it does: every image would be wrong.

    """
    if config in MODELS:
        expected = MODELS[config]["prediction_type"]
    else:
        expected = read_config(Path(config), SCHEDULER).get("prediction_type", "epsilon")
    key, said = _said_prediction(checkpoint)
    if said is not None and said != expected:
        raise HipaError(
            f"model {checkpoint} says that it predicts {said} ({key}), and {config} predicts "
            f"{expected}. Name the model it was made from, or a diffusers folder with its "
            "scheduler: --config FOLDER."
        )


def _check_marks(checkpoint: Path, shapes: Shapes, config: str) -> None:
    """Check that a folder's scheduler is the one that a file says it was made for.

    Raises:
        HipaError: it is another: every image would be wrong.

    """
    if config in MODELS:  # it was chosen by the marks
        return
    for mark in (name for name in MARKS if name in shapes):
        key, expected = MARKS[mark]
        got = read_config(Path(config), SCHEDULER).get(key)
        if got != expected:
            wanted = json.dumps(expected)
            raise HipaError(
                f"model {checkpoint} has the mark {mark}, and {config}/{SCHEDULER} has "
                f"{key}={brief(got)}. Expected {wanted}. Name the model it was made from, or "
                "correct that file in a copy of the folder."
            )


def _key(checkpoint: Path, config: str) -> str:
    """Return the name of a conversion in the cache: a hash of all that its result depends on."""
    settings = MODELS[config] if config in MODELS else folder_sha256(Path(config), "*.json")
    # 'format' is raised whenever the conversion itself changes.
    key = {"format": 4, "checkpoint": file_sha256(checkpoint), "config": settings}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _convert(checkpoint: Path, config: str, shapes: Shapes, out: Path) -> None:
    """Write a checkpoint as the diffusers folder ``out``."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError

    logging.disable_progress_bar()
    # The safety checker is a model of its own, which no command uses.
    unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    unused["requires_safety_checker"] = False
    kind: Any = StableDiffusionPipeline
    parts = _parts_of(shapes)
    if parts is SDXL_PARTS:
        kind = StableDiffusionXLPipeline
        unused = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    has_vae = _has_part(shapes, "vae")
    if not has_vae:
        unused["vae"] = None
    with new_folder(out) as scratch:
        if config in MODELS:
            write_config(config, scratch)
        else:
            _copy_config(Path(config), scratch)
        rewritten = _with_current_names(checkpoint, scratch)
        # Wrong shapes and missing parts meet errors of every kind.
        with as_line(
            f"model {checkpoint} cannot be converted",
            f"Expected a complete checkpoint of {config}.",
        ):
            pipe = kind.from_single_file(
                str(rewritten or checkpoint),
                config=str(scratch),
                local_files_only=True,
                **unused,
            )

        for part, prefix in parts.items():
            if part == "vae" and not has_vae:
                continue
            module = getattr(pipe, part)
            _check_complete(checkpoint, part, module)
            _check_all_used(checkpoint, config, part, module, shapes)
            # Weights were loaded as float32, which holds every smaller format exactly, so storing
            # them as they were in the file loses nothing.
            stored_dtype = getattr(torch, _stored_dtype(rewritten or checkpoint, prefix))
            torch.nn.Module.to(module, stored_dtype)
        if rewritten is not None:
            rewritten.unlink()
        try:
            # The parts alone: version 5 of transformers would store the tokenizers otherwise.
            for part in parts:
                if part != "vae" or has_vae:
                    getattr(pipe, part).save_pretrained(scratch / part)
            _store_usual_names(scratch / "text_encoder")
        except (OSError, SafetensorError) as error:
            raise HipaError(
                f"model {checkpoint} cannot be stored in {out.parent}: {first_line(error)}"
            ) from None


def _store_usual_names(folder: Path) -> None:
    """Name the weights of a text encoder as every version of transformers reads them.

    Since 5.6 it stores them without 'text_model', and reads both. Earlier versions would fill a
    text encoder with such names with random numbers.
    """
    from safetensors.torch import load_file, save_file

    path = folder / f"model{SAFETENSORS}"
    if all(current_name(name) == name for name in read_layout(path)):
        return
    tensors = load_file(path)
    usual = {current_name(name): weight.clone() for name, weight in tensors.items()}
    save_file(usual, path, metadata={"format": "pt"})


def _copy_config(folder: Path, out: Path) -> None:
    """Write the configurations and the tokenizer of a user's model into ``out``.

    diffusers imports the libraries that a model_index.json names, and believes the numbers in the
    other files. It sees what was checked, and nothing else.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    config = ModelConfig.read(folder)
    for part in config.text_parts:
        name = part.replace("text_encoder", "tokenizer")
        load_tokenizer(config, name)
        (out / name).mkdir()
        for path in sorted((folder / name).iterdir()):
            if path.suffix in (".json", ".txt"):
                shutil.copyfile(path, out / name / path.name)

    scheduler = listed_class(read_config(folder, INDEX), "scheduler")
    values = read_config(folder, SCHEDULER)
    index = model_index(scheduler, has_text_pair=config.has_text_pair)
    if config.has_text_pair:
        index["force_zeros_for_empty_prompt"] = forces_zeros(folder)
    files = {
        INDEX: index,
        "unet/config.json": _known(config.unet, UNet2DConditionModel),
        "vae/config.json": _known(config.vae, AutoencoderKL),
        SCHEDULER: {key: value for key, value in values.items() if key in config.scheduler},
    }
    for part, text in config.text_parts.items():
        known = _known(text, CLIPTextConfig)
        files[f"{part}/config.json"] = {"model_type": "clip_text_model", **known}
    write_files(files, out)


def _known(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    return {key: values[key] for key in defaults_of(kind) if key in values}


def _with_current_names(checkpoint: Path, scratch: Path) -> Path | None:
    """Write a checkpoint once more, where diffusers would not read it as it is.

    It reads .safetensors files alone without a risk, by an ending in small letters, and knows the
    current names alone. None: it reads this file.
    """
    pickled = is_pickled(checkpoint)
    names = () if pickled else read_layout(checkpoint)
    renamed = any(_current_name(name) != name for name in names)
    if not pickled and not renamed and checkpoint.suffix == SAFETENSORS:
        return None
    from safetensors.torch import save_file

    out = scratch / f"checkpoint{SAFETENSORS}"
    kept: dict[str, Tensor] = {}
    tensors = load_tensors(checkpoint)
    prefixes = tuple(_parts_of(tensors).values())
    for name, weight in tensors.items():
        # Averaged copies and the state of the training are not used.
        if name.startswith(prefixes):
            kept[_current_name(name)] = weight
    save_file(_apart(kept), out)
    return out


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that share memory with others: a .safetensors file cannot say that."""
    apart: dict[str, Tensor] = {}
    seen = set()
    for name, weight in tensors.items():
        storage = weight.untyped_storage()
        is_whole = weight.numel() * weight.element_size() == storage.nbytes()
        is_first = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        own = weight if is_whole and is_first else weight.clone()
        apart[name] = own.contiguous()
    return apart


def _check_complete(checkpoint: Path, part: str, module: Any) -> None:
    """Check that the file held every weight of a part.

    diffusers leaves a weight that the file lacks on the meta device, where it has no values.
    """
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise HipaError(
                f"model {checkpoint} is incomplete: weight {name} of its {part} is missing. "
                "Copy it again."
            )


def _check_all_used(checkpoint: Path, config: str, part: str, module: Any, shapes: Shapes) -> None:
    """Check that every weight of a part in the file found a place in ``module``.

    A configuration with fewer layers than the weights have would give another model, and diffusers
    only warns. Counting numbers needs no knowledge of the names. Weights of a text encoder or a VAE
    that are known to be of no use are not counted.
    """
    used = sum(weight.numel() for weight in module.parameters())
    prefix = _counted_from(part, shapes)
    stored = 0
    for name, shape in shapes.items():
        if not name.startswith(prefix):
            continue
        inner = name.removeprefix(prefix)
        if part.startswith("text_encoder") and _is_beside(inner, module):
            continue
        if part == "vae" and inner.startswith(BESIDE_VAE):
            continue
        stored += math.prod(shape)
    if stored != used:
        raise HipaError(
            f"model {checkpoint} cannot be converted: its {part} has {stored:,} weights, and that "
            f"of {config} has {used:,}. Name the model it was made from: --config FOLDER."
        )


def _counted_from(part: str, shapes: Shapes) -> str:
    """Return how the names of all that a file holds of a part begin."""
    prefix = _parts_of(shapes)[part]
    if prefix.startswith(ENCODERS):
        # Some tools store what they add outside of SDXL's first encoder, but beside it.
        return f"{ENCODERS}{prefix.removeprefix(ENCODERS)[0]}."
    return prefix


def _is_beside(name: str, module: Any) -> bool:
    """Whether files of a text encoder may hold a weight that ``module`` does not use.

    Files of SD 2.x hold a last layer, which the model does not use. The rest of CLIP, and numbers
    that a module computes itself, are stored by some tools.
    """
    inner = CLIP_ROOT.sub("", name, count=1)
    layer = CLIP_LAYER.match(inner)
    if layer:
        return int(layer[1]) >= module.config.num_hidden_layers
    if inner.endswith(COMPUTED) or inner == "attn_mask":
        return True
    if inner in ("text_projection", "text_projection.weight"):
        return not hasattr(module, "text_projection")
    return BESIDE_TEXT.fullmatch(inner) is not None


def _stored_dtype(checkpoint: Path, prefix: str) -> str:
    """Return torch's name of the precision of a part's weights; float32 if they differ."""
    found = set()
    for name, layout in read_layout(checkpoint).items():
        if name.startswith(prefix):
            found.add(layout.dtype)
    # Integer tensors, such as CLIP's position numbers, have no precision to keep.
    floats = found & DTYPES.keys()
    return DTYPES[floats.pop()] if len(floats) == 1 else "float32"
