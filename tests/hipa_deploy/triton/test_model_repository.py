"""Model repositories: parsed with Triton's own schema, and run stage by stage in ONNX Runtime.

No Triton server runs here. ``Repository`` is what a server does with the files that it is given:
it reads the configurations, and holds every request against them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.commands.app import main
from hipa_deploy.embedded import resolve_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.triton.bundle_model import BundleModel
from hipa_deploy.triton.model_repository import check_repository_request, write_repository
from hipa_deploy.triton.triton_config import stage_config
from tests.sdxl_samples import sdxl_bundle
from tests.served import tiny_bundles

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")

PROMPT = "3d emoji of a red apple"
ONNX_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
}


def parse(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def type_name(data_type: int) -> str:
    return model_config_pb2.DataType.Name(data_type)


def shape_of(config: Any, tensor: Any) -> list[int]:
    """The whole shape: Triton puts the batch before the dims of a model that has batches."""
    assert tensor.dims, "Triton refuses an input or output without dims"
    return ([-1] if config.max_batch_size else []) + list(tensor.dims)


def shape_of_graph(config: Any, tensor: Any) -> list[int]:
    """The shape that Triton gives the graph: with ``reshape`` another one than it takes."""
    inner = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return ([-1] if config.max_batch_size else []) + list(inner)


class Repository:
    """A written repository: its configurations, and a session of each stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs = {}
        self.sessions: dict[str, Any] = {}
        self.calls: list[str] = []
        for path in sorted(folder.iterdir()):
            config = parse((path / "config.pbtxt").read_text())
            assert config.name == path.name
            self.configs[path.name] = config
            if config.platform == "onnxruntime_onnx":
                model = path / "1" / config.default_model_filename
                self.sessions[path.name] = onnxruntime.InferenceSession(str(model))

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        config = self.configs[model]
        self.calls.append(model)
        assert {tensor.name for tensor in config.input} == inputs.keys()
        fed = {}
        for tensor in config.input:
            value = inputs[tensor.name]
            wanted = shape_of(config, tensor)
            assert len(wanted) == value.ndim
            for size, got in zip(wanted, value.shape, strict=True):
                assert size in (-1, got)
            if config.max_batch_size:
                assert 1 <= len(value) <= config.max_batch_size
            wanted = shape_of_graph(config, tensor)
            fed[tensor.name] = value.reshape(value.shape[: len(wanted)])
            assert fed[tensor.name].size == value.size
        made = self.sessions[model].run(list(outputs), fed)
        return dict(zip(outputs, made, strict=True))

    def model(self, name: str) -> BundleModel:
        parameters = self.configs[name].parameters
        models = {stage: parameters[stage].string_value for stage in parameters}
        return BundleModel(self.folder / name / "1" / "bundle", models, self.infer)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    found = tiny_bundles(tmp_path_factory.mktemp("bundles"))
    sdxl = sdxl_bundle(tmp_path_factory.mktemp("sdxl"))
    return {**found, "sdxl": sdxl, "emoji": Bundle.open(resolve_bundle("emoji"))}


@pytest.mark.parametrize(
    "name",
    ["emoji", "tiny", "tiny-edit", "tiny-inpaint", "tiny-upscale", "tiny-control", "sdxl"],
)
def test_configurations_are_of_the_files(
    bundles: dict[str, Bundle], name: str, tmp_path: Path
) -> None:
    models = write_repository(bundles[name], tmp_path / "models", name=name)
    repository = Repository(tmp_path / "models")
    assert sorted(models) == sorted(repository.configs)
    assert models[0] == name
    assert (tmp_path / "models" / name / "1" / "model.py").is_file()
    assert len(repository.sessions) == len(bundles[name].stages)
    for model, session in repository.sessions.items():
        config = repository.configs[model]
        edges = ((config.input, session.get_inputs()), (config.output, session.get_outputs()))
        for written, real in edges:
            assert len(written) == len(real)
            for tensor, node in zip(written, real, strict=True):
                assert tensor.name == node.name
                assert type_name(tensor.data_type) == ONNX_TYPES[node.type]
                shape = [size if isinstance(size, int) else -1 for size in node.shape]
                assert shape_of_graph(config, tensor) == shape
                assert shape_of(config, tensor)[: len(shape)] == shape


def test_batches_are_joined_where_the_bundle_takes_them(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    write_repository(bundles["tiny"], tmp_path / "joined", name="t", instances=3)
    joined = Repository(tmp_path / "joined").configs
    assert joined["t_unet"].max_batch_size == 8
    assert list(joined["t_unet"].dynamic_batching.preferred_batch_size)[-1] == 8
    assert joined["t_unet"].instance_group[0].count == 3
    # Its last digits depend on a prompt's place in a batch.
    assert not joined["t_text_encoder"].HasField("dynamic_batching")

    write_repository(bundles["tiny"], tmp_path / "alone", name="t", joined=False)
    assert not Repository(tmp_path / "alone").configs["t_unet"].HasField("dynamic_batching")

    # Static: whole shapes, and nothing to join.
    write_repository(bundles["emoji"], tmp_path / "static", name="e")
    static = Repository(tmp_path / "static").configs["e_unet"]
    assert static.max_batch_size == 0
    assert not static.HasField("dynamic_batching")
    assert static.input[0].dims[0] == 1


@pytest.mark.parametrize("name", ["emoji", "tiny", "sdxl"])
def test_an_image_is_that_of_the_pipeline(
    bundles: dict[str, Bundle], name: str, tmp_path: Path
) -> None:
    write_repository(bundles[name], tmp_path / "models", name="m")
    repository = Repository(tmp_path / "models")
    model = repository.model("m")
    with OneStepPipeline.load(bundles[name].root, "onnxruntime") as pipe:
        for seed in (3, 2**62):
            expected = pipe.generate([(PROMPT, seed)]).images_BHWC[0]
            np.testing.assert_array_equal(model.image(PROMPT, seed).images_BHWC[0], expected)
    # The second image of a prompt needs no text encoder.
    assert repository.calls.count("m_text_encoder") == 1
    assert repository.calls.count("m_unet") == 2


@pytest.mark.parametrize("task", ["edit", "inpaint", "upscale", "control"])
def test_tasks_from_an_image(bundles: dict[str, Bundle], task: str, tmp_path: Path) -> None:
    bundle = bundles[f"tiny-{task}"]
    write_repository(bundle, tmp_path / "models", name="m")
    model = Repository(tmp_path / "models").model("m")
    size = bundle.manifest.one_step.height // (bundle.manifest.upscale or 1)
    image_HWC = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    mask_HW = np.zeros((size, size), np.uint8)
    mask_HW[: size // 2] = 255
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        if task == "edit":
            made = model.image(PROMPT, 5, image_HWC)
            expected = pipe.edit(image_HWC, PROMPT, seed=5)
        elif task == "inpaint":
            made = model.image(PROMPT, 5, image_HWC, mask_HW)
            expected = pipe.inpaint(image_HWC, mask_HW > 0, PROMPT, seed=5)
            with pytest.raises(HipaError, match="'mask'"):
                model.image(PROMPT, 5, image_HWC)
        elif task == "control":
            made = model.image(PROMPT, 5, image_HWC)
            expected = pipe.control(image_HWC, PROMPT, seed=5)
            less = model.image(PROMPT, 5, image_HWC, scale=0.5)
            as_expected = pipe.control(image_HWC, PROMPT, scale=0.5, seed=5)
            np.testing.assert_array_equal(less.images_BHWC, as_expected.images_BHWC)
            assert (less.images_BHWC != made.images_BHWC).any()
            with pytest.raises(HipaError, match="scale nan is out of range"):
                model.image(PROMPT, 5, image_HWC, scale=float("nan"))
        else:
            made = model.image(PROMPT, 5, image_HWC)
            expected = pipe.upscale(image_HWC, PROMPT)
    np.testing.assert_array_equal(made.images_BHWC, expected.images_BHWC)
    with pytest.raises(HipaError, match="'image'"):
        model.image(PROMPT, 5)


def test_a_scale_is_one_number_an_image(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Triton takes no empty dims, so it sees [B, 1] where the graph has [B]."""
    write_repository(bundles["tiny-control"], tmp_path / "models", name="m")
    configs = Repository(tmp_path / "models").configs
    (scale,) = (tensor for tensor in configs["m_unet"].input if tensor.name == "control_scale")
    assert list(scale.dims) == [1]
    assert scale.HasField("reshape")
    assert list(scale.reshape.shape) == []
    assert configs["m_unet"].max_batch_size == 8
    inputs = {tensor.name: tensor for tensor in configs["m"].input}
    assert list(inputs) == ["prompt", "seed", "image", "scale"]
    assert [name for name, tensor in inputs.items() if tensor.optional] == ["seed", "scale"]


def test_a_changed_tokenizer_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    write_repository(bundles["tiny"], tmp_path / "models", name="m")
    path = tmp_path / "models/m/1/bundle/tokenizer/tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(HipaError, match="manifest lists"):
        Repository(tmp_path / "models").model("m")


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"])
def test_configurations_for_a_gpu(backend: Any) -> None:
    axis = Axis(min=1, opt=4, max=8)
    tensor = TensorSpec(name="noise", dtype="float32", shape=("batch", 4, 8, 8))
    out = TensorSpec(name="images", dtype="uint8", shape=("batch", 64, 64, 3))
    spec = StageSpec(name="generator", inputs=(tensor,), outputs=(out,), axes={"batch": axis})
    config = parse(stage_config("g", spec, backend))
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [one.name for one in accelerators] == (
        ["tensorrt"] if backend == "onnxruntime-tensorrt" else []
    )
    expected = "tensorrt_plan" if backend == "tensorrt" else "onnxruntime_onnx"
    assert config.platform == expected


@pytest.mark.parametrize(
    "name",
    ['x" data_type: TYPE_FP32 dims: [ 1 ] } ] max_batch_size: 9 input [ { name: "y', "a\\b", "é"],
)
def test_a_name_of_a_strangers_manifest_is_a_name(name: str) -> None:
    tensor = TensorSpec(name=name, dtype="float32", shape=(1, 4))
    spec = StageSpec(
        name="unet", inputs=(tensor,), outputs=(tensor.model_copy(update={"name": "out"}),)
    )
    config = parse(stage_config("m", spec, "onnxruntime"))
    assert [one.name for one in config.input] == [name]
    assert config.max_batch_size == 0


def test_an_input_that_images_share_rules_batches_out() -> None:
    """A generic UNet's timestep has one entry, however many images there are."""
    axis = Axis(min=1, opt=4, max=8)
    sample = TensorSpec(name="sample", dtype="float16", shape=("batch", 4, 8, 8))
    timestep = TensorSpec(name="timestep", dtype="int64", shape=(1,))
    spec = StageSpec(
        name="unet",
        inputs=(sample, timestep),
        outputs=(sample.model_copy(update={"name": "out"}),),
        axes={"batch": axis},
    )
    config = parse(stage_config("u", spec, "onnxruntime"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [-1, 4, 8, 8]
    assert list(config.input[1].dims) == [1]
    assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "rtx"], "none of Triton's"),
        (["--name", "../x"], "cannot be a model's"),
        (["--instances", "0"], "--instances is 0"),
        (["--backend", "tensorrt"], "tensorrt"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["triton", "emoji", "--out", str(tmp_path / "models"), *arguments])
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("x")
    with pytest.raises(SystemExit):
        main(["triton", "emoji", "--out", str(tmp_path / "models")])
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]


def test_the_command_writes_a_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["triton", "emoji", "--out", str(tmp_path / "models")])
    assert stopped.value.code == 0
    assert "emoji_vae_decoder" in capsys.readouterr().out
    assert "emoji" in Repository(tmp_path / "models").configs


def test_names_and_backends() -> None:
    assert check_repository_request("a.b-1", "onnxruntime", 1) == "onnxruntime"


class Tensor:
    """As ``pb_utils.Tensor``: a name and an array."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name = name
        self.value = value

    def as_numpy(self) -> np.ndarray:
        return self.value


def pb_utils_of(repository: Repository) -> ModuleType:
    """The part of Triton's module that the glue uses. It stands in for the module, which exists
    only inside a server: this finds slips in the glue, and proves nothing about Triton."""
    module: Any = ModuleType("triton_python_backend_utils")

    def by_name(holder: Any, name: str) -> Tensor | None:
        return next((tensor for tensor in holder.tensors if tensor.name == name), None)

    class InferenceRequest:
        def __init__(
            self, model_name: str, requested_output_names: list, inputs: list, preferred_memory: Any
        ) -> None:
            self.call = (model_name, {t.name: t.value for t in inputs}, requested_output_names)

        def exec(self) -> Any:
            made = repository.infer(*self.call)
            tensors = [Tensor(name, value) for name, value in made.items()]
            return SimpleNamespace(tensors=tensors, has_error=lambda: False)

    module.Tensor = Tensor
    module.InferenceRequest = InferenceRequest
    module.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(
        tensors=output_tensors, error=error
    )
    module.TritonError = str
    module.PreferredMemory = lambda kind, device: (kind, device)
    module.TRITONSERVER_MEMORY_CPU = 0
    module.get_input_tensor_by_name = by_name
    module.get_output_tensor_by_name = by_name
    return module


@pytest.fixture
def glued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Bundle], Any]]:
    """A function that gives the class of a bundle's model.py, made as Triton makes it."""

    def model_of(bundle: Bundle) -> Any:
        write_repository(bundle, tmp_path / "models", name="m")
        repository = Repository(tmp_path / "models")
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils_of(repository))
        monkeypatch.delitem(sys.modules, "hipa_deploy.triton.python_model", raising=False)
        namespace: dict[str, Any] = {}
        exec((tmp_path / "models/m/1/model.py").read_text(), namespace)
        model = namespace["TritonPythonModel"]()
        parameters = repository.configs["m"].parameters
        written = {stage: {"string_value": parameters[stage].string_value} for stage in parameters}
        model.initialize(
            {
                "model_config": json.dumps({"parameters": written}),
                "model_repository": str(tmp_path / "models/m"),
                "model_version": "1",
            }
        )
        return model

    yield model_of
    sys.modules.pop("hipa_deploy.triton.python_model", None)


def test_the_glue_answers_requests(
    bundles: dict[str, Bundle], glued: Callable[[Bundle], Any]
) -> None:
    model = glued(bundles["tiny"])
    prompt = Tensor("prompt", np.asarray([PROMPT.encode()], object))
    seed = Tensor("seed", np.asarray([7], np.int64))
    too_long = Tensor("prompt", np.asarray([b"a red apple " * 100], object))
    requests = [SimpleNamespace(tensors=t) for t in ([prompt, seed], [prompt], [too_long, seed])]
    good, drawn, bad = model.execute(requests)
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        expected = pipe.generate([(PROMPT, 7)]).images_BHWC[0]
        again = pipe.generate(
            [(PROMPT, json.loads(drawn.tensors[1].value[0])["seed"])]
        ).images_BHWC[0]
    np.testing.assert_array_equal(good.tensors[0].value, expected)
    np.testing.assert_array_equal(drawn.tensors[0].value, again)
    assert "tokens" in bad.error


def test_the_glue_passes_a_control_image_and_its_scale(
    bundles: dict[str, Bundle], glued: Callable[[Bundle], Any]
) -> None:
    model = glued(bundles["tiny-control"])
    image_HWC = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    order = [
        Tensor("prompt", np.asarray([PROMPT.encode()], object)),
        Tensor("seed", np.asarray([7], np.int64)),
    ]
    image = Tensor("image", image_HWC)
    extras = [[image, Tensor("scale", np.asarray([scale], np.float32))] for scale in (0.8, 2.5)]
    requests = [SimpleNamespace(tensors=order + more) for more in (*extras, [image], [])]
    scaled, too_strong, plain, without = model.execute(requests)
    with OneStepPipeline.load(bundles["tiny-control"].root, "onnxruntime") as pipe:
        for made, scale in ((scaled, 0.8), (plain, 1.0)):
            expected = pipe.control(image_HWC, PROMPT, scale=scale, seed=7)
            np.testing.assert_array_equal(made.tensors[0].value, expected.images_BHWC[0])
            parameters = json.loads(made.tensors[1].value[0])
            assert parameters["scale"] == expected.parameters[0]["scale"] == scale
    assert "scale 2.5 is out of range. Expected 0 to 2." in too_strong.error
    assert "Expected an input 'image'" in without.error
