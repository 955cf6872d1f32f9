"""Repairs in real TensorRT-RTX builds: more outputs, a part in float32, options for Myelin."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.build.ladder import StageGraph
from hipa_deploy.engines.build.suspects import stage_job
from hipa_deploy.engines.build.worker import MYELIN, Job, environment
from hipa_deploy.engines.build.worker_process import run_worker
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey, key_for
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.engines.targets.target import Target
from hipa_deploy.errors import HipaError

pytest.importorskip("tensorrt_rtx")
BUNDLE = Bundle.open(embedded.BUNDLE)
STAGE = "text_encoder"


def job_of(repairs: Repairs, out: Path) -> Job:
    target = Target(name="t", compute_capabilities=(89,))
    key = key_for(BUNDLE, STAGE, "rtx", "1.7", target, BuildOptions()).repaired(repairs)
    return stage_job(BUNDLE, STAGE, StageGraph.read(BUNDLE, STAGE), key, out, BuildOptions())


def test_outputs_and_a_part_in_float32_are_built(tmp_path):
    out = tmp_path / "engine"
    repairs = Repairs(barriers=("val_95", "add_3"), islands=("attention",), optimization_level=2)
    job = job_of(repairs, out)
    assert job.options.optimization_level == 2
    check = run_worker(job, lambda event: None).precision_check
    # Two products of each of three attentions, of eight in a layer.
    assert (check.float16, check.float32) == (18, 6)
    assert out.stat().st_size > 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_every_layer_in_float32_is_built(tmp_path):
    """It is asked for, so it is no graph of another precision than the manifest says."""
    graph = StageGraph.read(BUNDLE, STAGE)
    layers = graph.blocks_like("text_encoder.text_model.encoder.layers.0")
    check = run_worker(
        job_of(Repairs(islands=layers), tmp_path / "e"), lambda event: None
    ).precision_check
    assert (check.float16, check.float32) == (0, 24)


def test_a_tensor_that_the_network_lacks_is_named(tmp_path):
    job = job_of(Repairs(barriers=("nothing",)), tmp_path / "engine")
    with pytest.raises(HipaError, match="the network has no tensor 'nothing'"):
        run_worker(job, lambda event: None)


def test_myelins_options_are_added_to_the_users(monkeypatch):
    monkeypatch.setenv(MYELIN, "-x=1 -peep:fc_h_fusion=off")
    more = ("-peep:fc_h_fusion=off", "-peep:match_dual_gemm=off")
    assert environment("tensorrt", more)[MYELIN] == f"-x=1 {' '.join(more)}"
    monkeypatch.delenv(MYELIN)
    assert MYELIN not in environment("tensorrt")
    assert environment("tensorrt", more)[MYELIN] == " ".join(more)


def test_a_key_without_repairs_has_the_name_that_it_always_had():
    key = EngineKey(
        onnx_sha256="0" * 64,
        external_sha256=(),
        precision="fp16",
        options=BuildOptions(),
        flavour="tensorrt",
        tensorrt="10.3.0",
        compute_capabilities=(87,),
        device="Orin",
        driver="540.4",
        cuda="12.6",
        l4t="36.4.3",
    )
    assert key.short == "c22d4e6b709b"
    assert key.repaired(Repairs(barriers=("h",))).short != key.short
    assert key.repaired(Repairs(barriers=("h",))).repaired(Repairs()) == key
    # A file of version 0.1.0 has no such field.
    old = key.model_dump(mode="json", exclude={"repairs"})
    assert EngineKey.model_validate(old) == key
