"""The tensors of layout generic: names, types and shapes as optimum has them.

ORTDiffusionPipeline feeds and reads by these names. Their source is optimum-onnx's
exporters/onnx/model_configs.py and onnxruntime/modeling_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hipa_deploy.bundle.manifest import DType
from hipa_deploy.generate.stages import HIDDEN_STATE

Row = tuple[str, DType, tuple[int | str, ...]]
"""Name, type and shape of a tensor."""
SIZE_NUMBERS = 6  # that SDXL's UNet is told


@dataclass(frozen=True)
class PairSizes:
    """What the text encoders of SDXL give in layout generic.

    Attributes:
        widths: of the two contexts.
        states: how many hidden states each gives; see ``GenericPairEncoder``.
        pooled: P, the width of the pooled vector.

    """

    widths: tuple[int, int]
    states: tuple[int, int]
    pooled: int


@dataclass(frozen=True)
class GenericRows:
    """The inputs and outputs of one stage."""

    inputs: tuple[Row, ...]
    outputs: tuple[Row, ...]


def generic_rows(
    sizes: Mapping[str, int | str],
    channels: int,
    length: int,
    width: int,
    real: DType,
    pair: PairSizes | None,
) -> dict[str, GenericRows]:
    """The stages by name.

    Args:
        sizes: of batch, height, width, latent_height and latent_width: a number or an axis.
        channels: of latents.
        length: tokens of a prompt.
        width: of the text context.
        real: the type of all tensors that are no numbers of tokens or timesteps.
        pair: of SDXL; None for a model with one text encoder.

    """
    batch = sizes["batch"]
    latent_BCHW = (batch, channels, sizes["latent_height"], sizes["latent_width"])
    context_BLD = (batch, length, width)
    tokens: Row = ("input_ids", "int64", (batch, length))
    unet: list[Row] = [
        ("sample", real, latent_BCHW),
        ("timestep", "int64", (1,)),
        ("encoder_hidden_states", real, context_BLD),
    ]
    rows = {}
    if pair is None:
        context: Row = ("last_hidden_state", real, context_BLD)
        rows["text_encoder"] = GenericRows((tokens,), (context,))
    else:
        pooled: Row = ("text_embeds", real, (batch, pair.pooled))
        unet += [pooled, ("time_ids", real, (batch, SIZE_NUMBERS))]
        first = _hidden_rows((batch, length, pair.widths[0]), real, pair.states[0])
        second = _hidden_rows((batch, length, pair.widths[1]), real, pair.states[1])
        rows["text_encoder"] = GenericRows((tokens,), first)
        # diffusers takes the first output of the second encoder as the pooled vector.
        rows["text_encoder_2"] = GenericRows((tokens,), (pooled, *second))
    rows["unet"] = GenericRows(tuple(unet), (("out_sample", real, latent_BCHW),))
    image_BCHW = (batch, 3, sizes["height"], sizes["width"])
    rows["vae_decoder"] = GenericRows(
        (("latent_sample", real, latent_BCHW),), (("sample", real, image_BCHW),)
    )
    return rows


def _hidden_rows(shape_BLD: tuple[int | str, ...], real: DType, states: int) -> tuple[Row, ...]:
    """The last hidden state, then those of the layers."""
    rows: list[Row] = [("last_hidden_state", real, shape_BLD)]
    for number in range(states):
        rows.append((f"{HIDDEN_STATE}{number}", real, shape_BLD))
    return tuple(rows)
