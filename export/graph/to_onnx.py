"""A stage's module -> an ONNX file, through torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from onnxscript.rewriter import RewriteRule

from hipa_deploy.bundle.adaptor_swap import WEIGHT_MAP
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.axes import example_sizes
from hipa_deploy.export.graph.modules import TORCH_DTYPES
from hipa_deploy.export.graph.weight_map import trace_weights

OPSET = 20
# protobuf ends at 2 GiB. Well before that, weights go to a file beside the graph.
EXTERNAL_DATA_BYTES = 512 << 20


def export_stage(module: torch.nn.Module, spec: StageSpec, folder: Path) -> list[Path]:
    """Write ``folder/model.onnx``, ``weights.json`` and, for large weights, ``model.onnx.data``.

    Stack traces and source paths are dropped, so equal weights give equal bytes wherever the export
    ran.

    Args:
        module: the stage, in the precision that the graph is to have.
        spec: its inputs and outputs; shapes are static but for its axes.
        folder: is created.

    Returns:
        The files written, sorted.

    Raises:
        HipaError: the module does not allow an axis to vary.

    Example:
        >>> export_stage(OneStepDecoder(vae), specs["vae_decoder"], Path("bundle/vae_decoder"))
        [PosixPath('bundle/vae_decoder/model.onnx'), PosixPath('bundle/vae_decoder/weights.json')]

    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = example_sizes(spec.axes)
    inputs = []
    for tensor in spec.inputs:
        inputs.append(torch.zeros(tensor.at(sizes), dtype=TORCH_DTYPES[tensor.dtype]))
    dynamic_shapes = None
    if spec.axes:
        dynamic_shapes = tuple(_open_dimensions(tensor) for tensor in spec.inputs)

    with _quiet(), _rules_where_they_can_match(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None  # dynamo=True without a file always returns one

    # The weight map needs the exporter's metadata, so it comes before they are dropped.
    _name_axes(program.model, spec)
    weight_map = trace_weights(program.model, module)
    _strip_metadata(program.model)

    weight_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    program.save(folder / "model.onnx", external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    _drop_weights(program.model)
    text = weight_map.model_dump_json(indent=1) + "\n"
    (folder / WEIGHT_MAP).write_text(text, encoding="utf-8")
    return sorted(folder.iterdir())


def _open_dimensions(tensor: TensorSpec) -> dict[int, Any]:
    """The dimensions of ``tensor`` that have an axis, as torch.export takes them."""
    dimensions: dict[int, Any] = {}
    for index, size in enumerate(tensor.shape):
        if isinstance(size, str):
            dimensions[index] = torch.export.Dim.AUTO
    return dimensions


# The exporter's model is an onnx_ir.Model, a package that comes with the extra 'export' alone.
def _name_axes(model: Any, spec: StageSpec) -> None:
    """Call the open dimensions of inputs and outputs what ``spec`` calls them."""
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            for index, size in enumerate(tensor.shape):
                if not isinstance(size, str):
                    continue
                # With Dim.AUTO the exporter silently fixes a dimension that the module fixes.
                if isinstance(value.shape[index], int):
                    raise HipaError(
                        f"{spec.name}: this model does not allow a dynamic {size}. "
                        f"Leave {size} out of --dynamic."
                    )
                value.shape[index] = size


def _strip_metadata(model: Any) -> None:
    """Drop stack traces, source paths and the exporter's notes."""
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _drop_weights(model: Any) -> None:
    """Let go of a model's weights, once it is written.

    onnxscript's pattern matchers keep the last node that they looked at, and so the whole graph of
    the last export, until the next one (``SimplePatternMatcher._current_node``).
    """
    for value in model.graph.initializers.values():
        value.const_value = None


@contextlib.contextmanager
def _rules_where_they_can_match() -> Iterator[None]:
    """Within it, onnxscript tries a rule at nodes of its last operator alone; graphs are equal.

    torch.onnx.export tries every rule of onnxscript at every node. One of them, SlicesSplit, has
    two outputs, and lists all nodes of the graph before it looks at the one that it was given
    (``SimplePatternMatcher.match`` of onnxscript 0.7, "expensive" where it was added:
    https://github.com/microsoft/onnxscript/pull/1734). That was two thirds of the optimisation of
    Stable Diffusion's UNet, and twice as many nodes took four times as long.

    Where another onnxscript keeps a rule's pattern elsewhere, all rules are tried everywhere.
    """
    try_rewrite = RewriteRule.try_rewrite

    def try_where_it_can_match(
        rule: RewriteRule, model: Any, graph: Any, node: Any, **keywords: Any
    ) -> Any:
        operator = _last_operator(rule)
        if operator is not None and operator != (node.domain, node.op_type):
            return None
        return try_rewrite(rule, model, graph, node, **keywords)

    RewriteRule.try_rewrite = try_where_it_can_match
    try:
        yield
    finally:
        RewriteRule.try_rewrite = try_rewrite


def _last_operator(rule: RewriteRule) -> tuple[str, str] | None:
    """Domain and type of the node at which ``rule`` begins to match; None: any, or not known."""
    try:
        identifier = rule._target_pattern.output_nodes[0].op_identifier()
    except (AttributeError, IndexError):
        return None
    if identifier is None:
        return None
    domain, op_type, _ = identifier
    return domain, op_type


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own warnings and progress: what counts is the check afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
