"""Stages that are loaded in turn: the same bytes in less memory, on each kind of backend."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import FOLDER, MANIFEST, REFERENCE, WEIGHTS, SwapManifest
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.latency import layer_times
from hipa_deploy.engines.store import low_memory
from hipa_deploy.errors import HipaError
from hipa_deploy.generate import open_stages, pipeline
from hipa_deploy.generate import prompts as prompts_module
from hipa_deploy.generate.open_stages import StagesInTurn
from hipa_deploy.generate.refine import refiner
from hipa_deploy.generate.stages import HostStages
from tests.engines.bundle_gpu import BundleGpu
from tests.hipa_deploy.generate.test_stages import STEP, generic
from tests.refine_samples import refine_bundle
from tests.swap_samples import scaled_weights, write_swap
from tests.threads import in_threads

PROMPT = "3d emoji of a red apple"
STAGES = ["text_encoder", "unet", "vae_decoder"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(BUNDLE, tmp_path / "bundle")))


@pytest.fixture
def gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> BundleGpu:
    """A fake GPU with an engine for each stage."""
    found = BundleGpu(bundle)
    found.install(monkeypatch)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every stage that a host backend opens, and how many were open already."""
    log: list[tuple[str, int]] = []
    there: set[int] = set()
    open_runner = open_stages.open_runner

    def recording(bundle, stage, backend, **options):
        runner = open_runner(bundle, stage, backend, **options)
        log.append((stage, len(there)))
        there.add(id(runner))
        close = runner.close

        def closing() -> None:
            there.discard(id(runner))
            close()

        runner.close = closing
        return runner

    monkeypatch.setattr(open_stages, "open_runner", recording)
    return log


def test_a_session_at_a_time_and_the_same_bytes(opened) -> None:
    with OneStepPipeline.load("emoji", "onnxruntime") as pipe:
        expected = pipe(PROMPT, count=2)
        path = pipe.tensors(PROMPT)
    opened.clear()
    with OneStepPipeline.load("emoji", "onnxruntime", low_memory=True) as pipe:
        assert opened == [], "nothing is loaded before it runs"
        got = pipe(PROMPT, count=2)
        assert [name for name, _ in opened] == [*STAGES, "unet", "vae_decoder"]
        in_turn = pipe.tensors(PROMPT)
    assert {already for _, already in opened} == {0}
    np.testing.assert_array_equal(got.images_BHWC, expected.images_BHWC)
    assert got.parameters == expected.parameters
    assert in_turn.keys() == path.keys()
    for name, value in path.items():
        np.testing.assert_array_equal(in_turn[name], value)


@pytest.mark.parametrize("groups", [(("text_encoder",), ("unet", "vae_decoder")), None])
def test_the_generic_layout_in_turn(monkeypatch, groups) -> None:
    """Numpy's part between the stages, of which the timestep and x0 are the UNet's group's."""
    runners = generic()
    stages = {name: SimpleNamespace(spec=runner.spec) for name, runner in runners.items()}
    manifest = SimpleNamespace(layout="generic", one_step=STEP)
    fake = SimpleNamespace(root="root", stages=stages, manifest=manifest)
    fake.check_unchanged = lambda stage: None
    monkeypatch.setattr(open_stages, "open_runner", lambda _, stage, *__, **___: runners[stage])
    for runner in runners.values():
        monkeypatch.setattr(type(runner), "__enter__", lambda self: self, raising=False)
        monkeypatch.setattr(type(runner), "__exit__", lambda self, *_: None, raising=False)

    noise = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2)
    feed = {"tokens": np.ones(1, np.int64), "noise": noise}
    names = ("context", "output", "latents", "sample", "images")
    expected = HostStages("onnxruntime", runners, STEP).run(feed, names)
    in_turn = StagesInTurn(fake, "onnxruntime", groups or tuple((name,) for name in stages))
    for asked in (names, ("images",)):
        got = in_turn.run(feed, asked)
        assert tuple(got) == asked
        for name, value in got.items():
            np.testing.assert_array_equal(value, expected[name])


def test_engines_in_two_groups_and_the_same_bytes(bundle, gpu) -> None:
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = pipe(PROMPT)
        together = pipe.stages.activation_bytes
    assert together == 3_000_000
    gpu.loads.clear()
    gpu.at_load.clear()
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        assert str(pipe.stages) == "text_encoder, then unet + vae_decoder"
        got = pipe(PROMPT)
        assert gpu.loads == STAGES
        # One runner at each load: that of the text encoder was closed before the others'.
        assert gpu.at_load == [1, 1, 1]
        again = pipe(PROMPT)
        assert gpu.loads == STAGES, "a known prompt loads nothing"
        assert pipe.runners["unet"].device_ms == 1
        assert pipe.runners["text_encoder"].device_ms is None, "it is not loaded"
        assert pipe.runners["unet"].device_memory_mib > 3_000_000  # the fake's MiB are bytes
    for images in (got, again):
        np.testing.assert_array_equal(images.images_BHWC, expected.images_BHWC)
    assert gpu.cudart.leaks == []


def test_engines_that_do_not_fit_together_are_each_alone(bundle, gpu, monkeypatch) -> None:
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = pipe(PROMPT).images_BHWC
    monkeypatch.setattr(low_memory, "_room_mib", lambda library: 3)
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        assert str(pipe.stages) == "text_encoder, then unet, then vae_decoder"
        np.testing.assert_array_equal(pipe(PROMPT).images_BHWC, expected)
        array = pipe.generate_on_device(PROMPT)
        array.wait()
        assert pipe.runners["vae_decoder"].device_ms == 1
        memory = gpu.cudart.memory[array.pointer]
        assert bytes(memory.raw) == expected.tobytes()
    assert gpu.cudart.leaks == []


def test_the_text_encoder_is_loaded_once_for_a_call(bundle, gpu) -> None:
    prompts = [f"3d emoji of a {colour} apple" for colour in ("red", "green", "blue")]
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = pipe(prompts).images_BHWC
    gpu.loads.clear()
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe(prompts).images_BHWC, expected)
    assert gpu.loads == STAGES


def test_more_prompts_than_the_cache_holds(bundle, gpu, monkeypatch) -> None:
    """The prompts of the next batches are encoded when those before them are done."""
    for module in (pipeline, prompts_module):
        monkeypatch.setattr(module, "CACHED_PROMPTS", 2)
    prompts = [f"3d emoji of apple {number}" for number in range(4)]
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = [pipe(prompt).images_BHWC for prompt in prompts[-2:]]
    gpu.loads.clear()
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        got = pipe(prompts).images_BHWC
    np.testing.assert_array_equal(got[-2:], np.concatenate(expected))
    assert gpu.loads == 2 * STAGES


def test_weights_of_a_prompt(bundle, gpu) -> None:
    prompt = "3d emoji of a (red:1.4) apple"
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = pipe(prompt, prompt_weights=True).images_BHWC
        plain = pipe(prompt, prompt_weights=False).images_BHWC
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        got = pipe(prompt, prompt_weights=True).images_BHWC
    np.testing.assert_array_equal(got, expected)
    assert (got != plain).any()


def add_night(bundle: Bundle) -> None:
    """An adaptor 'night' to swap in, with the latents that it gives for the reference."""
    night = write_swap(bundle, bundle.root / FOLDER / "night", scaled_weights(bundle, 0.5))
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        pipe.swap_adaptor("night")
        with np.load(bundle.path("reference/tensors.npz")) as tensors:
            unet = pipe.runners["unet"]
            feed = {t.name: tensors[t.name].astype(t.dtype) for t in unet.spec.inputs}
            np.save(night / REFERENCE, unet(**feed)["latents"])
    manifest = SwapManifest.model_validate_json((night / MANIFEST).read_text())
    files = manifest.files | {REFERENCE: file_sha256(night / REFERENCE)}
    (night / MANIFEST).write_text(manifest.model_copy(update={"files": files}).model_dump_json())


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_an_adaptor_is_in_every_load_until_it_is_swapped_out(bundle, gpu, backend) -> None:
    add_night(bundle)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        own = pipe(PROMPT).images_BHWC
        pipe.swap_adaptor("night")
        expected = pipe(PROMPT)
    assert (expected.images_BHWC != own).any()
    with OneStepPipeline.load(bundle.root, backend, low_memory=True) as pipe:
        pipe.swap_adaptor("night")
        pipe("another")  # the text encoder is loaded after the UNet
        got = pipe(PROMPT)
        np.testing.assert_array_equal(got.images_BHWC, expected.images_BHWC)
        assert got.parameters[0]["adaptor"] == expected.parameters[0]["adaptor"]
        pipe.swap_adaptor(None)
        np.testing.assert_array_equal(pipe(PROMPT).images_BHWC, own)
    assert gpu.cudart.leaks == []


def halve(path: Path) -> None:
    """Give a graph other weights, in the same file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    path.write_bytes(content)


def test_a_bundle_that_was_replaced_makes_no_more_images(bundle) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime", cache=False, low_memory=True) as pipe:
        pipe(PROMPT)
        (bundle.root / "unet/model.onnx").touch()  # the same content
        pipe(PROMPT)
        halve(bundle.root / "unet/model.onnx")
        with pytest.raises(HipaError, match=r"unet/model\.onnx has changed since the bundle was"):
            pipe(PROMPT)


def test_a_bundle_that_was_replaced_takes_no_adaptor(bundle) -> None:
    add_night(bundle)
    with OneStepPipeline.load(bundle.root, "onnxruntime", cache=False) as pipe:
        expected = pipe(PROMPT)
        halve(bundle.root / "unet/model.onnx")
        for adaptor in ("night", None):
            with pytest.raises(HipaError, match="has changed since the bundle was loaded"):
                pipe.swap_adaptor(adaptor)
        np.testing.assert_array_equal(pipe(PROMPT).images_BHWC, expected.images_BHWC)


def test_an_adaptor_that_was_replaced_makes_no_more_images(bundle) -> None:
    add_night(bundle)
    weights = bundle.root / FOLDER / "night" / WEIGHTS
    with OneStepPipeline.load(bundle.root, "onnxruntime", low_memory=True) as pipe:
        pipe.swap_adaptor("night")
        pipe(PROMPT)
        np.savez(weights, **scaled_weights(bundle, 2.0))
        with pytest.raises(HipaError, match="has changed since the adaptor was loaded"):
            pipe(PROMPT)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_folder_of_a_bundle_is_the_same_after_a_change_of_the_current_one(
    bundle, monkeypatch, tmp_path, low_memory
) -> None:
    add_night(bundle)
    monkeypatch.chdir(bundle.root.parent)
    name = bundle.root.name
    with OneStepPipeline.load(name, "onnxruntime", low_memory=low_memory) as pipe:
        monkeypatch.chdir("/")
        pipe(PROMPT)
        pipe.swap_adaptor("night")
        assert pipe(PROMPT).parameters[0]["bundle_name"] == name


def test_a_bundle_that_was_moved_goes_on(bundle) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        bundle.root.rename(bundle.root.with_name("moved"))
        parameters = pipe(PROMPT).parameters[0]
    assert parameters["bundle"] == file_sha256(bundle.root.with_name("moved") / "hipa.json")


def test_an_adaptor_that_fails_changes_nothing(bundle, gpu) -> None:
    night = write_swap(bundle, bundle.root / FOLDER / "wrong", scaled_weights(bundle, 0.5))
    assert night.is_dir()  # its reference is not what it gives
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        expected = pipe(PROMPT).images_BHWC
        with pytest.raises(HipaError, match="unet after the swap"):
            pipe.swap_adaptor("wrong")
        assert pipe.swapped is None
        np.testing.assert_array_equal(pipe(PROMPT).images_BHWC, expected)
    assert gpu.cudart.leaks == []


def test_threads_get_their_own_images(bundle, gpu) -> None:
    prompts = [f"3d emoji of a {colour} apple" for colour in ("red", "green", "blue")]
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        expected = [pipe(prompt).images_BHWC for prompt in prompts]
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        got = in_threads(lambda number: pipe(prompts[number]).images_BHWC, len(prompts))
        for images, wanted in zip(got, expected, strict=True):
            np.testing.assert_array_equal(images, wanted)
    assert gpu.cudart.leaks == []


def test_layers_of_each_stage(bundle, gpu, monkeypatch) -> None:
    monkeypatch.setattr(layer_times, "RUNS", 1)
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        assert list(layer_times.profile_layers(pipe, PROMPT)) == STAGES


def test_a_closed_pipeline_loads_nothing(bundle, gpu) -> None:
    pipe = OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True)
    pipe.close()
    with pytest.raises(HipaError, match="the pipeline is closed"):
        pipe(PROMPT)
    assert gpu.loads == []


def test_a_missing_engine_is_said_when_the_pipeline_is_loaded(bundle, gpu) -> None:
    for path in (bundle.root / "engines").rglob("unet-*"):
        path.unlink()
    with pytest.raises(HipaError, match=r"no tensorrt engine for stage unet\. Run: hipa-build"):
        OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True)


def test_the_room_of_a_jetson_is_what_the_kernel_can_give(gpu, monkeypatch) -> None:
    monkeypatch.setattr(low_memory, "available_memory_mib", lambda: 5000)
    assert low_memory._room_mib("tensorrt") == (1 << 20) - 256  # the fake has 1 TiB
    gpu.cudart.integrated = True
    assert low_memory._room_mib("tensorrt") == 5000 - 256


def test_the_base_unet_is_loaded_alone_and_gives_the_same_image(
    tmp_path: Path, opened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refiner, "open_runner", open_stages.open_runner)
    refining = refine_bundle(tmp_path)
    with OneStepPipeline.load(refining.root, "onnxruntime") as pipe:
        drafts = pipe(PROMPT, count=2)
        expected = pipe.refine(drafts, 3).images_BHWC
    opened.clear()
    with OneStepPipeline.load(refining.root, "onnxruntime", low_memory=True) as pipe:
        final = pipe.refine(drafts, 3).images_BHWC
        assert [name for name, _ in opened] == ["text_encoder", *["teacher", "vae_decoder"] * 2]
        # Other calls meanwhile wait for their turn.
        drawn = in_threads(lambda number: pipe.refine(pipe(PROMPT, seed=number % 2), 3), 4)
    np.testing.assert_array_equal(final, expected)
    for number, images in enumerate(drawn):
        np.testing.assert_array_equal(images.images_BHWC[0], expected[number % 2])
    assert {already for _, already in opened} == {0}


def test_the_progress_of_a_refining_is_that_of_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, prompts_module):
        monkeypatch.setattr(module, "CACHED_PROMPTS", 2)
    refining = refine_bundle(tmp_path)
    shown: list[tuple[int, int]] = []
    with OneStepPipeline.load(refining.root, "onnxruntime", low_memory=True) as pipe:
        drafts = pipe(PROMPT, count=3)
        pipe.refine(drafts, 2, progress=lambda done, steps: shown.append((done, steps)))
    assert (shown[0], shown[-1]) == ((0, 6), (6, 6))
    assert shown == sorted(shown)
