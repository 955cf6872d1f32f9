"""A latency report beside the roofline of the device that it was measured on, or of another."""

from __future__ import annotations

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.latency.report import LatencyReport, stage_stats
from hipa_deploy.engines.latency.roofline import Roofline, peak_of, predict_roofline
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile, target_names
from hipa_deploy.generate.runner import CPU_BACKENDS


def with_roofline(report: LatencyReport, roofline: Roofline) -> LatencyReport:
    """A copy of ``report`` with ``roofline`` in it.

    If the report was measured on the GPU of that very device, the roofline also says how far the
    measured p50 is above the bound.
    """
    if _measured_on(report, load_target_profile(roofline.target)):
        roofline = _compared(roofline, report)
    return report.model_copy(update={"roofline": roofline})


def with_own_roofline(report: LatencyReport, bundle: Bundle) -> LatencyReport:
    """A copy of ``report`` with the roofline of the device that it was measured on.

    The report is returned unchanged if that device is not a target, or if its rates or the
    bundle's costs are not known.
    """
    for name in target_names():
        profile = load_target_profile(name)
        if _predictable(bundle, profile) and _measured_on(report, profile):
            return with_roofline(report, predict_roofline(bundle, name))
    return report


def _predictable(bundle: Bundle, profile: TargetProfile) -> bool:
    """Whether every stage has a cost, and the target a known rate for its precision."""
    for stage in bundle.manifest.stages:
        if stage.cost is None or peak_of(profile, stage.precision) is None:
            return False
    return True


def _measured_on(report: LatencyReport, profile: TargetProfile) -> bool:
    """Whether the GPU that ``profile`` describes computed the images of ``report``."""
    conditions = report.conditions
    return conditions.backend not in CPU_BACKENDS and profile.is_device(conditions.device)


def _compared(roofline: Roofline, report: LatencyReport) -> Roofline:
    """``roofline`` with the measured p50 of each stage and the whole, in per cent of its bound."""
    measured = stage_stats(report)
    stages = {}
    for name, bound in roofline.stages.items():
        stats = measured.get(name)
        percent = percent_of_bound(stats.p50_ms if stats else None, bound.bound_ms)
        stages[name] = bound.model_copy(update={"measured_percent": percent})

    # With a cached text context the run is shorter than the sum of all stages, which is the bound.
    complete = stages.keys() <= measured.keys()
    measured_ms = report.end_to_end.p50_ms if complete else None
    percent = percent_of_bound(measured_ms, roofline.end_to_end_ms)
    return roofline.model_copy(update={"stages": stages, "measured_percent": percent})


def percent_of_bound(measured_ms: float | None, bound_ms: float) -> float | None:
    """The measured time in percent of the bound; None if either says nothing."""
    if measured_ms is None or bound_ms == 0:
        return None
    return 100 * measured_ms / bound_ms
