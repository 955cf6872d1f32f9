"""The roofline: a lower bound for the latency of a bundle's stages, from a device's peak rates.

It is a prediction: nothing here is measured. Williams et al. (2009),
https://doi.org/10.1145/1498765.1498785. ``with_roofline`` sets it beside a measured report.

The plain bound takes the GPU for full all the time. It is not: a product is computed in tiles, one
multiprocessor a tile, and the last wave of tiles leaves multiprocessors idle. At 512 pixels and
batch 1 a large GPU has more multiprocessors than some layers have tiles. So a second figure says
what can be reached at best: every layer by itself, with the tiles that suit it. Tile and wave
quantisation are NVIDIA's, Matrix Multiplication Background, sections 3.1 and 3.2:
https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Cost, Precision, Stage
from hipa_deploy.engines.faults.onnx_graph import read_graph
from hipa_deploy.engines.faults.products import Product, find_products
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.engines.targets.target import TargetProfile, load_target_profile, target_names
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

NumberFormat = Literal["fp16", "tf32", "fp32"]

MEASURED = "measured p50, % of bound"  # the heading of a column

# The tiles of the output among which the model chooses, rows by columns: those that NVIDIA's guide
# lists for cuBLAS (section 2.3), the largest first.
TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
# The sum over k may be split, which makes more tiles of the same work, as long as each part is this
# long. Adding up the parts is not counted.
SPLITS = (1, 2, 4, 8, 16)
LEAST_PART_OF_K = 512


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
        reachable_ms: the least time with small grids counted: layers run one after another, each
            needs at least the waves of its tiles, and its weights at least the time that they take
            across the bus. None where the shapes of the layers, or the number of multiprocessors,
            are not known.
        busy_percent: how full the multiprocessors are in it while they multiply, on average.
        measured_percent: the measured p50 over the bound: 100 is the bound itself, 400 is four
            times as long. None without a measurement on that device.

    """

    cost: Cost
    peak: Peak
    compute_ms: float
    memory_ms: float
    bound_ms: float
    bound_by: Literal["compute", "memory"]
    reachable_ms: float | None = None
    busy_percent: float | None = None
    measured_percent: float | None = None


class Roofline(Record):
    """The bounds of a bundle's stages, and their sum: stages run one after another.

    Attributes:
        kind: that it is a prediction.
        target: the target's name.
        title: the device's name.
        stages: the bounds by stage.
        end_to_end_ms: their sum.
        reachable_ms: the sum of the stages' ``reachable_ms``; None if one is not known.
        reachable_percent: the bound in percent of it: no run of this bundle on this device can
            reach more of the plain roofline. None if it is not known.
        measured_percent: as for a stage.

    """

    kind: Literal["prediction: lower bound, not measured"] = "prediction: lower bound, not measured"
    target: str
    title: str
    stages: dict[str, StageBound]
    end_to_end_ms: float
    reachable_ms: float | None = None
    reachable_percent: float | None = None
    measured_percent: float | None = None


def predict_roofline(bundle: Bundle, target: str) -> Roofline:
    """The lower bound of every stage's latency on ``target``, one of ``engines/targets``.

    A stage reads its weights and inputs and writes its outputs once, across the memory bus, and
    does the operations of its graph. Activations between layers, other operators and launches are
    not counted, so the bound is loose. It does not hold for weights that stay in the L2 cache from
    call to call, nor above rated clocks. ``reachable_ms`` counts small grids too, and is as
    optimistic in all else: every tile runs at the multiprocessor's full rate.

    Raises:
        HipaError: an unknown target, a target whose peak rates are not known, a bundle that was
            exported without costs, or a damaged graph.

    Example:
        >>> predict_roofline(bundle, "orin-nano").stages["unet"].bound_by
        'compute'

    """
    profile = _load_profile(target)
    stages = {}
    for stage in bundle.manifest.stages:
        stages[stage.spec.name] = _bound(bundle, stage, target, profile)
    total_ms = sum(stage.bound_ms for stage in stages.values())
    reachable = [stage.reachable_ms for stage in stages.values() if stage.reachable_ms is not None]
    reachable_ms = sum(reachable) if len(reachable) == len(stages) else None
    return Roofline(
        target=target,
        title=profile.title,
        stages=stages,
        end_to_end_ms=total_ms,
        reachable_ms=reachable_ms,
        reachable_percent=100 * total_ms / reachable_ms if reachable_ms else None,
    )


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
    bound = StageBound(
        cost=cost,
        peak=peak,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        bound_ms=max(compute_ms, memory_ms),
        bound_by="compute" if compute_ms > memory_ms else "memory",
    )
    if profile.sm_count is None:
        return bound
    products = find_products(read_graph(bundle.stage_path(stage.spec.name)))
    # Named sizes, or a graph that is not the one whose cost the export wrote.
    if not products or sum(product.flops for product in products) != cost.flops:
        return bound
    layers_ms, busy_percent = layer_by_layer(products, peak, profile.sm_count)
    reachable_ms = max(layers_ms, bound.bound_ms)
    update = {"reachable_ms": reachable_ms, "busy_percent": busy_percent}
    return bound.model_copy(update=update)


def layer_by_layer(products: Sequence[Product], peak: Peak, sm_count: int) -> tuple[float, float]:
    """The least time of products that run one after another.

    Returns:
        The time in milliseconds, and how full the multiprocessors are while they multiply, in per
        cent of the arithmetic's time.

    """
    total_ms = 0.0
    ideal_ms = 0.0
    multiplying_ms = 0.0
    for product in products:
        full_ms = product.flops / (peak.tflops * 1e12) * 1e3
        compute_ms = full_ms / utilisation(product, sm_count)
        weights_ms = product.weight_bytes / (peak.bandwidth_gb_s * 1e9) * 1e3
        ideal_ms += full_ms
        multiplying_ms += compute_ms
        total_ms += max(compute_ms, weights_ms)
    return total_ms, 100 * ideal_ms / multiplying_ms


def utilisation(product: Product, sm_count: int) -> float:
    """The largest share of a GPU's arithmetic that a product can use, from 0 to 1.

    It is the best of ``TILES`` and ``SPLITS``.

    Example:
        >>> round(utilisation(Product(copies=1, m=64, n=1280, k=1280), 132), 2)
        0.3

    """
    best = 0.0
    for tile in TILES:
        for parts in SPLITS:
            if parts == 1 or product.k >= parts * LEAST_PART_OF_K:
                best = max(best, filled(product, tile, parts, sm_count))
    return best


def filled(product: Product, tile: tuple[int, int], parts: int, sm_count: int) -> float:
    """How full a product's waves are, with one size of tile, each multiprocessor at one tile.

    Args:
        product: the product.
        tile: rows and columns of the output that one tile has.
        parts: into how many parts the sum over k is split.
        sm_count: multiprocessors of the GPU.

    Example:
        >>> filled(Product(copies=1, m=1792, n=1792, k=512), (256, 128), 1, 108)  # 98 tiles of 108
        0.9074074074074074

    """
    rows, columns = tile
    tiles = product.copies * ceil(product.m / rows) * ceil(product.n / columns)
    # Tile quantisation: what hangs over the edge is computed for nothing.
    useful = product.copies * product.m * product.n / (tiles * rows * columns)
    # Wave quantisation: the last wave is as long as a full one.
    waves = ceil(tiles * parts / sm_count)
    return useful * tiles * parts / (waves * sm_count)


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

    # Shapes of layers that are not known leave no second figure.
    small_grids = any(bound.reachable_ms is not None for bound in roofline.stages.values())
    if small_grids:
        headings += ["reachable ms", "busy %"]

    # The last column appears only beside a measurement on that very device.
    compared = any(bound.measured_percent is not None for bound in roofline.stages.values())
    if compared:
        headings.append(MEASURED)
    for heading in headings:
        table.add_column(heading, justify="right")

    for name, bound in roofline.stages.items():
        cells = _cells(bound)
        if small_grids:
            cells += [_milliseconds(bound.reachable_ms), percent_cell(bound.busy_percent)]
        if compared:
            cells.append(percent_cell(bound.measured_percent))
        table.add_row(name, *cells)

    total = ["", "", "", "", f"{roofline.end_to_end_ms:.3f}", ""]
    if small_grids:
        total += [_milliseconds(roofline.reachable_ms), ""]
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


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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
        f"can beat it.{_reachable(roofline)}"
    )


def _reachable(roofline: Roofline) -> str:
    """What of the bound can be reached at best, in words; empty where it is not known."""
    if roofline.reachable_percent is None:
        return ""
    return (
        f" Reachable: layers one after another, in whole waves of tiles; at best "
        f"{roofline.reachable_percent:.0f} % of this roofline. A prediction too."
    )


def _arithmetic(peak: Peak) -> str:
    """'FP16, fp32 accumulation'; without the second part where both accumulations are as fast."""
    number_format = peak.number_format.upper()
    if peak.accumulate is None or peak.accumulate == "either":
        return number_format
    if peak.accumulate == "not stated":
        return f"{number_format}, accumulation not stated"
    return f"{number_format}, {peak.accumulate} accumulation"
