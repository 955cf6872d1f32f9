"""What SDXL's UNet computes from the prompt alone, taken out of it and into the text stage.

SDXL's UNet adds two embeddings: of the timestep, and of the pooled text vector with six numbers of
size and crop. Every ResNet block projects the sum to its own channels and adds it to the output of
its first convolution. At one timestep and one size all of it depends on the prompt alone, so the
text stage computes it once a prompt: the 'conditioning', the blocks' projections side by side. The
UNet's graph has no embedding left, and each block takes its part.

A ControlNet of SDXL has blocks of the same kind. Their projections follow the UNet's.

Suffixes: B batch, D width of the time embedding, E numbers of the sizes' sinusoids, K channels of
all blocks together, P width of the pooled vector, S starts of the step (several strengths of an
edit have several timesteps).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.fold import StepEmbedding

PROJECTION = "time_emb_proj"


class Conditioning(torch.nn.Module):
    """pooled vector [B, P] and perhaps the six numbers int64 [B, 6] -> conditioning [B, S, K].

    Args:
        unet: SDXL's, in float32, with LoRAs and adaptor merged; or a ControlNet. Its layers are
            used, not copied.
        timesteps: S of them.
        sizes: the six numbers of ``size_numbers``; None for an input of images of several sizes.
        place: of the network in the diffusers folder.

    Raises:
        HipaError: a block uses the embedding in another way: scale and shift, or in its norms.

    Example:
        >>> conditioning = Conditioning(unet, [999], size_numbers(1024, 1024))
        >>> conditioning(pooled_BP).shape
        torch.Size([1, 1, 13760])

    """

    def __init__(
        self,
        unet: UNet2DConditionModel | ControlNetModel,
        timesteps: Sequence[int],
        sizes: Sequence[int] | None,
        place: str = "unet",
    ) -> None:
        super().__init__()
        model: Any = unet
        # Where each layer lies in the diffusers folder; see ``place_of``.
        self.places = {
            "add_embedding": f"{place}.add_embedding",
            "sinusoids": f"{place}.add_time_proj",
            "activations": f"{place}.time_embed_act",
            "time_1SD": f"{place}.time_embedding.linear_2.bias",
        }
        self.add_embedding = model.add_embedding
        self.activations = torch.nn.Sequential()
        # A ControlNet has no activation of its own there.
        activation = getattr(model, "time_embed_act", None)
        if activation is not None:
            self.activations.append(activation)
        blocks = conditioned_blocks(unet)
        self.activations.append(next(iter(blocks.values())).nonlinearity)
        for number, (name, block) in enumerate(blocks.items()):
            setattr(self, f"projection_{number}", block.time_emb_proj)
            self.places[f"projection_{number}"] = f"{place}.{name}.{PROJECTION}"
        self.count = len(blocks)

        # Constants of the graph, and no buffers: they must stay float32 when a module is halved.
        with torch.no_grad():
            probe = torch.zeros(1, dtype=next(unet.parameters()).dtype)
            rows = []
            for timestep in timesteps:
                sinusoids_1D = model.time_proj(torch.tensor([timestep])).to(probe.dtype)
                rows.append(model.time_embedding(sinusoids_1D))
            self.time_1SD = torch.cat(rows)[None]
            self.sinusoids = model.add_time_proj
            self.sizes_1E = None
            if sizes is not None:
                self.sizes_1E = self.sinusoids(torch.tensor(sizes)).reshape(1, -1)

    def forward(
        self, pooled_BP: torch.Tensor, sizes_B6: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The blocks' projections side by side, in the order of ``conditioned_blocks``."""
        dtype = self.add_embedding.linear_1.weight.dtype
        batch = pooled_BP.shape[0]
        if self.sizes_1E is not None:
            sizes_BE = self.sizes_1E.expand(batch, -1)
        else:
            assert sizes_B6 is not None
            sizes_BE = self.sinusoids(sizes_B6.flatten()).reshape(batch, -1)
        added_BD = self.add_embedding(torch.cat([pooled_BP.float(), sizes_BE], dim=-1).to(dtype))
        embedding_BSD = self.activations(added_BD.float()[:, None] + self.time_1SD).to(dtype)
        parts = []
        for number in range(self.count):
            parts.append(getattr(self, f"projection_{number}")(embedding_BSD))
        return torch.cat(parts, dim=-1)


class JointConditioning(torch.nn.Module):
    """The conditioning of a UNet, and after it that of the ControlNet beside it."""

    places: ClassVar[dict[str, str]] = {}  # both parts have their own

    def __init__(self, unet: Conditioning, controlnet: Conditioning) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet

    def forward(
        self, pooled_BP: torch.Tensor, sizes_B6: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``Conditioning``."""
        parts = [self.unet(pooled_BP, sizes_B6), self.controlnet(pooled_BP, sizes_B6)]
        return torch.cat(parts, dim=-1)


class Part(torch.nn.Module):
    """Replaces a block's projection: it takes the block's part of the conditioning.

    Args:
        first: the block's first channel in the conditioning.
        channels: of the block.

    """

    def __init__(self, first: int, channels: int) -> None:
        super().__init__()
        self.first = first
        self.channels = channels

    def forward(self, conditioning_BK: torch.Tensor) -> torch.Tensor:
        """[B, K] -> [B, C]."""
        return conditioning_BK[:, self.first : self.first + self.channels]


def cut_conditioning(unet: UNet2DConditionModel) -> int:
    """Let ``unet`` take the conditioning [B, K] in place of a timestep and of added conditions.

    Args:
        unet: SDXL's; it is changed in place.

    Returns:
        K, the channels of the conditioning.

    Raises:
        HipaError: as ``Conditioning``.

    Example:
        >>> cut_conditioning(unet)
        13760
        >>> unet(noise_BCHW, conditioning_BSK[:, 0], context_BLD).sample.shape
        torch.Size([1, 4, 128, 128])

    """
    channels = _take_parts(unet, 0)

    # Any, as modules of other classes take the places that diffusers declares.
    cut: Any = unet
    cut.get_time_embed = lambda sample, timestep: timestep
    cut.time_embedding = StepEmbedding()
    cut.get_aug_embed = lambda **_: None
    cut.add_embedding = None
    cut.time_embed_act = None
    return channels


class GivenEmbedding(torch.nn.Module):
    """Replaces a ControlNet's time embedding: it gives what ``timestep_cond`` is."""

    def forward(self, _: Any, conditioning_BK: torch.Tensor) -> torch.Tensor:
        """Return the conditioning as it is."""
        return conditioning_BK


def cut_control(controlnet: ControlNetModel, first: int) -> None:
    """Let a ControlNet take the conditioning [B, K] as ``timestep_cond``, for all its embeddings.

    Args:
        controlnet: SDXL's; it is changed in place.
        first: its first channel in the conditioning: as many as the UNet has.

    Raises:
        HipaError: as ``Conditioning``.

    """
    _take_parts(controlnet, first)
    # Any, as modules of other classes take the places that diffusers declares.
    cut: Any = controlnet
    cut.time_embedding = GivenEmbedding()
    cut.register_to_config(addition_embed_type=None)
    cut.add_embedding = None


def _take_parts(network: UNet2DConditionModel | ControlNetModel, first: int) -> int:
    """Let each block take its part of the conditioning; returns the number after the last."""
    for block in conditioned_blocks(network).values():
        channels = block.time_emb_proj.out_features
        block.time_emb_proj = Part(first, channels)
        # What comes in is projected already, so the activation before the projection goes too.
        block.skip_time_act = True
        first += channels
    return first


def conditioning_channels(unet: UNet2DConditionModel | ControlNetModel) -> int:
    """K, the channels of all blocks together.

    Raises:
        HipaError: as ``Conditioning``.

    """
    channels = 0
    for block in conditioned_blocks(unet).values():
        channels += block.time_emb_proj.out_features
    return channels


def conditioned_blocks(unet: UNet2DConditionModel | ControlNetModel) -> dict[str, Any]:
    """The ResNet blocks that add an embedding, by name, in the order of the UNet's modules.

    Raises:
        HipaError: as ``Conditioning``.

    """
    blocks: dict[str, Any] = {}
    kinds = set()
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlockCondNorm2D):
            raise HipaError("a time embedding in the norms of a UNet's blocks is not supported.")
        if not isinstance(module, ResnetBlock2D):
            continue
        if module.time_embedding_norm != "default" or module.time_emb_proj is None:
            raise HipaError(
                f"the UNet's block {name} uses its time embedding as "
                f"'{module.time_embedding_norm}', expected one that is added."
            )
        kinds.add(type(module.nonlinearity))
        blocks[name] = module
    if len(kinds) != 1:
        raise HipaError(f"the UNet's blocks have {len(kinds)} kinds of activation, expected one.")
    return blocks


class Recorder:
    """Records what the blocks of networks project, while they run in their general form.

    Example:
        >>> with Recorder(unet) as recorder:
        ...     unet(sample, 999, context, added_cond_kwargs=added)
        >>> recorder.conditioning_BK.shape
        torch.Size([1, 13760])

    """

    def __init__(self, *networks: UNet2DConditionModel | ControlNetModel) -> None:
        self._projections = []
        for network in networks:
            self._projections += [
                block.time_emb_proj for block in conditioned_blocks(network).values()
            ]
        self._made: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for number, projection in enumerate(self._projections):
            # number=number: a closure would see the last one in every hook.
            self._hooks.append(
                projection.register_forward_hook(
                    lambda _, inputs, output, number=number: self._made.update({number: output})
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def conditioning_BK(self) -> torch.Tensor:
        """The projections side by side."""
        return torch.cat([self._made[number] for number in range(len(self._projections))], dim=-1)
