"""One-step images with this project's bundles, on every backend that works here.

A query is what hipa-generate does: a new prompt, the tokenizer, all stages, images on the host. It
is measured by the code of hipa-profile, so the figures are those that a user would get.
"""

from __future__ import annotations

import io
import math
import time
from functools import partial

from rich.console import Console

from benchmarks.gpu.costs import bundle_costs, share_facts
from benchmarks.gpu.figures import Fact, Figure, read_part
from benchmarks.gpu.job import Job
from benchmarks.gpu.models import (
    BundleCase,
    bundle_cases,
    bundle_folder,
    bundle_size_mib,
    inference_size,
)
from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.build.build_bundle import build_bundle
from hipa_deploy.engines.latency.measure import profile_pipeline
from hipa_deploy.engines.latency.report import MAX_RUNS, LatencyReport
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import CPU_BACKENDS, ENGINE_BACKENDS

# At SD 1.5's size: three engines, measured with TensorRT-RTX on two cores, rounded up.
BUILD_SECONDS = 45.0
TINY_BACKEND = "onnxruntime"  # one is enough to check the script
QUIET = Console(file=io.StringIO())


def run(job: Job) -> None:
    """Measure every bundle on every backend, one bundle after the other."""
    cases = bundle_cases(job)
    backends = {}
    for backend in job.machine.backends:
        if job.tiny and backend.name != TINY_BACKEND:
            continue
        if (backend.name in CPU_BACKENDS) != job.on_gpu:
            backends[backend.name] = backend
    names = []
    for case in cases:
        names += [_name(case, backend) for backend in backends]
    job.file.plan(names)

    for case in cases:
        for name, backend in backends.items():
            if not backend.usable:
                job.file.leave_out(_name(case, name), backend.remedy or "it does not run here")
            elif not bundle_folder(job, case).exists():
                job.file.leave_out(_name(case, name), _why_no_bundle(job, case))
            else:
                job.file.attempt(
                    _name(case, name),
                    partial(_measure, job, case, name),
                    least_seconds=_least_seconds(job, name),
                )


def _name(case: BundleCase, backend: str) -> str:
    return f"{_workload(case)}, {backend}, batch {case.batch}"


def _why_no_bundle(job: Job, case: BundleCase) -> str:
    """Why a bundle was not exported, by the data file of the part that exports."""
    exports = read_part(job.out, "bundles")
    reason = exports.left_out.get(case.name) if exports else None
    return f"{reason or 'run the part bundles first'}: it has no bundle"


def _workload(case: BundleCase) -> str:
    return f"{case.task}, tiny decoder" if case.tiny_decoder else case.task


def _least_seconds(job: Job, backend: str) -> float:
    """What a case takes at least, its engines included where they are not built."""
    engines = backend in ENGINE_BACKENDS and not job.tiny
    return job.effort.least_case + (BUILD_SECONDS if engines else 0.0)


def _measure(job: Job, case: BundleCase, backend: str) -> Figure:
    folder = bundle_folder(job, case)
    facts: dict[str, Fact] = {"bundle_mib": bundle_size_mib(folder)}
    if backend in ENGINE_BACKENDS:
        started = time.monotonic()
        build_bundle(Bundle.open(folder), backend=backend, console=QUIET)
        facts["build_seconds"] = round(time.monotonic() - started, 1)

    job.release()
    with OneStepPipeline.load(folder, backend) as pipe:
        report = _profile(job, pipe)
        problems = _graph_problems(pipe)
    if job.on_gpu:
        facts["cuda_graph"] = f"no: {'; '.join(problems)}" if problems else "yes"
    facts |= _facts(report)
    costs = bundle_costs(Bundle.open(folder))
    precision = report.conditions.precision
    facts |= share_facts(job.out, report.end_to_end.p50_ms, costs, precision)
    if report.validity is None:
        raise HipaError("the report says nothing of its validity. This is a fault of the script.")
    reasons = (*job.notes(), *report.validity.reasons)
    validity = report.validity.model_copy(update={"valid": not reasons, "reasons": reasons})
    return Figure(
        name=_name(case, backend),
        model=inference_size(job),
        workload=_workload(case),
        engine=backend,
        precision=precision,
        batch=case.batch,
        unit="images/s",
        per_second=1e3 * case.batch / report.end_to_end.p50_ms,
        stats=report.end_to_end,
        validity=validity,
        facts=facts,
    )


def _profile(job: Job, pipe: OneStepPipeline) -> LatencyReport:
    """Profile for as long as a valid figure needs, or for as long as there is time."""
    effort = job.effort
    trial = profile_pipeline(pipe, runs=3, warmup=1, console=QUIET)
    seconds = trial.end_to_end.p50_ms / 1e3
    left = max(0.0, job.file.remaining - effort.warmup_seconds)
    runs = min(effort.queries, max(3, int(left / seconds)))
    warmup = min(MAX_RUNS, math.ceil(effort.warmup_seconds / seconds))
    return profile_pipeline(
        pipe, runs=runs, warmup=warmup, seconds=min(effort.seconds, left), console=QUIET
    )


def _graph_problems(pipe: OneStepPipeline) -> list[str]:
    """Why there is no CUDA graph, each reason once."""
    problems: dict[str, None] = {}
    for owner in (pipe.stages, *pipe.runners.values()):
        problem = getattr(owner, "graph_problem", None)
        if problem:
            problems[str(problem)] = None
    return list(problems)


def _facts(report: LatencyReport) -> dict[str, Fact]:
    """The medians of the stages, on the host and on the device, and memory."""
    facts: dict[str, Fact] = {}
    for name, stats in report.stages.items():
        facts[f"{name}_p50_ms"] = round(stats.p50_ms, 4)
    for name, stats in report.device.items():
        facts[f"{name}_device_p50_ms"] = round(stats.p50_ms, 4)
    if report.peak_device_mib is not None:
        facts["device_mib"] = report.peak_device_mib
    facts["load_seconds"] = report.load_seconds
    return facts
