"""A latency report beside the roofline of the device that it was measured on, or of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.targets.target import load_target_profile, target_names
from hipa_deploy.generate.runner import CPU_BACKENDS

if TYPE_CHECKING:  # profile.py imports this module
    from hipa_deploy.engines.latency.report import LatencyReport
from hipa_deploy.engines.latency.roofline import Roofline, _percent, peak_of, predict_roofline


def with_roofline(report: LatencyReport, roofline: Roofline) -> LatencyReport:
    """``report`` with the prediction; with its p50 over the bound if it was measured on that very device's GPU."""
    told = report.conditions
    if told.backend not in CPU_BACKENDS and load_target_profile(roofline.target).is_device(
        told.device
    ):
        roofline = _compared(roofline, report)
    return report.model_copy(update={"roofline": roofline})


def with_own_roofline(report: LatencyReport, bundle: Bundle) -> LatencyReport:
    """``report`` beside the bound of the very device it was measured on; as it is where that device is no target,
    or its rates or the bundle's costs are not known.
    """
    for name in target_names():
        profile = load_target_profile(name)
        known = all(
            stage.cost and peak_of(profile, stage.precision) for stage in bundle.manifest.stages
        )
        if (
            known
            and report.conditions.backend not in CPU_BACKENDS
            and profile.is_device(report.conditions.device)
        ):
            return with_roofline(report, predict_roofline(bundle, name))
    return report


def _compared(roofline: Roofline, report: LatencyReport) -> Roofline:
    p50_ms = {name: stats.p50_ms for name, stats in report.stages.items()}
    stages = {
        name: bound.model_copy(
            update={"measured_percent": _percent(p50_ms.get(name), bound.bound_ms)}
        )
        for name, bound in roofline.stages.items()
    }
    whole = (
        report.end_to_end.p50_ms if stages.keys() <= p50_ms.keys() else None
    )  # a cached context is no run
    percent = _percent(whole, roofline.end_to_end_ms)
    return roofline.model_copy(update={"stages": stages, "measured_percent": percent})
