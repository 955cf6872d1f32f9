"""Adaptors exported to be swapped in, against bundles exported with them directly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import FOLDER, AdaptorSwap
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.onnx_weights import read_initializers, with_values
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import ADAPTOR, BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import check_decoder, export_swap
from hipa_deploy.export.graph import to_onnx
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.images.png import save_png
from hipa_deploy.models.adaptor_folder import WEIGHTS
from tests.export.conftest import make_adaptor
from tests.tiny_model import make_model

PROMPT = "a green pear"


@pytest.fixture(scope="module")
def other_adaptor(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adaptor than ``adaptor_dir``, on fewer layers: some of the first must be undone."""
    return make_adaptor(
        model_dir, tmp_path_factory.mktemp("adaptor") / "night", preset="paper", rank=2, alpha=6.0
    )


@pytest.fixture(scope="module")
def pair(
    model_dir: Path, adaptor_dir: Path, other_adaptor: Path, tmp_path_factory
) -> tuple[Bundle, Bundle]:
    """An FP16 bundle with an adaptor 'night' to swap in, and the bundle of night's own export."""
    root = tmp_path_factory.mktemp("bundles")
    options = ExportOptions(model=str(model_dir), adaptor=adaptor_dir, out=root / "base")
    base = export_bundle(options)
    own = export_bundle(replace(options, adaptor=other_adaptor, out=root / "own"))
    export_swap(
        SwapOptions(model=str(model_dir), adaptor=other_adaptor, bundle=base.root, out=night(base))
    )
    return base, own


def night(bundle: Bundle) -> Path:
    return bundle.root / FOLDER / "night"


def png(bundle: Bundle, path: Path, *adaptors: str | None) -> bytes:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        for adaptor in adaptors:
            pipe.swap_adaptor(adaptor)
        result = pipe(PROMPT, seed=5)
    # Which of the two bundles made the image is in its record, and differs.
    parameters = dict(result.parameters[0])
    for name in ("bundle", "bundle_name"):
        del parameters[name]
    save_png(path, result.images_BHWC[0], parameters)
    return path.read_bytes()


def test_the_same_png_as_the_adaptors_own_export(
    pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    base, own = pair
    swapped = png(base, tmp_path / "a.png", "night")
    assert swapped == png(own, tmp_path / "b.png")
    assert png(base, tmp_path / "c.png", "night", None) == png(base, tmp_path / "d.png") != swapped


def test_the_swapped_graph_is_the_direct_exports_file(pair: tuple[Bundle, Bundle]) -> None:
    base, own = pair
    swap = AdaptorSwap.open(base, "night")
    content, external = with_values(base.stage_path("unet"), swap.weights(base))
    assert content == own.stage_path("unet").read_bytes()
    assert not external
    assert swap.manifest.onnx_sha256 == file_sha256(own.stage_path("unet"))
    assert swap.manifest.parity == own.stages["unet"].parity
    places = {place for weight in swap.manifest.weights.values() for place in weight.places}
    assert any(".to_q." in place for place in places)
    # Only the first adaptor changes conv1: the swap gives it the base model's values again.
    assert any(".conv1.weight" in place for place in places)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"fuse": True, "prompts": True}, {"layout": "generic", "dtype": "fp32"}]
)
def test_other_bundles(
    changes: dict,
    model_dir: Path,
    adaptor_dir: Path,
    other_adaptor: Path,
    tiny_vae_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As of a large model, whose graphs are the same file with every adaptor.
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_BYTES", 0)
    decoder = None
    if "fuse" in changes:
        # A swap changes the UNet alone: the decoder is the smallest that there is. The generic
        # layout takes none.
        decoder = tiny_vae_dir
        changes = changes | {"prompts": model_dir / "prompts.txt", "decoder": decoder}
    options = ExportOptions(
        model=str(model_dir), adaptor=adaptor_dir, out=tmp_path / "base", **changes
    )
    base = export_bundle(options)
    own = export_bundle(replace(options, adaptor=other_adaptor, out=tmp_path / "own"))
    export_swap(
        SwapOptions(
            model=str(model_dir),
            adaptor=other_adaptor,
            bundle=base.root,
            out=night(base),
            decoder=decoder,
        )
    )
    assert png(base, tmp_path / "a.png", "night") == png(own, tmp_path / "b.png")


@pytest.mark.thorough
@pytest.mark.slow
def test_the_embedded_bundle(tmp_path: Path) -> None:
    """Its graph comes out equal here, whichever machine exported it.

    The adaptor at half its scale is another adaptor.
    """
    bundle = Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path / "bundle")))
    swap = export_swap(
        SwapOptions(
            model="emoji",
            adaptor=ADAPTOR,
            adaptor_scale=0.5,
            bundle=bundle.root,
            out=tmp_path / "half",
        )
    )
    layers = {key.split(".lora")[0] for key in load_file(ADAPTOR / WEIGHTS)}
    changed = [name for name, weight in swap.manifest.weights.items() if weight.fold != "timestep"]
    assert len(changed) == len(layers) == 118
    # A folded bias may round otherwise on this machine.
    values = swap.weights(bundle)
    initializers = read_initializers(bundle.stage_path("unet"))
    for name in swap.manifest.weights.keys() - set(changed):
        np.testing.assert_allclose(values[name], initializers[name].read(), rtol=1e-3, atol=1e-5)
    assert swap.manifest.parity.psnr_db > 60
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        first = pipe("3d emoji of a red apple").images_BHWC
        pipe.swap_adaptor(tmp_path / "half")
        assert not np.array_equal(pipe("3d emoji of a red apple").images_BHWC, first)
        pipe.swap_adaptor(None)
        np.testing.assert_array_equal(pipe("3d emoji of a red apple").images_BHWC, first)


def options_for(
    pair: tuple[Bundle, Bundle], model_dir: Path, adaptor: Path, out: Path
) -> SwapOptions:
    return SwapOptions(model=str(model_dir), adaptor=adaptor, bundle=pair[0].root, out=out)


def test_the_adaptor_that_is_there_already(
    pair, model_dir: Path, adaptor_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match="changes no weight of it"):
        export_swap(options_for(pair, model_dir, adaptor_dir, tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_another_base_model(pair, adaptor_dir: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "tiny", seed=3)
    with pytest.raises(HipaError, match="another base model"):
        export_swap(options_for(pair, other, adaptor_dir, tmp_path / "x"))


def test_another_timestep(pair, model_dir: Path, other_adaptor: Path, tmp_path: Path) -> None:
    adaptor = Path(shutil.copytree(other_adaptor, tmp_path / "early"))
    path = adaptor / "hipa_adaptor.json"
    path.write_text(path.read_text().replace('"timestep": 999', '"timestep": 499'))
    with pytest.raises(HipaError, match=r"timestep 499, .* is for 999"):
        export_swap(options_for(pair, model_dir, adaptor, tmp_path / "x"))


def test_an_adaptor_that_the_bundles_precision_cannot_hold(
    pair, model_dir, other_adaptor, tmp_path: Path
) -> None:
    """Weights beyond float16, and the bundle has no island for them."""
    options = replace(
        options_for(pair, model_dir, other_adaptor, tmp_path / "x"), adaptor_scale=1e6
    )
    with pytest.raises(
        HipaError, match=r"with the bundle's FP32 islands. Export a bundle of its own"
    ):
        export_swap(options)


def test_a_graph_that_comes_out_different(
    pair, model_dir: Path, other_adaptor: Path, tmp_path: Path
) -> None:
    """As another version of the exporter would make it: here, a node has another name."""
    root = Path(shutil.copytree(pair[0].root, tmp_path / "bundle"))
    path = root / "unet/model.onnx"
    before = file_sha256(path)
    path.write_bytes(path.read_bytes().replace(b"node_conv2d_1", b"node_conv2d_X"))
    manifest = root / "hipa.json"
    manifest.write_text(manifest.read_text().replace(before, file_sha256(path)))
    options = SwapOptions(
        model=str(model_dir), adaptor=other_adaptor, bundle=root, out=tmp_path / "x"
    )
    with pytest.raises(HipaError, match="the graph comes out different"):
        export_swap(options)


def test_a_fused_bundle_keeps_its_decoder(
    pair: tuple[Bundle, Bundle], model_dir: Path, tmp_path: Path
) -> None:
    check_decoder(pair[0], ChosenParts(ModelParts.open(str(model_dir)), "generate"))
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(HipaError, match=r"another decoder than this. Give --decoder, vae"):
        check_decoder(pair[0], ChosenParts(ModelParts.open(str(other)), "generate"))
