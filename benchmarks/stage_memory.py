"""What the stages of the supported models take in memory, from their graphs.

Purpose: the sizes behind the tables of memory in docs/reference/engines.md: bytes of each stage's
ONNX files, and the most bytes that its activations hold at once. Both follow from the shapes alone,
so the graphs are exported with zeros or random numbers for weights, and none is run. They are in
FP16, of layout onestep, for one image of the model's own size.

Command, from the repository's root::

    python benchmarks/stage_memory.py --out docs/memory.json --keep /tmp/stages

Of SDXL's family the graphs of Segmind-Vega are exported. SSD-1B and SDXL have its decoder, its
text stage (SDXL's is 3 MB larger), and its blocks with more transformers in a block. So their
activations are Vega's. Weights and operations are counted on diffusers' UNet without memory.

Expected time: about ten minutes on two cores, with 6 GB of memory. ``--keep`` leaves the graphs
there, and takes those that are there already; ``--family`` measures SDXL's family alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parent))
from make_model import SIZES, VAE

from hipa_deploy.bundle.manifest import OneStep
from hipa_deploy.export.graph.conditioning import (
    Conditioning,
    conditioning_channels,
    cut_conditioning,
)
from hipa_deploy.export.graph.fold import fold_timestep
from hipa_deploy.export.graph.graph_cost import stage_cost
from hipa_deploy.export.graph.half_precision import to_half
from hipa_deploy.export.graph.modules import (
    OneStepDecoder,
    OneStepUNet,
    TextEncoderStage,
    TextPairStage,
    TinyDecoder,
    stage_specs,
)
from hipa_deploy.export.graph.to_onnx import export_stage
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.tasks import size_numbers, unet_inputs

TITLES = {"sd15": "SD 1.5", "sd21-base": "SD 2.1, 512 px", "sd21": "SD 2.1, 768 px"}
# SDXL's family, whose configurations are the package's own. The first is exported.
PAIRS = {"vega": "Segmind-Vega", "ssd-1b": "SSD-1B", "sdxl": "SDXL"}
TOKENS = 77
MIB = 1 << 20


def one_step(size: str) -> OneStep:
    """A step of the model's size; its constants are of no account here."""
    pixels = 1024 if size in PAIRS else SIZES[size]["unet"]["sample_size"] * 8
    return OneStep(
        timestep=999,
        alpha_bar=0.0047,
        prediction_type="epsilon" if size in PAIRS else SIZES[size]["prediction_type"],
        scaling_factor=0.18215,
        latent_shape=(4, pixels // 8, pixels // 8),
        height=pixels,
        width=pixels,
    )


def zeros(kind: Any, config: Any) -> Any:
    """A module of class ``kind`` whose weights are zeros, in float16, made without drawing any."""
    with torch.device("meta"):
        module = kind(config) if isinstance(config, CLIPTextConfig) else kind(**config)
    module = module.half().eval()
    # Memory that is zero and that nobody writes to takes none, however large the weights are.
    for part in module.modules():
        for name, tensor in part.named_parameters(recurse=False):
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            setattr(part, name, torch.nn.Parameter(value, requires_grad=False))
        for name, tensor in part.named_buffers(recurse=False):
            setattr(part, name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    return module


def builders(size: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """By stage, what makes its module. 'vae_decoder tiny' is the tiny decoder."""
    decoders: dict[str, Callable[[], torch.nn.Module]] = {
        # Folding solves equations with the decoder's weights, which zeros do not allow.
        "vae_decoder": lambda: OneStepDecoder(AutoencoderKL(**VAE).eval()),
        "vae_decoder tiny": lambda: TinyDecoder(AutoencoderTiny().eval()),
    }
    if size in PAIRS:
        return {**pair_builders(size), **decoders}
    shapes = SIZES[size]

    def text_encoder() -> torch.nn.Module:
        config = CLIPTextConfig(vocab_size=49408, **shapes["text"])
        return TextEncoderStage(zeros(CLIPTextModel, config), torch.float16)

    def unet() -> torch.nn.Module:
        model = zeros(UNet2DConditionModel, shapes["unet"])
        fold_timestep(model, 999)
        return OneStepUNet(model, one_step(size))

    return {"text_encoder": text_encoder, "unet": unet, **decoders}


def pair_builders(size: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """The text stage and the UNet of SDXL or a relative, whose configuration the package has."""
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.read(write_config(size, Path(folder) / size))
    unet_config = {key: value for key, value in config.unet.items() if not key.startswith("_")}

    def text_encoder() -> torch.nn.Module:
        first = zeros(CLIPTextModel, CLIPTextConfig(**config.text_encoder))
        second = zeros(CLIPTextModelWithProjection, CLIPTextConfig(**config.text_encoder_2))
        unet = zeros(UNet2DConditionModel, unet_config)
        conditioning = Conditioning(unet, [999], size_numbers(1024, 1024))
        return TextPairStage(first, second, conditioning, torch.float16)

    def unet() -> torch.nn.Module:
        model = zeros(UNet2DConditionModel, unet_config)
        cut_conditioning(model)
        return OneStepUNet(model, one_step(size), conditioned=True)

    return {"text_encoder": text_encoder, "unet": unet}


def conditioning_shape(size: str) -> tuple[int, int] | None:
    """S and K of the conditioning; None for models without one."""
    if size not in PAIRS:
        return None
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.read(write_config(size, Path(folder) / size))
    unet_config = {key: value for key, value in config.unet.items() if not key.startswith("_")}
    with torch.device("meta"):
        return 1, conditioning_channels(UNet2DConditionModel(**unet_config))


def unet_counts(size: str) -> dict[str, int]:
    """Bytes of the graph's weights in float16, and operations of one call at 1024 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig.read(write_config(size, Path(folder) / size))
    unet_config = {key: value for key, value in config.unet.items() if not key.startswith("_")}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel(**unet_config).half()
        added = {"text_embeds": torch.zeros(1, 1280).half(), "time_ids": torch.zeros(1, 6)}
        unet(
            torch.zeros(1, 4, 128, 128).half(),
            torch.tensor(999),
            torch.zeros(1, TOKENS, 2048).half(),
            added_cond_kwargs=added,
        )
        cut_conditioning(unet)
    weights = sum(weight.numel() for weight in unet.parameters())
    return {"weight_bytes": 2 * weights, "flops": counter.get_total_flops()}


def measure(size: str, scratch: Path) -> dict[str, dict[str, int]]:
    """By stage, ``weight_bytes`` (its files) and ``activation_bytes``, with fused attention."""
    step = one_step(size)
    specs = stage_specs(
        layout="onestep",
        precision="fp16",
        batch=1,
        step=step,
        length=TOKENS,
        width=2048 if size in PAIRS else SIZES[size]["unet"]["cross_attention_dim"],
        axes={},
        names=unet_inputs("generate", conditioned=size in PAIRS),
        conditioning=conditioning_shape(size),
    )
    found = {}
    for name, build in builders(size).items():
        spec = specs[name.split()[0]]
        folder = scratch / size / name.replace(" ", "-")
        path = folder / "model.onnx"
        if not path.is_file():
            export_stage(to_half(build()), spec, folder)
        files = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        cost = stage_cost(path, spec)
        assert cost.fused_activation_bytes is not None
        found[name] = {"weight_bytes": files, "activation_bytes": cost.fused_activation_bytes}
        print(size, name, found[name], flush=True)
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    keep: Annotated[Path | None, typer.Option(help="Where the graphs are kept.")] = None,
    family: Annotated[bool, typer.Option(help="SDXL's family; the others stay.")] = False,
) -> None:
    """Write the sizes."""
    models = {}
    if family:
        models = json.loads(out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        for size, title in TITLES.items():
            if not family:
                models[title] = measure(size, keep or Path(scratch))
        exported = measure("vega", keep or Path(scratch))
    for size, title in PAIRS.items():
        models[title] = {**exported, "unet": {**exported["unet"], **unet_counts(size)}}
    out.write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
