"""The block of memory in which the stages of a pipeline hold their activations, on the fake.

The fake refuses a context without memory, memory that is too small and memory that is gone, and
writes over all of a stage's activations at every run.
"""

from __future__ import annotations

import numpy as np
import pytest

from hipa_deploy.engines.tensorrt import tensorrt_runner as runner_module
from hipa_deploy.engines.tensorrt.buffers import ActivationBlock
from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner
from hipa_deploy.errors import HipaError
from tests.engines.fake_gpu import FakeCudart, FakeEngine, FakeGpu
from tests.engines.tensorrt.test_tensorrt_runner import (
    COMPUTE,
    DECODER,
    IMAGE,
    INPUTS,
    TEXT,
    UNET,
    open_rows,
)
from tests.threads import in_threads

NEEDS = {"text_encoder": 300, "unet": 5000, "vae_decoder": 9000}


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    """A GPU that every runner of a test is opened on."""
    found = FakeGpu({}, FakeCudart())
    monkeypatch.setattr(runner_module, "load_tensorrt", lambda library: found.trt)
    monkeypatch.setattr(runner_module, "load_cudart", lambda library: found.cudart)
    return found


def open_runner(gpu, tmp_path, *specs, name="", needs=NEEDS, graph=True) -> TensorRTRunner:
    """A runner of the whole pipeline, or of ``specs``; ``name`` keeps engines of two apart."""
    stages = []
    for spec in specs or (TEXT, UNET, DECODER):
        engine = FakeEngine(spec, COMPUTE[spec.name], activations=needs[spec.name])
        gpu.engines[name + spec.name] = engine
        path = tmp_path / f"{name}{spec.name}.engine"
        path.write_text(name + spec.name)
        stages.append((spec, path))
    return TensorRTRunner(stages, "tensorrt", graph=graph)


def context_of(gpu, stage: str):
    return gpu.engines[stage].contexts[0]


@pytest.mark.parametrize("graph", [True, False])
def test_all_stages_share_one_block_of_the_largest_need(gpu, tmp_path, graph):
    with open_runner(gpu, tmp_path, graph=graph) as runner:
        addresses = {context_of(gpu, stage).activations for stage in NEEDS}
        assert len(addresses) == 1
        assert runner.activation_bytes == gpu.cudart.memory[addresses.pop()].size == 9000
        for _ in range(2):  # captured, then launched
            assert runner(**INPUTS)["images"].tolist() == IMAGE
    assert gpu.cudart.leaks == []


def test_the_block_outlives_the_graphs_and_the_contexts(gpu, tmp_path):
    runner = open_runner(gpu, tmp_path)
    runner(**INPUTS)
    address = context_of(gpu, "unet").activations
    for engine in gpu.engines.values():
        engine.contexts.clear()  # the runner alone holds them now
    runner.close()
    log = gpu.cudart.log
    assert address not in gpu.cudart.memory
    assert log.index("cudaGraphExecDestroy") < log.index("cudaFree")


def test_a_graph_keeps_the_block_that_it_was_captured_with(gpu, tmp_path):
    """The fake replays a graph with the addresses of its capture, and refuses memory that is gone.

    So a block that were freed or replaced without a new capture would fail here.
    """
    with open_runner(gpu, tmp_path, *map(open_rows, (TEXT, UNET, DECODER))) as runner:
        for rows in (1, 3, 1):
            feed = {name: np.repeat(value, rows, axis=0) for name, value in INPUTS.items()}
            for _ in range(2):
                assert runner(**feed)["images"].tolist() == IMAGE * rows
        address = context_of(gpu, "unet").activations
        block = gpu.cudart.memory.pop(address)
        with pytest.raises(HipaError, match=r"an illegal memory access was encountered"):
            runner(**INPUTS)
        gpu.cudart.memory[address] = block


def test_a_stage_alone_and_a_known_context_use_the_same_block(gpu, tmp_path):
    with open_runner(gpu, tmp_path) as runner:
        context = runner.runners["text_encoder"](tokens=INPUTS["tokens"])["context"]
        assert runner(noise=INPUTS["noise"], context=context)["images"].tolist() == IMAGE
        assert gpu.cudart.log.count("cudaMalloc") == 6  # five tensors and the block


def test_a_profiler_takes_no_memory_of_its_own(gpu, tmp_path):
    with open_runner(gpu, tmp_path) as runner:
        runner(**INPUTS)
        before = gpu.cudart.log.count("cudaMalloc")
        held = len(gpu.cudart.memory)
        runner.profile_layers(**INPUTS)
        assert len(gpu.engines["unet"].contexts) == 2
        assert gpu.cudart.log.count("cudaMalloc") == before
        assert len(gpu.cudart.memory) == held


def test_a_changed_engine_that_needs_more_gets_a_larger_block(gpu, tmp_path):
    def grow(trt, engine):
        engine.device_memory_size_v2 = 20_000

    with open_runner(gpu, tmp_path) as runner:
        runner(**INPUTS)
        first = context_of(gpu, "unet").activations
        runner.change_engine(grow, "unet")
        assert runner.activation_bytes == 20_000
        assert len({context_of(gpu, stage).activations for stage in NEEDS}) == 1
        for _ in range(2):
            assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert first not in gpu.cudart.memory or gpu.cudart.memory[first].size == 20_000
    assert gpu.cudart.leaks == []


def test_a_changed_engine_for_which_no_memory_is_left_closes_the_runner(gpu, tmp_path):
    def grow(trt, engine):
        engine.device_memory_size_v2 = 20_000
        gpu.cudart.fail = "cudaMalloc"

    runner = open_runner(gpu, tmp_path)
    with pytest.raises(
        HipaError, match=r"no block of 1 MiB is left on the GPU for the activations"
    ):
        runner.change_engine(grow, "unet")
    with pytest.raises(HipaError, match="closed"):
        runner(**INPUTS)
    assert gpu.cudart.leaks == []


def test_any_failure_to_place_the_activations_closes_the_runner(gpu, tmp_path, monkeypatch):
    """The contexts have the address of a block that is gone."""

    def fail(runner):
        raise RuntimeError("the driver is gone")

    runner = open_runner(gpu, tmp_path)
    monkeypatch.setattr(type(runner), "_place_activations", fail)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        runner.change_engine(lambda trt, engine: None)
    with pytest.raises(HipaError, match="closed"):
        runner(**INPUTS)
    assert gpu.cudart.leaks == []


def test_two_pipelines_have_a_block_each(gpu, tmp_path):
    """The fake refuses one block on two streams."""
    with open_runner(gpu, tmp_path) as one, open_runner(gpu, tmp_path, name="other") as other:
        first = context_of(gpu, "unet").activations
        assert first != context_of(gpu, "otherunet").activations

        def work(number: int) -> list[list[int]]:
            runner = one if number % 2 else other
            return runner(**INPUTS)["images"].tolist()

        one(**INPUTS)
        other(**INPUTS)
        assert in_threads(work, 4) == [IMAGE] * 4
    assert gpu.cudart.leaks == []


def test_an_engine_without_activations_runs(gpu, tmp_path):
    with open_runner(gpu, tmp_path, UNET, needs={"unet": 0}) as runner:
        assert runner.activation_bytes == 256
        feed = {"noise": INPUTS["noise"], "context": np.float16([[2, 4, 6]])}
        assert runner(**feed)["latents"].tolist() == [[12, 24, 36]]


def test_a_block_grows_and_never_shrinks():
    cuda = FakeCudart()
    block = ActivationBlock(cuda)
    block.reserve(1000)
    first = block.address
    block.reserve(500)
    assert (block.address, block.size) == (first, 1000)
    block.reserve(2000)
    assert [memory.size for memory in cuda.memory.values()] == [2000]
    block.free()
    block.free()
    assert cuda.leaks == []
