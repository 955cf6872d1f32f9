"""The files of a bundle that are no stages: tokenizer, prompts, references, configurations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizerFast

from hipa_deploy.bundle.manifest import Precision
from hipa_deploy.bundle.reference import REFERENCE_PROMPTS, REFERENCE_TENSORS
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.export.generic.generic_pair import TEXT_PARTS, hidden_states, is_taken
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import References
from hipa_deploy.export.task import TaskSettings
from hipa_deploy.generate.prompts import (
    BAKED_CONTEXTS,
    BAKED_PROMPTS,
    TOKENIZER,
    TOKENIZER_2,
)
from hipa_deploy.generate.tokenizer import PromptTokenizer, PromptTooLongError
from hipa_deploy.models.clip_tokenizer import rust_tokenizer, save_tokenizer
from hipa_deploy.models.one_step.own_step import one_step_scheduler
from hipa_deploy.models.one_step.step_constants import make_scheduler

# Texts that tokenizers have read differently: Japanese, a joined emoji, and U+200B.
HARD_TEXTS = ("東京の夜景", "a 👩\u200d👧 family", "\u200ba cat")


def write_tokenizer(
    root: Path,
    fast: CLIPTokenizerFast,
    prompt: str,
    context_tokens: int | None = None,
    name: str = TOKENIZER,
) -> PromptTokenizer:
    """Write ``tokenizer.json``, padding and length inside, and open it as the runtime will.

    Args:
        root: the bundle's folder.
        fast: the model's tokenizer.
        prompt: its tokens are compared with transformers', and those of ``HARD_TEXTS``.
        context_tokens: tokens of a context; None is one chunk.
        name: of the file in the bundle.

    Raises:
        HipaError: the two tokenizers do not agree.

    """
    # Padding and length go into the file: the runtime has no other configuration of the tokenizer.
    length = fast.model_max_length
    path = root / name
    path.parent.mkdir()
    rust_tokenizer(fast).save(str(path))

    # A wrong token would give a plausible image of something else, so both are compared once.
    one_chunk = PromptTokenizer(path)
    texts = [prompt, *HARD_TEXTS]
    expected = fast(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    if not np.array_equal(one_chunk(texts, truncate=True), expected.input_ids):
        raise HipaError(
            f"{fast.name_or_path}: tokenizer.json does not agree with transformers. "
            "Please report this."
        )
    return PromptTokenizer(path, context_tokens)


def tokenize(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    path: Path | None,
    places: Mapping[str, str],
    *,
    weights: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [N, L] of N prompts, and their weights float32 [N, L].

    Args:
        tokenizer: the bundle's.
        prompts: N prompts.
        path: the file of a closed set; None where the prompt is this package's own.
        places: of each prompt in that file, as ``read_numbered_prompts`` gives them.
        weights: whether ``(word:1.3)`` is a weight; if not, all weights are 1.

    Raises:
        HipaError: a prompt is too long, or has a weight that is no number; the message names the
            file and the line.

    """
    tokens = []
    weights_of = []
    for prompt in prompts:
        where = f"prompts {path}, {places[prompt]}: " if path else ""
        try:
            if weights:
                tokens_1L, weights_1L = tokenizer.weighted([prompt])
            else:
                tokens_1L = tokenizer([prompt])
                weights_1L = np.ones(tokens_1L.shape, np.float32)
        except PromptTooLongError as error:
            remedy = "Shorten it"
            if error.context_tokens:
                remedy += f", or give --context-tokens {error.context_tokens}"
            raise HipaError(f"{where}{error.problem} {remedy}.") from None
        except HipaError as error:
            raise HipaError(f"{where}{error}") from None
        tokens.append(tokens_1L)
        weights_of.append(weights_1L)
    return np.concatenate(tokens), np.concatenate(weights_of)


def write_baked(root: Path, name: str, rows: np.ndarray, precision: Precision) -> np.ndarray:
    """Write what belongs to a closed set beside its contexts; returns it as stored.

    Args:
        root: the bundle's folder, where ``write_closed_set`` has written.
        name: of the file in the bundle.
        rows: float32 [N, …], the conditioning or the pooled vectors of the N prompts.
        precision: fp16 stores it as float16.

    """
    stored = rows.astype(np.float16 if precision == "fp16" else np.float32)
    np.save(root / name, stored)
    return stored


def write_closed_set(
    root: Path, prompts: Sequence[str], contexts_NLD: np.ndarray, precision: Precision
) -> np.ndarray:
    """Write prompts and their contexts in place of the tokenizer; returns the contexts as stored.

    Args:
        root: the bundle's folder; its tokenizer is deleted, as nothing is tokenized any more.
        prompts: N prompts.
        contexts_NLD: float32.
        precision: fp16 stores the contexts as float16.

    """
    stored_NLD = contexts_NLD.astype(np.float16 if precision == "fp16" else np.float32)
    path = root / BAKED_CONTEXTS
    path.parent.mkdir()
    np.save(path, stored_NLD)
    (root / BAKED_PROMPTS).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    for name in (TOKENIZER, TOKENIZER_2):
        folder = (root / name).parent
        if folder.exists():
            shutil.rmtree(folder)
    return stored_NLD


def write_references(root: Path, references: References, others: Sequence[References] = ()) -> None:
    """Write ``reference/``: the tensors, and the prompt and seeds that they belong to.

    Args:
        root: the bundle's folder.
        references: what is stored.
        others: of further prompts that judged the stages. Their texts alone are stored, after the
            prompt of the tensors.

    """
    tensors = root / REFERENCE_TENSORS
    tensors.parent.mkdir(exist_ok=True)
    # Any: numpy's stub takes no mapping of arrays here.
    arrays: Any = {name: value for name, value in references.tensors.items() if is_taken(name)}
    np.savez_compressed(tensors, **arrays)
    prompts = [judge.prompt for judge in (references, *others)]
    content = {"prompts": prompts, "seeds": list(references.seeds)}
    (root / REFERENCE_PROMPTS).write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_diffusers_files(
    root: Path, model: ModelParts, settings: TaskSettings, clip_skip: int = 0
) -> None:
    """Write what optimum's ORTDiffusionPipeline reads beside the stages of the layout generic.

    That is ``model_index.json``, the configurations, the tokenizers' vocabularies and the one-step
    scheduler.

    Args:
        root: the bundle's folder, with its stages and tokenizers.
        model: the base model.
        settings: the step that the bundle takes.
        clip_skip: layers of SDXL's text encoders that the bundle leaves out.

    Raises:
        HipaError: no scheduler of diffusers takes the step of the method.

    """
    if settings.method is not None:
        scheduler = make_scheduler(settings.method, model.config)
    else:
        scheduler = one_step_scheduler(model.config.schedule, settings.timestep)
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "feature_extractor": [None, None],
    }
    tokenizers = {TOKENIZER: "tokenizer"}
    if model.config.has_text_pair:
        index |= _pair_index(model)
        tokenizers[TOKENIZER_2] = "tokenizer_2"
    else:
        index["safety_checker"] = [None, None]
    _write_json(root / "model_index.json", index)
    stages = {part: part for part in model.config.text_parts}
    stages |= {"unet": "unet", "vae": "vae_decoder"}
    for part, stage in stages.items():
        config = json.loads((model.folder / part / "config.json").read_text(encoding="utf-8"))
        if model.config.has_text_pair:
            config |= _pair_changes(model, part, clip_skip)
        _write_json(root / stage / "config.json", config)

    for name, part in tokenizers.items():
        # save_pretrained writes a tokenizer.json of its own, without padding and length.
        tokenizer = root / name
        content = tokenizer.read_bytes()
        save_tokenizer(model.tokenizer(part), tokenizer.parent)
        tokenizer.write_bytes(content)

    scheduler.save_pretrained(root / "scheduler")


def _pair_changes(model: ModelParts, part: str, clip_skip: int) -> dict[str, object]:
    """What the configuration of a part of SDXL says otherwise in the bundle."""
    if part in TEXT_PARTS:
        states = hidden_states(model.config, clip_skip)
        return {"num_hidden_layers": states[TEXT_PARTS.index(part)]}
    if part == "vae":
        # The graph has float32 where the VAE needs it. diffusers' pipeline would try to convert the
        # decoder, and a session of ONNX Runtime cannot be.
        return {"force_upcast": False}
    return {}


def _pair_index(model: ModelParts) -> dict[str, object]:
    """What ``model_index.json`` of SDXL says otherwise than that of SD 1.5."""
    key = "force_zeros_for_empty_prompt"
    own = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        key: own.get(key, True),
    }


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file under ``root``, by its path in the bundle."""
    hashes: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            hashes[path.relative_to(root).as_posix()] = file_sha256(path)
    return hashes


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
