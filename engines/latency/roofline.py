"""The roofline: what a bundle's stages cannot be faster than on a device, from its peak rates. A prediction.

Williams et al. (2009), https://doi.org/10.1145/1498765.1498785. Nothing here is measured, except where a latency
report from that very device is set beside the prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Cost, Precision, Stage
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile, target_names
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

if TYPE_CHECKING:  # profile.py imports this module
    pass

END_TO_END = "end to end"
NumberFormat = Literal["fp16", "tf32", "fp32"]


class Peak(Record):
    """What the bound divides by: dense TFLOPS and GB/s (1e12 and 1e9) at the vendor's highest rated clock.

    ``number_format`` is what the tensor or CUDA cores compute in, ``accumulate`` what they add up in, where stated.
    """

    number_format: NumberFormat
    accumulate: str | None
    tflops: float
    bandwidth_gb_s: float


class StageBound(Record):
    """No call of the stage can take less than ``bound_ms``, the larger of arithmetic and memory traffic.

    ``measured_percent`` is the measured p50 over the bound: 100 is the bound itself, 400 four times as long.
    """

    cost: Cost
    peak: Peak
    compute_ms: float
    memory_ms: float
    bound_ms: float
    bound_by: Literal["compute", "memory"]
    measured_percent: float | None = None


class Roofline(Record):
    """The bounds of a bundle's stages, and their sum: stages run one after another."""

    kind: Literal["prediction: lower bound, not measured"] = "prediction: lower bound, not measured"
    target: str
    title: str
    stages: dict[str, StageBound]
    end_to_end_ms: float
    measured_percent: float | None = None


def predict_roofline(bundle: Bundle, target: str) -> Roofline:
    """The lower bound of every stage's latency on ``target``, one of ``engines/targets``.

    Each stage reads its weights and inputs and writes its outputs once, across the memory bus, and does the
    operations its graph states. Not counted: activations between layers, other operators, launches. So the bound
    is loose; it does not hold for weights that stay in the L2 cache from call to call, nor above rated clocks.

    Raises:
        HipaError: an unknown target, one without the rates needed, or a bundle exported without costs.

    """
    profile = _load_profile(target)
    stages = {
        stage.spec.name: _bound(bundle, stage, target, profile) for stage in bundle.manifest.stages
    }
    total_ms = sum(stage.bound_ms for stage in stages.values())
    return Roofline(target=target, title=profile.title, stages=stages, end_to_end_ms=total_ms)


def _load_profile(target: str) -> TargetProfile:
    if target not in target_names():  # not 'auto': a prediction is for a device that is named
        raise HipaError(
            f"target {target!r} is unknown. Expected one of: {', '.join(target_names())}."
        )
    return load_target_profile(target)


def _bound(bundle: Bundle, stage: Stage, target: str, profile: TargetProfile) -> StageBound:
    if stage.cost is None:
        raise HipaError(
            f"{bundle.root}: stage {stage.spec.name} has no cost in hipa.json. Export the bundle again."
        )
    if (peak := peak_of(profile, stage.precision)) is None:
        missing = f"target {target} has no known {stage.precision} peak rate or no bandwidth"
        raise HipaError(f"{missing}. Expected one of: {', '.join(_known(stage.precision))}.")
    compute_ms = stage.cost.flops / (peak.tflops * 1e12) * 1e3
    memory_ms = (stage.cost.weight_bytes + stage.cost.io_bytes) / (peak.bandwidth_gb_s * 1e9) * 1e3
    return StageBound(
        cost=stage.cost,
        peak=peak,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        bound_ms=max(compute_ms, memory_ms),
        bound_by="compute" if compute_ms > memory_ms else "memory",
    )


def peak_of(profile: TargetProfile, precision: Precision) -> Peak | None:
    """The fastest rate at which the target can run a graph of ``precision``; None where it is not known.

    FP32 graphs need the TF32 rate as well: TensorRT and ONNX Runtime use TF32 for them unless told otherwise.
    """
    fp16, tf32, fp32 = profile.fp16_tflops, profile.tf32_tflops, profile.fp32_tflops
    rate: tuple[float, NumberFormat, str | None] | None = None
    if precision == "fp16" and fp16:
        rate = fp16, "fp16", profile.fp16_accumulate
    elif precision == "fp32" and tf32 and fp32:
        rate = (tf32, "tf32", "fp32") if tf32 > fp32 else (fp32, "fp32", "fp32")
    if rate is None or profile.bandwidth_gb_s is None:
        return None
    tflops, number_format, accumulate = rate
    return Peak(
        number_format=number_format,
        accumulate=accumulate,
        tflops=tflops,
        bandwidth_gb_s=profile.bandwidth_gb_s,
    )


def _known(precision: Precision) -> list[str]:
    return [name for name in target_names() if peak_of(load_target_profile(name), precision)]


def _percent(measured_ms: float | None, bound_ms: float) -> float | None:
    return None if measured_ms is None or bound_ms == 0 else 100 * measured_ms / bound_ms


def render_roofline(roofline: Roofline) -> Table:
    """The prediction for a terminal, in a table of its own, so that it is not read as a measurement."""
    title = f"prediction: lower bound on {roofline.title}, not measured"
    table = Table(title=title, caption=_caption(roofline), caption_justify="left")
    table.add_column("stage")
    compared = any(stage.measured_percent is not None for stage in roofline.stages.values())
    measured = ("measured p50, % of bound",) if compared else ()
    for heading in ("GFLOP", "MB", "compute ms", "memory ms", "bound ms", "bound by", *measured):
        table.add_column(heading, justify="right")
    for name, stage in roofline.stages.items():
        table.add_row(
            name, *_cells(stage), *([_percent_cell(stage.measured_percent)] if compared else [])
        )
    total = ["", "", "", "", f"{roofline.end_to_end_ms:.3f}", ""]
    table.add_row(
        END_TO_END,
        *total,
        *([_percent_cell(roofline.measured_percent)] if compared else []),
        style="bold",
    )
    return table


def _cells(stage: StageBound) -> list[str]:
    megabytes = (stage.cost.weight_bytes + stage.cost.io_bytes) / 1e6
    times = (f"{ms:.3f}" for ms in (stage.compute_ms, stage.memory_ms, stage.bound_ms))
    return [f"{stage.cost.flops / 1e9:.2f}", f"{megabytes:.1f}", *times, stage.bound_by]


def _percent_cell(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.0f}"


def _caption(roofline: Roofline) -> str:
    peaks = {stage.peak for stage in roofline.stages.values()}
    rates = sorted(f"{peak.tflops:g} TFLOPS {_arithmetic(peak)}" for peak in peaks)
    bandwidth = next(iter(peaks)).bandwidth_gb_s
    return (
        f"From the vendor's peak: {', '.join(rates)}, dense; {bandwidth:g} GB/s. Weights, inputs and outputs cross the "
        "memory bus once; activations between layers, other operators and launches are not counted. Weights that stay "
        "in the L2 cache between runs can beat it."
    )


def _arithmetic(peak: Peak) -> str:
    added = {"either": "", "not stated": ", accumulation not stated"}
    return peak.number_format.upper() + added.get(
        peak.accumulate or "either", f", {peak.accumulate} accumulation"
    )
