"""The roofline: a lower bound for the latency of a bundle's stages, from a device's peak rates.

It is a prediction: nothing here is measured. Williams et al. (2009),
https://doi.org/10.1145/1498765.1498785. ``with_roofline`` sets it beside a measured report.
"""

from __future__ import annotations

from typing import Literal

from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Cost, Precision, Stage
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile, target_names
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

NumberFormat = Literal["fp16", "tf32", "fp32"]

MEASURED = "measured p50, % of bound"  # the heading of a column


class Peak(Record):
    """The rates that the bound divides by, dense, at the vendor's highest rated clock.

    Attributes:
        number_format: the format in which the tensor or CUDA cores multiply.
        accumulate: the format in which they add up, where the vendor states it.
        tflops: 1e12 operations a second.
        bandwidth_gb_s: of the memory, 1e9 bytes a second.

    """

    number_format: NumberFormat
    accumulate: str | None
    tflops: float
    bandwidth_gb_s: float


class StageBound(Record):
    """The lower bound of one stage: the larger of its arithmetic and its memory traffic.

    Attributes:
        cost: the operations and bytes of the stage.
        peak: the rates of the device.
        compute_ms: the operations at the peak rate.
        memory_ms: the bytes at the peak bandwidth.
        bound_ms: the larger of the two; no call can take less.
        bound_by: which of the two is larger.
        measured_percent: the measured p50 over the bound: 100 is the bound itself, 400 is four
            times as long. None without a measurement on that device.

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

    A stage reads its weights and inputs and writes its outputs once, across the memory bus, and
    does the operations of its graph. Activations between layers, other operators and launches are
    not counted, so the bound is loose. It does not hold for weights that stay in the L2 cache from
    call to call, nor above rated clocks.

    Raises:
        HipaError: an unknown target, a target whose peak rates are not known, or a bundle that
            was exported without costs.

    Example:
        >>> predict_roofline(bundle, "orin-nano").stages["unet"].bound_by
        'compute'

    """
    profile = _load_profile(target)
    stages = {}
    for stage in bundle.manifest.stages:
        stages[stage.spec.name] = _bound(bundle, stage, target, profile)
    total_ms = sum(stage.bound_ms for stage in stages.values())
    return Roofline(target=target, title=profile.title, stages=stages, end_to_end_ms=total_ms)


def _load_profile(target: str) -> TargetProfile:
    # 'auto' is refused here, unlike in hipa-build: a prediction is for a device that is named.
    if target not in target_names():
        raise HipaError(
            f"target {target!r} is unknown. Expected one of: {', '.join(target_names())}."
        )
    return load_target_profile(target)


def _bound(bundle: Bundle, stage: Stage, target: str, profile: TargetProfile) -> StageBound:
    cost = stage.cost
    if cost is None:
        raise HipaError(
            f"{bundle.root}: stage {stage.spec.name} has no cost in hipa.json. "
            "Export the bundle again."
        )
    peak = peak_of(profile, stage.precision)
    if peak is None:
        raise HipaError(
            f"target {target} has no known {stage.precision} peak rate or no bandwidth. "
            f"Expected one of: {', '.join(_targets_with_peak(stage.precision))}."
        )

    compute_ms = cost.flops / (peak.tflops * 1e12) * 1e3
    memory_ms = (cost.weight_bytes + cost.io_bytes) / (peak.bandwidth_gb_s * 1e9) * 1e3
    return StageBound(
        cost=cost,
        peak=peak,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        bound_ms=max(compute_ms, memory_ms),
        bound_by="compute" if compute_ms > memory_ms else "memory",
    )


def peak_of(profile: TargetProfile, precision: Precision) -> Peak | None:
    """The fastest rate at which a target can run a graph; None where a rate is not known.

    A graph in FP32 needs the TF32 rate as well as the FP32 rate, because TensorRT and ONNX Runtime
    use TF32 for it by default.
    """
    if profile.bandwidth_gb_s is None:
        return None
    if precision == "fp16":
        return _peak(profile, "fp16", profile.fp16_tflops, profile.fp16_accumulate)

    tf32 = profile.tf32_tflops
    fp32 = profile.fp32_tflops
    if not tf32 or not fp32:
        return None
    if tf32 > fp32:
        return _peak(profile, "tf32", tf32, "fp32")
    return _peak(profile, "fp32", fp32, "fp32")


def _peak(
    profile: TargetProfile,
    number_format: NumberFormat,
    tflops: float | None,
    accumulate: str | None,
) -> Peak | None:
    if not tflops or profile.bandwidth_gb_s is None:
        return None
    return Peak(
        number_format=number_format,
        accumulate=accumulate,
        tflops=tflops,
        bandwidth_gb_s=profile.bandwidth_gb_s,
    )


def _targets_with_peak(precision: Precision) -> list[str]:
    return [name for name in target_names() if peak_of(load_target_profile(name), precision)]


def render_roofline(roofline: Roofline) -> Table:
    """The prediction for a terminal, in a table of its own: nobody must take it for measured."""
    title = f"prediction: lower bound on {roofline.title}, not measured"
    table = Table(title=title, caption=_caption(roofline), caption_justify="left")
    table.add_column("stage")
    headings = ["GFLOP", "MB", "compute ms", "memory ms", "bound ms", "bound by"]

    # The last column appears only beside a measurement on that very device.
    compared = any(bound.measured_percent is not None for bound in roofline.stages.values())
    if compared:
        headings.append(MEASURED)
    for heading in headings:
        table.add_column(heading, justify="right")

    for name, bound in roofline.stages.items():
        cells = _cells(bound)
        if compared:
            cells.append(percent_cell(bound.measured_percent))
        table.add_row(name, *cells)

    total = ["", "", "", "", f"{roofline.end_to_end_ms:.3f}", ""]
    if compared:
        total.append(percent_cell(roofline.measured_percent))
    table.add_row(END_TO_END, *total, style="bold")
    return table


def _cells(bound: StageBound) -> list[str]:
    megabytes = (bound.cost.weight_bytes + bound.cost.io_bytes) / 1e6
    return [
        f"{bound.cost.flops / 1e9:.2f}",
        f"{megabytes:.1f}",
        f"{bound.compute_ms:.3f}",
        f"{bound.memory_ms:.3f}",
        f"{bound.bound_ms:.3f}",
        bound.bound_by,
    ]


def percent_cell(percent: float | None) -> str:
    """A whole percentage for a table; '-' for None."""
    return "-" if percent is None else f"{percent:.0f}"


def _caption(roofline: Roofline) -> str:
    # Stages of different precision have different rates; the bandwidth is the same for all.
    peaks = {bound.peak for bound in roofline.stages.values()}
    rates = sorted(f"{peak.tflops:g} TFLOPS {_arithmetic(peak)}" for peak in peaks)
    bandwidth = next(iter(peaks)).bandwidth_gb_s
    return (
        f"From the vendor's peak: {', '.join(rates)}, dense; {bandwidth:g} GB/s. "
        "Weights, inputs and outputs cross the memory bus once; activations between layers, other "
        "operators and launches are not counted. Weights that stay in the L2 cache between runs "
        "can beat it."
    )


def _arithmetic(peak: Peak) -> str:
    """'FP16, fp32 accumulation'; without the second part where both accumulations are as fast."""
    number_format = peak.number_format.upper()
    if peak.accumulate is None or peak.accumulate == "either":
        return number_format
    if peak.accumulate == "not stated":
        return f"{number_format}, accumulation not stated"
    return f"{number_format}, {peak.accumulate} accumulation"
