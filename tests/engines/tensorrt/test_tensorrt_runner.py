"""The runner's buffers, order of calls, graphs, errors and clean-up, on a recording fake.

The fake is tests/engines/fake_gpu.py; it refuses what CUDA and TensorRT refuse.
"""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest

from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.engines.tensorrt import tensorrt_runner as runner_module
from hipa_deploy.engines.tensorrt.engine_stage import deserialise
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from hipa_deploy.engines.tensorrt.tensorrt_runner import TensorRTRunner
from hipa_deploy.errors import HipaError
from tests.engines.fake_gpu import FakeCudart, FakeEngine, FakeGpu
from tests.threads import in_threads


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


TOKENS = tensor("tokens", "int64", 1, 3)
CONTEXT = tensor("context", "float16", 1, 3)
NOISE = tensor("noise", "float32", 1, 3)
LATENTS = tensor("latents", "float32", 1, 3)
IMAGES = tensor("images", "uint8", 1, 3)
TEXT = StageSpec(name="text_encoder", inputs=(TOKENS,), outputs=(CONTEXT,))
UNET = StageSpec(name="unet", inputs=(NOISE, CONTEXT), outputs=(LATENTS,))
DECODER = StageSpec(name="vae_decoder", inputs=(LATENTS,), outputs=(IMAGES,))
COMPUTE = {
    "text_encoder": lambda tokens: {"context": 2 * tokens},
    "unet": lambda noise, context: {"latents": noise + context},
    "vae_decoder": lambda latents: {"images": latents + 1},
}
INPUTS = {"tokens": np.asarray([[1, 2, 3]]), "noise": np.float32([[10, 20, 30]])}
IMAGE = [[13, 25, 37]]  # noise + 2 tokens + 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Opens a runner on fakes, by default of the whole pipeline.

    ``fake.gpu`` is the fake behind the latest runner.
    """

    def make(
        *specs: StageSpec, fail="", integrated=False, graph=True, gone=(), rtx=False, **options
    ):
        specs = specs or (TEXT, UNET, DECODER)
        engines = {
            spec.name: FakeEngine(spec, COMPUTE[spec.name], **options.get(spec.name, {}))
            for spec in specs
        }
        make.gpu = FakeGpu({**engines, **dict.fromkeys(gone)}, FakeCudart(fail, integrated), rtx)
        monkeypatch.setattr(runner_module, "load_tensorrt", lambda library: make.gpu.trt)
        monkeypatch.setattr(runner_module, "load_cudart", lambda library: make.gpu.cudart)
        for name in engines:
            (tmp_path / f"{name}.engine").write_text(name)
        return TensorRTRunner(
            [(s, tmp_path / f"{s.name}.engine") for s in specs], "tensorrt", graph=graph
        )

    return make


def calls(fake, since: int) -> list[str]:
    return fake.gpu.cudart.log[since:]


def test_the_whole_pipeline_is_one_graph_launch_and_gives_everything_back(fake):
    with fake() as runner:
        assert [t.name for t in runner.spec.inputs] == ["tokens", "noise"]
        assert [t.name for t in runner.spec.outputs] == ["images"]
        first = runner(**INPUTS)["images"]
        assert first.dtype == np.uint8
        assert first.tolist() == IMAGE
        before = len(fake.gpu.cudart.log)
        second = runner(**{**INPUTS, "noise": np.zeros((1, 3), np.float32)})["images"]
        assert second.tolist() == [[3, 5, 7]]
        assert first.tolist() == IMAGE, "the caller's array is not the runner's buffer"
        assert calls(fake, before) == [
            "cudaStreamSynchronize",
            "cudaMemcpyAsync",
            "cudaMemcpyAsync",
            "cudaGraphLaunch",
            "cudaMemcpyAsync",
            "cudaStreamSynchronize",
        ]
        assert runner.graph_problem is None
        contexts = [weakref.ref(engine.contexts.pop()) for engine in fake.gpu.engines.values()]
    assert fake.gpu.cudart.leaks == []
    assert [context() for context in contexts] == [None] * 3
    runner.close()
    with pytest.raises(HipaError, match="closed"):
        runner(**INPUTS)


def test_a_stage_between_two_others_reads_the_buffer_that_the_first_wrote(fake):
    with fake() as runner:
        runner(**INPUTS)
        text, unet, decoder = fake.gpu.engines.values()
        unet_addresses = unet.contexts[0].addresses
        assert text.contexts[0].addresses["context"] == unet_addresses["context"]
        assert decoder.contexts[0].addresses["latents"] == unet_addresses["latents"]


def test_with_a_known_context_the_text_encoder_does_not_run(fake):
    with fake() as runner:
        results = runner.run(INPUTS, ("images", "context"))
        before = len(fake.gpu.cudart.log)
        again = runner(noise=INPUTS["noise"], context=results["context"] + np.float16(1))
        assert again["images"].tolist() == [[14, 26, 38]]
        assert runner.device_ms == 2  # two stages, a fake millisecond each
        assert "cudaStreamBeginCapture" in calls(fake, before)  # another graph, beside the first
        before = len(fake.gpu.cudart.log)
        assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert "cudaStreamBeginCapture" not in calls(fake, before)


def test_what_only_keeps_a_stage_from_running_is_left_out(fake, monkeypatch):
    """SDXL's text stage gives a pooled vector that no other stage of the one step takes."""
    pooled = tensor("pooled", "float16", 1, 2)
    text = TEXT.model_copy(update={"outputs": (CONTEXT, pooled)})
    whole = lambda tokens: {"context": 2 * tokens, "pooled": tokens[:, :2]}  # noqa: E731
    monkeypatch.setitem(COMPUTE, "text_encoder", whole)
    with fake(text, UNET, DECODER) as runner:
        known = runner.run(INPUTS, ("context", "pooled"))
        feed = {**known, "noise": INPUTS["noise"]}
        assert runner.run(feed, ("images",))["images"].tolist() == IMAGE
        assert runner.device_ms == 2, "the text encoder did not run"
        # The decoder alone, as after the last step of a refining.
        feed = {**known, "latents": np.float32([[1, 2, 3]])}
        assert runner.run(feed, ("images",))["images"].tolist() == [[2, 3, 4]]
        with pytest.raises(HipaError, match="got inputs"):
            runner.run({**feed, "unknown": known["pooled"]}, ("images",))


@pytest.mark.parametrize("graph", [True, False])
def test_a_stage_alone_is_made_ready_again_after_other_shapes(fake, graph):
    """Its inputs change their shapes in a run of all stages too, where no feed names them."""
    several = {"batch": Axis(min=1, opt=1, max=4)}

    def batched(spec: StageSpec) -> StageSpec:
        def open_batch(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(each.model_copy(update={"shape": ("batch", 3)}) for each in tensors)

        changes = {"inputs": open_batch(spec.inputs), "outputs": open_batch(spec.outputs)}
        return spec.model_copy(update={**changes, "axes": several})

    with fake(batched(UNET), batched(DECODER), graph=graph) as runner:

        def decoded(*rows: list[int]) -> list[list[int]]:
            return runner.run({"latents": np.float32(rows)}, ("images",))["images"].tolist()

        assert decoded([1, 1, 1], [50, 50, 50]) == [[2, 2, 2], [51, 51, 51]]
        one = {"noise": np.float32([[7, 7, 7]]), "context": np.float16([[1, 1, 1]])}
        assert runner.run(one, ("images",))["images"].tolist() == [[9, 9, 9]]
        before = len(fake.gpu.cudart.log)
        assert decoded([2, 2, 2], [90, 90, 90]) == [[3, 3, 3], [91, 91, 91]]
        # A graph of one row's run would be launched on a context for two.
        assert ("cudaStreamBeginCapture" in calls(fake, before)) == graph


def test_a_stage_by_itself_is_a_runner(fake):
    with fake() as runner:
        unet = runner.runners["unet"]
        feed = {"noise": INPUTS["noise"], "context": np.float16([[1, 1, 1]])}
        assert unet.device_ms is None
        assert unet(**feed)["latents"].tolist() == [[11, 21, 31]]
        assert unet.device_ms == 1
        assert runner.runners["text_encoder"].device_ms is None, "it did not run"
        with pytest.raises(
            HipaError, match=r"unet: got inputs \['noise'\], expected \['context', 'noise'\]"
        ):
            unet(noise=INPUTS["noise"])
        with unet:
            pass
        with pytest.raises(HipaError, match="closed"):
            runner(**INPUTS)


def test_an_engine_is_changed_while_idle_and_its_graph_captured_anew(fake):
    def change(trt, engine):
        assert (trt.__name__, engine) == ("fake_tensorrt", fake.gpu.engines["unet"])
        assert not fake.gpu.cudart.queue, "what was under way has ended"
        assert not fake.gpu.cudart.executables
        engine.compute = lambda noise, context: {"latents": noise - context}

    with fake() as runner:
        runner.run_on_device(INPUTS)
        runner.runners["unet"].change_engine(change)
        before = len(fake.gpu.cudart.log)
        assert runner(**INPUTS)["images"].tolist() == [[9, 17, 25]]
        assert "cudaStreamBeginCapture" in calls(fake, before)
    with pytest.raises(HipaError, match="closed"):
        runner.change_engine(change)


def test_looking_at_an_engine_keeps_what_is_captured(fake):
    """A service looks whether an engine takes other weights; its first request is to be fast."""
    seen = []

    def look(trt, engine):
        seen.append((trt.__name__, engine))

    with fake() as runner:
        runner(**INPUTS)
        before = len(fake.gpu.cudart.log)
        runner.look_at_engine(look)
        runner.runners["unet"].look_at_engine(look)
        engines = fake.gpu.engines
        assert seen == [("fake_tensorrt", engines[name]) for name in ("text_encoder", "unet")]
        assert calls(fake, before) == []
        runner(**INPUTS)
        assert "cudaStreamBeginCapture" not in calls(fake, before)
    with pytest.raises(HipaError, match="closed"):
        runner.look_at_engine(look)


def test_device_time_is_of_each_stage_and_of_the_whole(fake):
    with fake() as runner:
        assert runner.device_ms is None
        for _ in range(2):  # captured, then launched
            runner(**INPUTS)
            assert runner.device_ms == 3
            assert runner.runners["unet"].device_ms == 1


def test_device_memory_is_what_loading_took(fake):
    with fake() as runner:
        assert runner.device_memory_mib == runner.runners["unet"].device_memory_mib
        # The fake's MiB are bytes. Every tensor has memory on the device and a pinned copy.
        # The stages' activations share one block.
        assert runner.device_memory_mib == 2 * (24 + 6 + 12 + 12 + 3) + 1024


def test_where_memory_is_shared_nothing_is_copied(fake):
    with fake(integrated=True) as runner:
        assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert {"cudaMemcpyAsync", "cudaMallocHost"}.isdisjoint(fake.gpu.cudart.log)
        assert fake.gpu.cudart.log.count("cudaMalloc") == 1  # the activations
    assert fake.gpu.cudart.leaks == []


def test_outputs_can_stay_on_the_device(fake):
    with fake() as runner:
        array = runner.run_on_device(INPUTS)["images"]
        interface = array.__cuda_array_interface__
        assert interface["shape"] == (1, 3)
        assert interface["typestr"] == "|u1"
        assert interface["version"] == 3
        assert interface["stream"] == 7
        memory = fake.gpu.cudart.memory[interface["data"][0]]
        assert memory.kind == "device"
        array.wait()
        assert list(memory.raw) == IMAGE[0]
        other = runner.run_on_device({**INPUTS, "noise": np.zeros((1, 3), np.float32)})["images"]
        with pytest.raises(HipaError, match="stale"):
            array.__cuda_array_interface__  # noqa: B018
        assert other.__dlpack_device__() == (2, 0)
    with pytest.raises(HipaError, match="stale"):
        other.__dlpack__()


def test_layers_are_profiled_in_a_pass_and_a_context_of_their_own(fake):
    with fake() as runner:
        runner(**INPUTS)
        layers = runner.profile_layers(**INPUTS)
        assert layers[:2] == [("text_encoder/conv", 0.75), ("text_encoder/relu", 0.25)]
        assert len(layers) == 6
        assert [len(engine.contexts) for engine in fake.gpu.engines.values()] == [2, 2, 2]
        assert all(engine.contexts[0].profiler is None for engine in fake.gpu.engines.values())
        feed = {"noise": INPUTS["noise"], "context": np.float16([[1, 1, 1]])}
        assert runner.runners["unet"].profile_layers(**feed) == [("conv", 0.75), ("relu", 0.25)]
        assert runner(**INPUTS)["images"].tolist() == IMAGE


@pytest.mark.parametrize(
    ("options", "fail", "reason"),
    [
        (
            {"spoils_capture": True},
            "",
            "could not run the engine: set-up is not permitted when stream is capturing",
        ),
        ({"capturable": False}, "", "TensorRT-RTX cannot capture this engine"),
        ({}, "cudaStreamBeginCapture", "cudaStreamBeginCapture failed"),
        ({}, "cudaStreamEndCapture", "cudaStreamEndCapture failed"),
        ({}, "cudaGraphInstantiate", "cudaGraphInstantiate failed"),
    ],
)
def test_a_capture_that_fails_warns_once_and_the_stages_still_run(fake, options, fail, reason):
    with fake(unet=options, fail=fail) as runner:
        with pytest.warns(RuntimeWarning, match=f"no CUDA graph .*{reason}"):
            assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert reason in runner.graph_problem
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert runner.device_ms == 3
        assert "cudaGraphLaunch" not in fake.gpu.cudart.log
    assert fake.gpu.cudart.leaks == []


def test_an_engine_that_says_it_can_be_captured_is(fake):
    with fake(unet={"capturable": True}) as runner:
        runner(**INPUTS)
        assert "cudaGraphLaunch" in fake.gpu.cudart.log


def test_without_a_graph_nothing_is_captured(fake):
    with fake(graph=False) as runner:
        assert runner(**INPUTS)["images"].tolist() == IMAGE
        assert runner.device_ms == 3
        assert "cudaStreamBeginCapture" not in fake.gpu.cudart.log


def open_rows(spec: StageSpec) -> StageSpec:
    def reshaped(tensors):
        return tuple(t.model_copy(update={"shape": ("batch", 3)}) for t in tensors)

    axes = {"batch": Axis(min=1, opt=1, max=3)}
    return StageSpec(
        name=spec.name, inputs=reshaped(spec.inputs), outputs=reshaped(spec.outputs), axes=axes
    )


def repeated(rows: int) -> dict[str, np.ndarray]:
    return {name: value.repeat(rows, axis=0) for name, value in INPUTS.items()}


def test_other_shapes_are_captured_again_and_the_old_graph_goes(fake):
    with fake(*map(open_rows, (TEXT, UNET, DECODER)), unet={"max_rows": 2}) as runner:
        for rows in (1, 2, 1):
            before = len(fake.gpu.cudart.log)
            assert runner(**repeated(rows))["images"].tolist() == IMAGE * rows
            assert calls(fake, before).count("cudaStreamBeginCapture") == 1
            assert len(fake.gpu.cudart.executables) == 1
        with pytest.raises(HipaError, match=r"unet: the engine refuses noise of shape \[3, 3\]"):
            runner(**repeated(3))
        with pytest.raises(HipaError, match="batch is 4, expected 1 to 3"):
            runner(**repeated(4))
        assert runner(**INPUTS)["images"].tolist() == IMAGE
    assert fake.gpu.cudart.leaks == []


@pytest.mark.parametrize(("rtx", "strategy"), [(True, "eager"), (False, None)])
def test_kernels_for_dynamic_shapes_are_compiled_before_a_capture(fake, rtx, strategy):
    with fake(open_rows(UNET), rtx=rtx):
        assert fake.gpu.engines["unet"].strategy == strategy
    with fake(UNET, rtx=rtx):
        assert fake.gpu.engines["unet"].strategy is None


def test_the_same_shapes_with_and_without_the_text_encoder_keep_both_graphs(fake):
    with fake(*map(open_rows, (TEXT, UNET, DECODER))) as runner:
        context = runner.run(INPUTS, ("context",))["context"]
        runner(noise=INPUTS["noise"], context=context)
        assert len(fake.gpu.cudart.executables) == 2


def test_non_contiguous_inputs_are_copied_right(fake):
    with fake() as runner:
        noise = np.ascontiguousarray(np.float32([[10, 0], [20, 0], [30, 0]]).T)[:1][:, ::1]
        backwards = np.float32([[30, 20, 10]])[:, ::-1]
        assert runner(**{**INPUTS, "noise": backwards})["images"].tolist() == IMAGE
        assert runner(**{**INPUTS, "noise": noise})["images"].tolist() == IMAGE


def test_wrong_inputs_are_refused_before_any_call(fake):
    with fake() as runner:
        before = list(fake.gpu.cudart.log)
        with pytest.raises(HipaError, match="input noise is float64"):
            runner(**{**INPUTS, "noise": np.zeros((1, 3))})
        assert fake.gpu.cudart.log == before


@pytest.mark.parametrize(
    ("options", "fail", "message"),
    [
        ({"context": False}, "", "unet: the engine gives no execution context"),
        (
            {"noise": ("float16", (1, 3))},
            "",
            r"noise is float16 \[1, 3\] in the engine, expected float32 \[1, 3\]",
        ),
        ({"latents": ("float32", (1, 4))}, "", r"latents is float32 \[1, 4\]"),
        (
            {"more": ("float32", (1, 3))},
            "",
            r"the engine has outputs \['latents', 'more'\], expected \['latents'\]",
        ),
        ({"refuses_address": "context"}, "", "unet: the engine refuses a buffer for context"),
        ({}, "cudaMallocHost", r"cudaMallocHost failed: out of memory \(error 2\)"),
        ({}, "cudaMalloc", "cudaMalloc failed"),
        ({}, "cudaMemGetInfo", "cudaMemGetInfo failed"),
        ({}, "cudaEventCreate", "cudaEventCreate failed"),
        ({}, "cudaDeviceGetAttribute", "cudaDeviceGetAttribute failed"),
        ({}, "cudaStreamCreateWithFlags", "cudaStreamCreateWithFlags failed"),
    ],
)
def test_a_failed_start_frees_what_it_took(fake, options, fail, message):
    with pytest.raises(HipaError, match=message):
        fake(unet=options, fail=fail)
    assert fake.gpu.cudart.leaks == []


@pytest.mark.parametrize("fail", ["cudaHostAlloc", "cudaHostGetDevicePointer"])
def test_a_failed_start_with_shared_memory_frees_what_it_took(fake, fail):
    with pytest.raises(HipaError, match=f"{fail} failed"):
        fake(integrated=True, fail=fail)
    assert fake.gpu.cudart.leaks == []


def test_a_damaged_engine_frees_what_was_loaded_before_it(fake):
    with pytest.raises(
        HipaError, match=r"unet\.engine does not deserialise: bad magic number\. Run"
    ):
        fake(gone=("unet",))
    assert fake.gpu.cudart.leaks == []


@pytest.mark.parametrize("fail", ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaEventRecordWithFlags"])
def test_a_call_that_fails_is_an_error_and_close_still_frees(fake, fail):
    with fake() as runner:
        fake.gpu.cudart.fail = fail
        with pytest.raises(HipaError, match=f"{fail} failed"):
            runner(**INPUTS)
    assert fake.gpu.cudart.leaks == []


def test_a_run_that_tensorrt_refuses_is_an_error(fake):
    with (
        fake(unet={"runs": False}) as runner,
        pytest.raises(HipaError, match="unet: TensorRT could not run the engine: address not set"),
    ):
        runner(**INPUTS)


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU is here")
def test_without_a_driver_the_real_libraries_say_so(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "x.engine"
    path.write_bytes(b"not an engine")
    with pytest.raises(
        HipaError,
        match=r"cudaStreamCreateWithFlags failed: CUDA driver version is insufficient.*35",
    ):
        TensorRTRunner([(UNET, path)], "rtx")
    with pytest.raises(HipaError, match=r"does not deserialise: .*cudaError 35.*Run hipa-doctor"):
        deserialise(trt, path)


@pytest.mark.parametrize("graph", [True, False])
def test_eight_threads_get_their_own_images(fake, graph):
    with fake(graph=graph) as runner:

        def run(number: int) -> None:
            for call in range(50):
                tokens = np.asarray([[number, call, 1]])
                feed = {"tokens": tokens, "noise": INPUTS["noise"]}
                if call % 3 == 0:
                    feed = {"context": (2 * tokens).astype(np.float16), "noise": INPUTS["noise"]}
                image = runner(**feed)["images"]
                np.testing.assert_array_equal(image, INPUTS["noise"] + 2 * tokens + 1)
                latents = runner.runners["unet"](
                    noise=INPUTS["noise"], context=np.zeros((1, 3), np.float16)
                )["latents"]
                np.testing.assert_array_equal(latents, INPUTS["noise"])

        in_threads(run)
    assert not fake.gpu.cudart.leaks


def test_closing_and_changing_wait_for_the_calls_of_other_threads(fake):
    runner = fake()

    def run(number: int) -> str:
        try:
            for call in range(100):
                if number == 0:
                    runner.change_engine(lambda trt, engine: None)
                if number == 1 and call == 50:
                    runner.close()
                np.testing.assert_array_equal(runner(**INPUTS)["images"], IMAGE)
        except HipaError as error:
            return str(error)
        return ""

    assert set(in_threads(run)) <= {"", "text_encoder+unet+vae_decoder: the runner is closed."}
    assert not fake.gpu.cudart.leaks
