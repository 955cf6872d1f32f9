"""The weight map, by value: TensorRT's weight -> ONNX initializer -> parameter of the merged model.

The values are computed here once more from the model's folder, the adaptor and the folds' formulas,
and compared bit for bit.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch.nn.functional import linear, silu
from transformers import CLIPTextModel

from hipa_deploy.bundle.adaptor_swap import (
    WEIGHT_MAP,
    MappedWeight,
    WeightMap,
    read_weight_map,
    refittable_weights,
)
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.bundle.onnx_weights import read_initializers, skeleton_sha256
from hipa_deploy.embedded import ADAPTOR, BUNDLE, MODEL
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.modules import TinyDecoder, named_encoder
from hipa_deploy.export.graph.to_onnx import export_stage
from hipa_deploy.export.graph.weight_map import LAYOUTS
from hipa_deploy.export.merge import merge_adaptor
from hipa_deploy.models.adaptor_folder import read_metadata
from tests.network_samples import network_weights, parse
from tests.tiny_model import make_model

TIMESTEP = 999
TINY_DECODER = (("latents", "float32", (1, 4, 4, 4)), ("images", "uint8", (1, 16, 16, 3)))


@torch.no_grad()
def merged_model(
    model_dir: Path, adaptor_dir: Path | None, timesteps: tuple[int, ...] = (TIMESTEP,)
) -> dict[str, np.ndarray]:
    """Parameters and buffers of the three parts in float32, by place: merged and folded."""
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    if adaptor_dir:
        merge_adaptor(unet, adaptor_dir)
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae")
    encoder = named_encoder(CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder"))
    parts = {"unet": unet, "vae": vae, "text_encoder": encoder}
    values = {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    # The timestep's fold: each block's bias, plus its projection of the embedding.
    one = unet.time_embedding.linear_1
    two = unet.time_embedding.linear_2
    embeddings = [unet.time_proj(torch.tensor([timestep])) for timestep in timesteps]
    embeddings = [
        linear(silu(linear(time, one.weight, one.bias)), two.weight, two.bias)
        for time in embeddings
    ]
    for name in [name for name in values if name.endswith("time_emb_proj.weight")]:
        block = name.removesuffix(".time_emb_proj.weight")
        bias = values[f"{block}.time_emb_proj.bias"]
        shift = torch.cat([linear(silu(embedding), values[name], bias) for embedding in embeddings])
        values[f"{block}.conv1.bias"] = values[f"{block}.conv1.bias"] + (
            shift if len(timesteps) > 1 else shift[0]
        )
    # The decoder input's fold.
    mix = values["vae.post_quant_conv.weight"][:, :, 0, 0]
    scale = vae.config.scaling_factor
    kernel = torch.einsum("omhw,mi->oihw", values["vae.decoder.conv_in.weight"], mix) / scale
    offset = scale * torch.linalg.solve(mix, values["vae.post_quant_conv.bias"])
    values |= {
        "vae.decoder.conv_in.weight": kernel,
        "vae.post_quant_conv.bias": offset.view(1, -1, 1, 1),
    }
    # The encoder output's fold, in float64 as the export computes it.
    mean = values["vae.quant_conv.weight"][:4, :, 0, 0].double()
    last = values["vae.encoder.conv_out.weight"].double()
    bias = mean @ values["vae.encoder.conv_out.bias"].double() + values["vae.quant_conv.bias"][:4]
    values["vae.encoder.conv_out.weight"] = (
        scale * torch.einsum("om,mihw->oihw", mean, last)
    ).float()
    values["vae.encoder.conv_out.bias"] = (scale * bias).float()
    return {name: value.numpy() for name, value in values.items()}


@pytest.fixture(scope="module")
def fp16_bundle(
    model_dir: Path, adaptor_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "fp16"
    return export_bundle(ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=out))


def map_of(bundle: Bundle, stage: str) -> WeightMap:
    found = read_weight_map(bundle, stage)
    assert found is not None
    return found


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder"])
def test_every_initializer_is_its_place_in_the_merged_model(
    stage: str, precision: str, model_dir: Path, adaptor_dir: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(f"{precision}_bundle")
    check_values(bundle, stage, merged_model(model_dir, adaptor_dir))


def check_values(bundle: Bundle, stage: str, expected: dict[str, np.ndarray]) -> None:
    weights = read_initializers(bundle.stage_path(stage))
    mapped = map_of(bundle, stage)
    assert weights.keys() == {*mapped.weights, *mapped.constants}
    for name, entry in mapped.weights.items():
        value = weights[name].read()
        for place in entry.places:
            laid = LAYOUTS[entry.layout](
                folded(expected[place], entry).astype(value.dtype), value.shape
            )
            np.testing.assert_array_equal(value, laid, err_msg=f"{name} = {place}")


def folded(value: np.ndarray, entry: MappedWeight) -> np.ndarray:
    """A kernel as the fold of ``entry`` changed it.

    Of a 3x3 kernel [O, I, 3, 3] after an upsampling, one of the four 2x2 kernels in its place.
    """
    if not (entry.fold and entry.fold.startswith("upsampling")):
        return value
    for axis, parity in zip((2, 3), entry.fold.split()[1], strict=True):
        a, b, c = np.moveaxis(value, axis, 0)
        value = np.stack((a, b + c) if parity == "0" else (a + b, c), axis)
    return value


@pytest.mark.parametrize(
    ("stage", "part", "gone"),
    [
        ("unet", "unet.", ("unet.time_embedding.", ".time_emb_proj.")),  # folded into biases
        ("vae_decoder", "vae.decoder.", ()),
        ("text_encoder", "text_encoder.", ()),
    ],
)
def test_every_parameter_of_the_model_is_in_the_graph_once(
    stage: str,
    part: str,
    gone: tuple[str, ...],
    fp32_bundle: Bundle,
    model_dir: Path,
    adaptor_dir: Path,
) -> None:
    wanted = {
        name
        for name, value in merged_model(model_dir, adaptor_dir).items()
        if name.startswith(part)
        and value.dtype.kind == "f"
        and not any(word in name for word in gone)
    }
    places = Counter(
        (p, entry.fold)
        for entry in map_of(fp32_bundle, stage).weights.values()
        for p in entry.places
    )
    assert {place for place, _ in places if place.startswith(part)} == wanted
    assert set(places.values()) == {1}
    assert {sum(p == place for p, _ in places) for place in wanted} <= {
        1,
        4,
    }  # four kernels after an upsampling


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_edit_of_several_strengths(model_dir: Path, tmp_path: Path, dtype: str) -> None:
    """Its biases are tables, which an adaptor changes; its encoder ends with the folded mean."""
    strengths = (1.0, 0.5)
    options = ExportOptions(
        model=str(model_dir),
        out=tmp_path / "b",
        dtype=dtype,
        task="edit",
        strengths=strengths,
        prompts=model_dir / "prompts.txt",  # the text encoder is that of the other bundles
    )
    bundle = export_bundle(options)
    expected = merged_model(model_dir, None, (999, 499))
    for stage in bundle.stages:
        check_values(bundle, stage, expected)
    tables = {n: e for n, e in map_of(bundle, "unet").weights.items() if e.fold == "timesteps"}
    assert len(tables) == 8
    assert all(
        entry.adaptable and entry.places[0].endswith(".conv1.bias") for entry in tables.values()
    )
    folded_last = {
        p for e in map_of(bundle, "vae_encoder").weights.values() if e.fold for p in e.places
    }
    assert folded_last == {"vae.encoder.conv_out.weight", "vae.encoder.conv_out.bias"}
    check_network(bundle, expected)


def test_folded_biases_are_marked_as_such(fp32_bundle: Bundle) -> None:
    found = {
        place: entry.fold
        for stage in fp32_bundle.stages
        for entry in map_of(fp32_bundle, stage).weights.values()
        for place in entry.places
        if entry.fold
    }
    timestep = {place for place, fold in found.items() if fold == "timestep"}
    assert len(timestep) == 8
    assert all(place.startswith("unet.") and place.endswith(".conv1.bias") for place in timestep)
    assert {place for place, fold in found.items() if fold == "decoder input"} == {
        "vae.decoder.conv_in.weight",
        "vae.post_quant_conv.bias",
    }
    upsampled = {place for place, fold in found.items() if fold.startswith("upsampling")}
    assert upsampled == {f"vae.decoder.up_blocks.{n}.upsamplers.0.conv.weight" for n in (0, 1)}


def test_what_an_adaptor_can_change(fp32_bundle: Bundle, fp16_bundle: Bundle) -> None:
    for bundle in (fp32_bundle, fp16_bundle):
        names = refittable_weights(bundle, "unet")
        mapped = map_of(bundle, "unet")
        places = {place for name in names for place in mapped.weights[name].places}
        norms = {p for entry in mapped.weights.values() for p in entry.places if "norm" in p}
        assert norms
        assert places.isdisjoint(norms)
        assert {p for p in places if p.endswith("bias")} == {
            p for p in places if p.endswith("conv1.bias")
        }
        assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight" in places


def test_a_tiny_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(decoder_block_out_channels=(8, 8, 8), num_decoder_blocks=(1, 1, 1))
    expected = {
        f"decoder.{name}": value.detach().numpy().copy() for name, value in tiny.named_parameters()
    }
    tensors = [
        TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in TINY_DECODER
    ]
    export_stage(
        TinyDecoder(tiny), StageSpec(name="d", inputs=tensors[:1], outputs=tensors[1:]), tmp_path
    )
    mapped = WeightMap.model_validate_json((tmp_path / WEIGHT_MAP).read_text()).weights
    weights = read_initializers(tmp_path / "model.onnx")
    for name, entry in mapped.items():
        value = folded(expected[entry.places[0]], entry)
        np.testing.assert_array_equal(
            weights[name].read(), LAYOUTS[entry.layout](value, weights[name].shape)
        )
    places = {place for entry in mapped.values() for place in entry.places}
    assert places == {name for name in expected if name.startswith("decoder.decoder.")}


@pytest.mark.slow
def test_constants_hold_nothing_of_the_weights(fp32_bundle: Bundle, tmp_path: Path) -> None:
    """Another model of the same shape has the same constants, bit for bit, and other weights."""
    other = make_model(tmp_path / "tiny", seed=7)
    theirs = export_bundle(
        ExportOptions(model=str(other), out=tmp_path / "other", dtype="fp32", batch=2)
    )
    for stage in fp32_bundle.stages:
        ours = read_initializers(fp32_bundle.stage_path(stage))
        found = read_initializers(theirs.stage_path(stage))
        mapped = map_of(fp32_bundle, stage)
        assert map_of(theirs, stage).constants == mapped.constants
        for name in mapped.constants:
            np.testing.assert_array_equal(ours[name].read(), found[name].read(), err_msg=name)
        for name in (name for name, entry in mapped.weights.items() if len(ours[name].shape) > 1):
            values = ours[name].read()
            assert values.std() == 0 or not np.array_equal(values, found[name].read()), name


def test_every_weight_of_the_tensorrt_network_is_traced(
    fp16_bundle: Bundle, model_dir: Path, adaptor_dir: Path
) -> None:
    """From what TensorRT-RTX's parser holds to the value in the merged model."""
    check_network(fp16_bundle, merged_model(model_dir, adaptor_dir))


@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    """The same on the embedded model; the packaged bundle has this graph and these values."""
    bundle = export_bundle(ExportOptions(model="emoji", adaptor=ADAPTOR, out=tmp_path / "emoji"))
    expected = merged_model(MODEL, ADAPTOR, (read_metadata(ADAPTOR).timestep,))
    shipped = Bundle.open(BUNDLE)
    check_network(bundle, expected)
    for stage in bundle.stages:
        check_values(bundle, stage, expected)
    ours = bundle.stage_path("unet")
    theirs = shipped.stage_path("unet")
    weights = read_initializers(ours)
    found = read_initializers(theirs)
    assert skeleton_sha256(ours, weights) == skeleton_sha256(theirs, found)
    for name, weight in weights.items():  # another processor may round the last bit another way
        np.testing.assert_allclose(
            weight.read(), found[name].read(), rtol=2**-10, atol=1e-7, err_msg=name
        )


def check_network(bundle: Bundle, expected: dict[str, np.ndarray]) -> None:
    for stage in bundle.stages:
        path = bundle.stage_path(stage)
        mapped = map_of(bundle, stage)
        trt, network, _alive = parse(path)
        held = network_weights(trt, network, onnx.load(path))
        assert mapped.weights.keys() <= held.keys()
        assert held.keys() - mapped.weights.keys() <= set(mapped.constants)
        for name, entry in mapped.weights.items():
            initializer = read_initializers(path)[name]
            source = folded(expected[entry.places[0]], entry).astype(initializer.dtype)
            laid = LAYOUTS[entry.layout](source, initializer.shape)
            np.testing.assert_array_equal(
                np.asarray(held[name]).reshape(-1), laid.reshape(-1), err_msg=name
            )
            assert network.mark_weights_refittable(name)
