"""What a bisection runs: a stage with some of its tensors made outputs.

The reference is ONNX Runtime on the CPU with the whole graph in float32, without graph
optimisations, so that no fusion of its own takes part. The suspect is an engine that is built anew
for each choice of tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hipa_deploy.bundle.adaptor_swap import refittable_weights
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.bundle.parity import MIN_PSNR_DB
from hipa_deploy.disk.files import temporary_folder
from hipa_deploy.disk.reading import REEXPORT
from hipa_deploy.engines.build.engine_check import run_engine, stage_reference, why_not_run
from hipa_deploy.engines.build.ladder import StageGraph
from hipa_deploy.engines.build.worker import Job
from hipa_deploy.engines.build.worker_process import run_worker
from hipa_deploy.engines.faults.bisect import Bisection, Run, bisect
from hipa_deploy.engines.faults.island import WIDE, widen
from hipa_deploy.engines.faults.onnx_graph import more_outputs, parse_graph, read_graph
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.targets.build_options import BuildOptions
from hipa_deploy.errors import HipaError, as_line

_ERRORS_ONLY = 3  # onnxruntime's severities: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal

Feed = Mapping[str, np.ndarray]


def onnxruntime_run(path: Path, feed: Feed, content: bytes | None = None) -> Run:
    """The ONNX file at ``path`` in ONNX Runtime, on the CPU.

    Args:
        path: the file; weights in other files lie beside it.
        feed: the inputs by name.
        content: the file's content, if it is to be another than what lies at ``path``.

    """

    def run(marks: tuple[str, ...]) -> dict[str, np.ndarray]:
        onnxruntime: Any = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Threads that wait sleep: other work may share the cores with a run of minutes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A model from bytes has no folder, so ONNX Runtime is told where its weights lie.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        model = (path.read_bytes() if content is None else content) + more_outputs(marks)
        with as_line(f"{path}: ONNX Runtime cannot run it", REEXPORT):
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, dict(feed)), strict=True))

    return run


def float32_run(path: Path, feed: Feed) -> Run:
    """The same with every float16 tensor in float32, as far as its inputs and weights allow."""
    graph = read_graph(path)
    content = widen(path.read_bytes(), [node.outputs[0] for node in graph.nodes])
    # What nothing outside needs in float16 exists in float32 alone.
    made = parse_graph(content).makers()
    run_wide = onnxruntime_run(path, feed, content)

    def run(marks: tuple[str, ...]) -> dict[str, np.ndarray]:
        wide = {f"{name}{WIDE}" if f"{name}{WIDE}" in made else name: name for name in marks}
        outputs = run_wide(tuple(wide))
        return {wide.get(name, name): value for name, value in outputs.items()}

    return run


def engine_run(job: Job, feed: Feed, usual: Run) -> Run:
    """An engine that is built as ``job`` says, with the tensors made outputs too.

    Args:
        job: how the engine that is wrong was built; where it was written does not matter.
        feed: the inputs by name.
        usual: gives the types and shapes of the tensors that are made outputs.

    Raises:
        HipaError: (by a run) the build fails, or no GPU runs the engine.

    """

    def run(marks: tuple[str, ...]) -> dict[str, np.ndarray]:
        with temporary_folder("hipa-bisect") as folder:
            # The barriers of the engine stay, or it would be another one.
            both = tuple(dict.fromkeys((*job.mark, *marks)))
            marked = job.model_copy(update={"out": folder / "marked.engine", "mark": both})
            run_worker(marked, lambda event: None)
            expected = usual(marks) if marks else {}
            spec = with_outputs(job.spec, {name: expected[name] for name in marks})
            barriers = tuple(name for name in job.mark if name not in marks)
            return run_engine(spec, marked.out, job.library, feed, barriers)

    return run


def with_outputs(spec: StageSpec, tensors: Mapping[str, np.ndarray]) -> StageSpec:
    """``spec`` with outputs for ``tensors``, of their types and shapes."""
    more = []
    for name, value in tensors.items():
        more.append(TensorSpec(name=name, dtype=value.dtype.name, shape=value.shape))
    return spec.model_copy(update={"outputs": (*spec.outputs, *more)})


def stage_job(
    bundle: Bundle, stage: str, graph: StageGraph, key: EngineKey, out: Path, options: BuildOptions
) -> Job:
    """What the worker gets to build the engine of ``key``, with its repairs, at ``out``."""
    repairs = key.repairs or Repairs()
    if repairs.optimization_level is not None:
        update = {"optimization_level": repairs.optimization_level}
        options = options.model_copy(update=update)
    # Paths are made absolute, because they are read in another process.
    timing_cache = options.timing_cache.resolve() if options.timing_cache else None
    return Job(
        library=key.flavour,
        # Not resolved: in a hub's cache the file is a link, and its weights lie beside the link.
        onnx=bundle.stage_path(stage).absolute(),
        spec=bundle.all_stages[stage].spec,
        out=out.resolve(),
        precision=key.precision,
        compute_capabilities=key.compute_capabilities,
        options=options,
        timing_cache=timing_cache,
        refittable=tuple(refittable_weights(bundle, stage)) if options.refit else (),
        mark=repairs.barriers,
        fp32=graph.tensors_of(repairs.islands),
        has_islands=bool(repairs.islands or bundle.all_stages[stage].fp32_islands),
        myelin=repairs.myelin,
    )


def bisect_engine(bundle: Bundle, stage: str, graph: StageGraph, job: Job) -> Bisection:
    """Find where the engine of ``job`` departs from ONNX Runtime on the reference's inputs.

    Every step builds an engine, which takes as long as the build of the stage.

    Raises:
        HipaError: there is no reference, the GPU does not run the engine, or a build fails.

    """
    feed = stage_reference(bundle, stage).feed
    path = bundle.stage_path(stage)
    usual = onnxruntime_run(path, feed)
    return bisect(
        stage,
        graph.graph,
        graph.blocks,
        suspect=engine_run(job, feed, usual),
        reference=float32_run(path, feed),
        usual=usual,
        least_psnr_db=MIN_PSNR_DB[bundle.all_stages[stage].precision],
    )


def bisect_stage(bundle: Bundle, stage: str, key: EngineKey) -> Bisection:
    """Find where an engine of ``stage`` with ``key`` departs from ONNX Runtime.

    Raises:
        HipaError: this machine cannot run such an engine, or as ``bisect_engine``.

    Example:
        >>> print(bisect_stage(bundle, "unet", read_sidecar(path).key))
        unet: the first wrong tensor is conv2d_7 (Conv in unet.down_blocks.1.attentions.0).

    """
    reason = why_not_run(bundle, stage, key.compute_capabilities, key)
    if reason is not None:
        raise HipaError(f"{stage}: the engine cannot be bisected here: {reason}.")
    graph = StageGraph.read(bundle, stage)
    job = stage_job(bundle, stage, graph, key, Path("bisected.engine"), key.options)
    return bisect_engine(bundle, stage, graph, job)
