"""Write the base UNet of a bundle that refines: its graph, its tables, its place in the manifest.

The graph is the UNet as it is: latents, a timestep and a context come in, its prediction comes out.
It is judged by PyTorch at the first, the middle and the last timestep of the teacher's own
trajectory, the last with the empty prompt.

Shapes: B batch, C latent channels, h, w latent height and width, L tokens, D width of a context,
T timesteps of the noise schedule.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from hipa_deploy.bundle.manifest import (
    TEACHER_STAGE,
    OneStep,
    Refinement,
    StageSpec,
)
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import generic_unet_module
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.references import References, encode_closed_set, strength_key, watched
from hipa_deploy.export.writer import StageSource, StageWriter
from hipa_deploy.generate.refine.solver import trailing_timesteps
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.adaptor_folder import teacher_settings

TABLES = f"{TEACHER_STAGE}/tables.npz"
INPUTS = ("noisy", "timestep", "context")


def write_teacher(
    writer: StageWriter,
    parts: ChosenParts,
    spec: StageSpec,
    step: OneStep,
    tokenizer: PromptTokenizer,
    context_BLD: np.ndarray,
) -> Refinement:
    """Export the base UNet into the folder of ``writer``, and check it.

    Args:
        writer: of the bundle's other stages.
        parts: what the bundle is made of.
        spec: of a UNet in the layout generic.
        step: the constants of the one step.
        tokenizer: the bundle's, for the empty prompt.
        context_BLD: of the reference prompt, as the bundle's stages are fed with it.

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
    tokens_1L = tokenizer([""])
    empty_1LD, _ = encode_closed_set(base, tokens_1L, np.ones(tokens_1L.shape, np.float32))
    gc.collect()
    samples = _samples(writer.references, alpha_bars_T, settings.steps)
    references = _references(
        writer.references, base, samples, empty_1LD, watch=writer.precision == "fp16"
    )

    # What the graph is fed with: contexts as the bundle has them, rounded to its precision.
    stored_1LD = empty_1LD.astype(context_BLD.dtype)
    variants = []
    for index, sample in enumerate(samples):
        is_last = index == len(samples) - 1
        context = np.repeat(stored_1LD, len(context_BLD), axis=0) if is_last else context_BLD
        variants.append({**sample, "context": context})

    own_spec = spec.model_copy(update={"name": TEACHER_STAGE})
    own_writer = replace(
        writer,
        references=references,
        specs={TEACHER_STAGE: own_spec},
        variants=tuple(variants),
        others=(),
    )
    source = StageSource(TEACHER_STAGE, partial(generic_unet_module, base), INPUTS, "output")
    stage = own_writer.write(source, {}).stage
    np.savez(writer.root / TABLES, alpha_bars=alpha_bars_T, empty_context=stored_1LD)
    return Refinement(stage=stage, tables=TABLES, settings=settings)


def _samples(
    references: References, alpha_bars_T: np.ndarray, steps: int
) -> list[dict[str, np.ndarray]]:
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
    references: References,
    base: ChosenParts,
    samples: list[dict[str, np.ndarray]],
    empty_1LD: np.ndarray,
    *,
    watch: bool,
) -> References:
    """PyTorch's predictions for ``samples``: 'output', 'output_1' and so on."""
    unet, _ = base.unet()
    context_BLD = references.tensors["context"]
    empty_BLD = np.repeat(empty_1LD, len(context_BLD), axis=0)
    tensors: dict[str, np.ndarray] = {**samples[0], "context": context_BLD}
    with watched(watch, "unet", unet) as largest:
        for index, sample in enumerate(samples):
            text_BLD = empty_BLD if index == len(samples) - 1 else context_BLD
            output_BCHW = _predict(unet, sample, text_BLD)
            tensors[strength_key("output", index)] = output_BCHW
    own = References(references.prompt, references.seeds, {})
    return own.plus(tensors, largest)


def _predict(
    unet: torch.nn.Module, sample: Mapping[str, np.ndarray], context_BLD: np.ndarray
) -> np.ndarray:
    output_BCHW = unet(
        torch.from_numpy(sample["noisy"]),
        torch.from_numpy(sample["timestep"]),
        torch.from_numpy(context_BLD),
        return_dict=False,
    )[0]
    return np.asarray(output_BCHW.numpy())
