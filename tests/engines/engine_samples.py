"""Tiny real ONNX graphs, and bundles made of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.manifest import (
    Manifest,
    ModelInfo,
    OneStep,
    Parity,
    Stage,
    StageSpec,
    TensorSpec,
)
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.engines.store.engine_key import key_for
from hipa_deploy.engines.store.sidecar import PrecisionCheck, Sidecar, engine_path
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target, binding
from hipa_deploy.engines.tensorrt.gpu import Gpu

CONTENT = b"an engine"
PARITY = Parity(max_abs=0.0, mean_abs=0.0, cosine=1.0, psnr_db=99.0)
SHAPE = (1, 4, 8, 8)
ONE_STEP = OneStep(
    prediction_type="epsilon",
    timestep=999,
    alpha_bar=0.0047,
    scaling_factor=1.0,
    latent_shape=(4, 8, 8),
    height=8,
    width=8,
)
RTX_4090 = Gpu(
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    memory_mib=24564,
    integrated=False,
    driver="580.1",
    cuda="13.0",
)
ORIN = Gpu(name="Orin", sm=87, memory_mib=7620, integrated=True, driver="540.4", cuda="12.6")


def save_conv(path: Path, dtype: type, op: str = "Relu", external: bool = False) -> None:
    """x float32 -> cast -> 3x3 convolution in ``dtype`` -> ``op`` -> cast -> y float32."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(dtype)
    nodes = [
        helper.make_node("Cast", ["x"], ["x_in"], to=kind),
        helper.make_node("Conv", ["x_in", "weight"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node(op, ["h"], ["a"]),
        helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)
    graph = helper.make_graph(nodes, "conv", [x], [y], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0
    )


def conv_spec(name: str) -> StageSpec:
    return StageSpec(
        name=name,
        inputs=(TensorSpec(name="x", dtype="float32", shape=SHAPE),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=SHAPE),),
    )


def write_bundle(root: Path, precision: str = "fp16") -> Bundle:
    """Write the manifest for the ONNX files that lie under ``root`` and open the bundle."""
    stages = []
    for path in sorted(root.glob("*/model.onnx")):
        name = path.parent.name
        stage = Stage(
            spec=conv_spec(name),
            path=f"{name}/model.onnx",
            precision=precision,
            opset=20,
            parity=PARITY,
        )
        stages.append(stage)

    files = {}
    for path in sorted(root.glob("*/model.onnx*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[path.relative_to(root).as_posix()] = digest

    manifest = Manifest(
        schema_version=1,
        producer="tests",
        layout="onestep",
        precision=precision,
        batch=1,
        base_model=ModelInfo(name="tiny", sha256="0" * 64),
        adaptor=None,
        one_step=ONE_STEP,
        stages=tuple(stages),
        end_to_end=PARITY,
        files=files,
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle.open(root)


def put_engine(
    bundle, stage="unet", library="tensorrt", gpu=ORIN, content=CONTENT, activations=None, **changes
) -> Path:
    """Write an engine and the sidecar of a build on ``gpu``; returns the sidecar's path.

    ``activations`` is the sidecar's ``activation_bytes``; ``changes`` replace fields of its key.
    """
    target = Target(name="t", compute_capabilities=(gpu.sm,), **binding(library, gpu))
    key = key_for(bundle, stage, library, "10.13.3", target, BuildOptions()).model_copy(
        update=changes
    )
    path = bundle.root / "engines" / f"{library}-t" / f"{stage}-{key.short}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    engine_path(path).write_bytes(content)
    sidecar = Sidecar(
        producer="tests",
        stage=stage,
        key=key,
        precision_check=PrecisionCheck(by="inspector", float16=1, float32=0),
        engine_sha256=file_sha256(engine_path(path)),
        engine_bytes=len(content),
        activation_bytes=activations,
        build_seconds=1.0,
        build_peak_mib=None,
    )
    path.write_text(sidecar.model_dump_json())
    return path
