"""Triton's model configurations of a bundle, as text in protobuf's text format.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server, Model Configuration. The tests
parse every text with the schema of ``tritonclient``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.tasks import Task

Backend = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"]

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}
_BATCH = "batch"  # the axis, as every bundle calls it
_DELAY_US = 4000  # that a batch waits for company
# The text encoder sees one prompt at a time, as in ``EncodedPrompts``: some of ONNX Runtime's
# kernels round otherwise at another place of a batch, and it would be every image of the prompt.
_NEVER_JOINED = ("text_encoder", "text_encoder_2")
# What a request of a task has besides prompt and seed: name, type, dims, optional.
_IMAGE = ("image", "TYPE_UINT8", "[ -1, -1, 3 ]", False)
_EXTRA_INPUTS: dict[Task, tuple[tuple[str, str, str, bool], ...]] = {
    "generate": (),
    "edit": (_IMAGE, ("strength", "TYPE_FP32", "[ 1 ]", True)),
    "inpaint": (_IMAGE, ("mask", "TYPE_UINT8", "[ -1, -1 ]", False)),
    "upscale": (_IMAGE,),
    "control": (_IMAGE, ("scale", "TYPE_FP32", "[ 1 ]", True)),
}


def stage_config(
    name: str, spec: StageSpec, backend: Backend, *, joined: bool = True, instances: int = 1
) -> str:
    """The configuration of one stage.

    A stage whose every tensor begins with the bundle's batch axis gets ``max_batch_size``, and its
    shapes leave that axis out. Every other one gets whole shapes: a static batch, or an input such
    as a timestep that all images share.

    Args:
        name: of the model in the repository.
        spec: inputs and outputs of the stage.
        backend: that runs it in Triton.
        joined: whether Triton may join requests into batches, where the stage can take them.
        instances: copies of the stage that run at once.

    Returns:
        The text of ``config.pbtxt``.

    """
    largest = largest_batch(spec)
    parts = [f'name: "{name}"', *_platform(backend), f"max_batch_size: {largest}"]
    parts += [_tensor("input", tensor, largest > 0) for tensor in spec.inputs]
    parts += [_tensor("output", tensor, largest > 0) for tensor in spec.outputs]
    kind = "KIND_CPU" if backend == "onnxruntime" else "KIND_GPU"
    parts.append(_instances(instances, kind))
    if largest > 1 and joined and spec.name not in _NEVER_JOINED:
        axis = spec.axes[_BATCH]
        preferred = sorted({axis.opt, axis.max} - {1})
        parts.append(
            "dynamic_batching {\n"
            f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n"
            f"  max_queue_delay_microseconds: {_DELAY_US}\n"
            "}"
        )
    if backend == "onnxruntime-tensorrt":
        parts.append(
            "optimization {\n  execution_accelerators {\n"
            '    gpu_execution_accelerator [ { name: "tensorrt" } ]\n'
            "  }\n}"
        )
    return "\n".join(parts) + "\n"


def whole_config(name: str, bundle: Bundle, *, instances: int = 1) -> str:
    """The configuration of the model that goes from a prompt to an image, through the stages.

    Args:
        name: of the model in the repository.
        bundle: whose task decides the inputs.
        instances: processes that answer requests at once.

    Returns:
        The text of ``config.pbtxt``.

    """
    inputs = [
        ("prompt", "TYPE_STRING", "[ 1 ]", False),
        ("seed", "TYPE_INT64", "[ 1 ]", True),
        *_EXTRA_INPUTS[bundle.manifest.task],
    ]
    parts = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    for tensor, kind, dims, optional in inputs:
        parts.append(_block("input", tensor, kind, dims, optional=optional))
    parts.append(_block("output", "image", "TYPE_UINT8", "[ -1, -1, 3 ]"))
    parts.append(_block("output", "parameters", "TYPE_STRING", "[ 1 ]"))
    parts.append(_instances(instances, "KIND_CPU"))
    for stage in bundle.stages:
        parts.append(f'parameters {{ key: "{stage}" value {{ string_value: "{name}_{stage}" }} }}')
    return "\n".join(parts) + "\n"


def largest_batch(spec: StageSpec) -> int:
    """Triton's ``max_batch_size``; 0 where the batch is no axis of every tensor."""
    tensors = spec.inputs + spec.outputs
    if all(tensor.shape[:1] == (_BATCH,) for tensor in tensors):
        return spec.axes[_BATCH].max
    return 0


def _platform(backend: Backend) -> Sequence[str]:
    if backend == "tensorrt":
        return ('platform: "tensorrt_plan"', 'default_model_filename: "model.plan"')
    return ('platform: "onnxruntime_onnx"', 'default_model_filename: "model.onnx"')


def _tensor(edge: str, tensor: TensorSpec, batched: bool) -> str:
    shape = tensor.shape[1:] if batched else tensor.shape
    sizes = [-1 if isinstance(size, str) else size for size in shape]
    dims = f"[ {', '.join(map(str, sizes))} ]"
    if not sizes:
        # One number an image. Triton takes no empty dims: it sees [B, 1], and the graph [B].
        dims = "[ 1 ] reshape: { shape: [ ] }"
    return _block(edge, tensor.name, _TYPES[tensor.dtype], dims)


def _block(edge: str, name: str, kind: str, dims: str, *, optional: bool = False) -> str:
    last = " optional: true" if optional else ""
    # The name is the manifest's, and may be a stranger's: a quote in it must not end the text.
    quoted = json.dumps(name, ensure_ascii=False)
    return f"{edge} [ {{ name: {quoted} data_type: {kind} dims: {dims}{last} }} ]"


def _instances(count: int, kind: str) -> str:
    return f"instance_group [ {{ count: {count} kind: {kind} }} ]"
