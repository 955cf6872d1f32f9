"""A stage's module to an ONNX file, through torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hipa_deploy.bundle.adaptor_swap import WEIGHT_MAP
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.axes import example_sizes
from hipa_deploy.export.graph.modules import TORCH_DTYPES
from hipa_deploy.export.graph.weight_map import trace_weights

OPSET = 20
EXTERNAL_DATA_BYTES = (
    512 << 20
)  # protobuf ends at 2 GiB; well before that, weights go to a file beside the graph


def export_stage(module: torch.nn.Module, spec: StageSpec, folder: Path) -> list[Path]:
    """Write ``folder/model.onnx`` (and ``model.onnx.data`` for large weights) and ``weights.json``; the files written.

    Shapes are static but for the axes of ``spec``. Stack traces and source paths are dropped, so equal weights give
    equal bytes wherever the export ran.

    Raises:
        HipaError: the module does not allow an axis to vary.

    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = example_sizes(spec.axes)
    inputs = tuple(
        torch.zeros(tensor.at(sizes), dtype=TORCH_DTYPES[tensor.dtype]) for tensor in spec.inputs
    )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=tuple(_open_dimensions(tensor) for tensor in spec.inputs)
            if spec.axes
            else None,
            verbose=False,
        )
    _name_axes(program.model, spec)
    weight_map = trace_weights(program.model, module)
    _strip_metadata(program.model)
    weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(folder / "model.onnx", external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    (folder / WEIGHT_MAP).write_text(weight_map.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return sorted(folder.iterdir())


def _open_dimensions(tensor: TensorSpec) -> dict[int, Any]:
    return {
        index: torch.export.Dim.AUTO
        for index, size in enumerate(tensor.shape)
        if isinstance(size, str)
    }


def _name_axes(model, spec: StageSpec) -> None:  # type: ignore[no-untyped-def]  # onnx_ir.Model, as below
    """Call the open dimensions of inputs and outputs what ``spec`` calls them."""
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            for index, size in enumerate(tensor.shape):
                if isinstance(size, str) and isinstance(value.shape[index], int):
                    raise HipaError(
                        f"{spec.name}: this model does not allow a dynamic {size}. Leave it out."
                    )
                if isinstance(size, str):
                    value.shape[index] = size


def _strip_metadata(model) -> None:  # type: ignore[no-untyped-def]  # onnx_ir.Model, known only with the extra
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own deprecations and progress; what matters to a user is the parity gate."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
