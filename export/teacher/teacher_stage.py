"""Write the base UNet of a bundle that refines: its graph, its tables, its place in the manifest.

The graph is the UNet as it is: latents, a timestep and a context come in, its prediction comes out.
SDXL's also takes the pooled vector and the six numbers of size and crop. It is judged by PyTorch at
the first, the middle and the last timestep of the teacher's own trajectory, the last with what
guidance leads away from.

Shapes: B batch, C latent channels, h, w latent height and width, L tokens, D width of a context,
P width of the pooled vector, T timesteps of the noise schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hipa_deploy.bundle.manifest import (
    TEACHER_PAIR_INPUTS,
    TEACHER_STAGE,
    OneStep,
    Refinement,
    StageSpec,
    TensorSpec,
)
from hipa_deploy.bundle.reference import TEACHER_TENSORS
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import generic_unet_module
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.model_parts import free_memory
from hipa_deploy.export.references import References, encode_closed_set, strength_key, watched
from hipa_deploy.export.writer import StageSource, StageWriter
from hipa_deploy.generate.refine.solver import trailing_timesteps
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.adaptor_folder import teacher_settings
from hipa_deploy.models.text_pair import forces_zeros
from hipa_deploy.tasks import size_numbers

TABLES = f"{TEACHER_STAGE}/tables.npz"
INPUTS = ("noisy", "timestep", "context")
PAIR_INPUTS = (*INPUTS, "pooled", "time_ids")  # of SDXL

_Tensors = dict[str, np.ndarray]


def write_teacher(
    writer: StageWriter,
    parts: ChosenParts,
    spec: StageSpec,
    step: OneStep,
    tokenizers: Sequence[PromptTokenizer],
    chain: Mapping[str, np.ndarray],
) -> Refinement:
    """Export the base UNet into the folder of ``writer``, and check it.

    Args:
        writer: of the bundle's other stages.
        parts: what the bundle is made of.
        spec: of a UNet in the layout generic, of a model with one text encoder.
        step: the constants of the one step.
        tokenizers: the bundle's, for the empty prompt; two of SDXL.
        chain: of the reference prompt, what the bundle's stages are fed with: 'context' [B, L, D],
            and of SDXL 'pooled' [B, P].

    Raises:
        HipaError: the graph does not give what PyTorch gives, or cannot be exported or run.

    """
    base = replace(parts, adaptor=None)
    settings = teacher_settings(parts.adaptor)
    alpha_bars_T = parts.model.config.alphas_cumprod.numpy().astype(np.float32)
    if settings.steps > len(alpha_bars_T):
        raise HipaError(
            f"the adaptor's teacher took {settings.steps} steps, and the noise schedule has "
            f"{len(alpha_bars_T)} timesteps. Correct the model's scheduler_config.json."
        )
    batch = writer.references.batch
    empty = _unguided(base, tokenizers)
    free_memory()
    own = {name: writer.references.tensors[name] for name in empty}
    samples = _samples(writer.references, alpha_bars_T, settings.steps)
    for sample in samples:
        sample |= own
    # The last one as guidance asks for it.
    samples[-1] |= {name: value.repeat(batch, 0) for name, value in empty.items()}
    if parts.has_text_pair:
        time_ids_B6 = np.repeat([size_numbers(step.height, step.width)], batch, axis=0)
        for sample in samples:
            sample["time_ids"] = time_ids_B6.astype(np.float32)
    references = _references(writer.references, base, samples, watch=writer.precision == "fp16")

    # What the graph is fed with: text as the bundle has it, rounded to its precision.
    stored = {name: value.astype(chain[name].dtype) for name, value in empty.items()}
    variants = [{**sample, **{name: chain[name] for name in empty}} for sample in samples]
    variants[-1] |= {name: value.repeat(batch, 0) for name, value in stored.items()}

    own_writer = replace(
        writer,
        references=references,
        specs={TEACHER_STAGE: _teacher_spec(spec, stored)},
        variants=tuple(variants),
        others=(),
    )
    inputs = PAIR_INPUTS if parts.has_text_pair else INPUTS
    source = StageSource(TEACHER_STAGE, partial(generic_unet_module, base), inputs, "output")
    stage = own_writer.write(source, {}).stage
    tables = {f"empty_{name}": value for name, value in stored.items()}
    np.savez(writer.root / TABLES, alpha_bars=alpha_bars_T, **tables)  # type: ignore[arg-type]
    _write_reference(writer.root, stage.spec, inputs, samples, references)
    return Refinement(stage=stage, tables=TABLES, settings=settings)


def _unguided(base: ChosenParts, tokenizers: Sequence[PromptTokenizer]) -> _Tensors:
    """What guidance leads away from: 'context' [1, L, D], of SDXL also 'pooled' [1, P], float32.

    That is the empty prompt, or zeros where SDXL's folder says so.
    """
    tokens = [tokenizer([""]) for tokenizer in tokenizers]
    ones_1L = np.ones(tokens[0].shape, np.float32)
    if not base.has_text_pair:
        context_1LD, _ = encode_closed_set(base, tokens[0], ones_1L)
        return {"context": context_1LD}
    config = base.model.config
    if forces_zeros(base.model.folder):
        length = tokens[0].shape[1]
        return {
            "context": np.zeros((1, length, config.text_width), np.float32),
            "pooled": np.zeros((1, config.pooled_width or 0), np.float32),
        }
    context_1LD, pooled_1P = encode_closed_set(base, tokens[0], ones_1L, tokens[1], ones_1L)
    assert pooled_1P is not None  # a model with two text encoders has it
    return {"context": context_1LD, "pooled": pooled_1P}


def _write_reference(
    root: Path,
    spec: StageSpec,
    inputs: Sequence[str],
    samples: Sequence[_Tensors],
    references: References,
) -> None:
    """What PyTorch predicts in the middle, by the names of the stage, for checks on a device."""
    middle = len(samples) // 2
    tensors = {}
    for tensor, key in zip(spec.inputs, inputs, strict=True):
        tensors[tensor.name] = samples[middle][key]
    tensors[spec.outputs[0].name] = references.tensors[strength_key("output", middle)]
    path = root / TEACHER_TENSORS
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **tensors)  # type: ignore[arg-type]


def _teacher_spec(spec: StageSpec, text: Mapping[str, np.ndarray]) -> StageSpec:
    """``spec`` under the teacher's name, with the inputs that SDXL's UNet has besides."""
    inputs = list(spec.inputs)
    if "pooled" in text:
        real = spec.inputs[-1].dtype  # of the context
        batch = spec.inputs[0].shape[0]
        shapes = ((batch, text["pooled"].shape[1]), (batch, 6))
        for name, shape in zip(TEACHER_PAIR_INPUTS[-2:], shapes, strict=True):
            inputs.append(TensorSpec(name=name, dtype=real, shape=shape))
    return spec.model_copy(update={"name": TEACHER_STAGE, "inputs": tuple(inputs)})


def _samples(references: References, alpha_bars_T: np.ndarray, steps: int) -> list[_Tensors]:
    """'noisy' float32 [B, C, h, w] and 'timestep' int64 [1] at three places of the trajectory."""
    timesteps = trailing_timesteps(len(alpha_bars_T), steps)
    chosen = (timesteps[0], timesteps[len(timesteps) // 2], timesteps[-1])
    samples = []
    for timestep in dict.fromkeys(chosen):
        alpha_bar = alpha_bars_T[timestep]
        signal_BCHW = np.sqrt(alpha_bar) * references.tensors["latents"]
        noisy_BCHW = signal_BCHW + np.sqrt(1 - alpha_bar) * references.tensors["noise"]
        samples.append({"noisy": noisy_BCHW.astype(np.float32), "timestep": np.asarray([timestep])})
    return samples


@torch.no_grad()
def _references(
    references: References, base: ChosenParts, samples: list[_Tensors], *, watch: bool
) -> References:
    """PyTorch's predictions for ``samples``: 'output', 'output_1' and so on."""
    unet, _ = base.unet()
    tensors: _Tensors = dict(samples[0])
    with watched(watch, "unet", unet) as largest:
        for index, sample in enumerate(samples):
            tensors[strength_key("output", index)] = _predict(unet, sample)
    own = References(references.prompt, references.seeds, {})
    return own.plus(tensors, largest)


def _predict(unet: torch.nn.Module, sample: Mapping[str, np.ndarray]) -> np.ndarray:
    on_torch = {name: torch.from_numpy(value) for name, value in sample.items()}
    added = None
    if "pooled" in on_torch:
        added = {"text_embeds": on_torch["pooled"], "time_ids": on_torch["time_ids"]}
    output_BCHW = unet(
        on_torch["noisy"],
        on_torch["timestep"],
        on_torch["context"],
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return np.asarray(output_BCHW.numpy())
