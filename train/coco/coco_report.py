"""The report: FID and CLIP score of every row, with their spread, and the whole protocol.

Shapes: N images, G groups of the jackknife, R draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from hipa_deploy.train.coco.frechet import GROUPS, Moments, distances_left_out, frechet_distance
from hipa_deploy.train.coco.protocol import Protocol
from hipa_deploy.train.evaluation.intervals import (
    Interval,
    draw_weights,
    interval,
    jackknife_interval,
    mean_of_draws,
)


class CocoRow(BaseModel):
    """The numbers of a row.

    Attributes:
        fid: The Fréchet distance to the real images.
        fid_interval: Its interval of 95 %, by a jackknife over groups of images.
        clip: The CLIP score; None where it was not measured.
        clip_interval: Its interval of 95 %, by a bootstrap over captions.
        notes: What a reader should know, a sentence each.
        identity: What the images depend on, as JSON values.

    """

    model_config = ConfigDict(frozen=True)

    fid: float
    fid_interval: Interval
    clip: float | None = None
    clip_interval: Interval | None = None
    notes: tuple[str, ...] = ()
    identity: dict[str, object] = {}


class Difference(BaseModel):
    """How a row differs from the first one, on the same captions.

    Attributes:
        fid: Its distance less that of the first row.
        fid_interval: The interval of 95 % of that difference.
        clip: Its CLIP score less that of the first row.
        clip_interval: The interval of 95 % of that difference.

    """

    model_config = ConfigDict(frozen=True)

    fid: float
    fid_interval: Interval
    clip: float | None = None
    clip_interval: Interval | None = None


class CocoReport(BaseModel):
    """The numbers of a report, stored as report.json.

    Attributes:
        schema_version: Version of these fields.
        protocol: What the numbers depend on but the models.
        figure: What the distance may be called.
        rows: The numbers of each row, by its name, the first one that of the adaptor.
        differences: Of each further row to the first, by its name.

    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    protocol: Protocol
    figure: str
    rows: dict[str, CocoRow]
    differences: dict[str, Difference] = {}


@dataclass(frozen=True)
class RowFeatures:
    """What a row is measured by.

    Attributes:
        features_ND: Inception's, float32.
        clip_N: Cosines of image and caption, float32; None without CLIP.
        notes: A sentence each.
        identity: What the images depend on.

    """

    features_ND: np.ndarray
    clip_N: np.ndarray | None
    notes: tuple[str, ...]
    identity: dict[str, object]


def coco_report(
    protocol: Protocol,
    reference_ND: np.ndarray,
    rows: Mapping[str, RowFeatures],
    captions: Sequence[str],
) -> CocoReport:
    """Measure every row, and its difference to the first one.

    Args:
        protocol: How the features came about.
        reference_ND: Inception's features of the real images.
        rows: What each row is measured by, by its name.
        captions: N captions.

    """
    reference = Moments.of(reference_ND)
    groups = min(GROUPS, len(captions) // 2)
    weights_RN = draw_weights(captions) if len(set(captions)) > 1 else None
    measured = {}
    differences = {}
    first: tuple[CocoRow, RowFeatures, np.ndarray] | None = None
    for name, row in rows.items():
        fid = frechet_distance(reference, row.features_ND)
        left_out_G = distances_left_out(reference, row.features_ND, groups)
        numbers = CocoRow(
            fid=fid,
            fid_interval=jackknife_interval(fid, left_out_G),
            clip=None if row.clip_N is None else float(row.clip_N.mean()),
            clip_interval=_mean_interval(row.clip_N, weights_RN),
            notes=row.notes,
            identity=row.identity,
        )
        measured[name] = numbers
        if first is None:
            first = numbers, row, left_out_G
            continue
        other, other_row, other_left_out_G = first
        change_N = None
        if row.clip_N is not None and other_row.clip_N is not None:
            change_N = row.clip_N - other_row.clip_N
        # The same groups are left out of both rows: what their images share cancels.
        change = fid - other.fid
        differences[name] = Difference(
            fid=change,
            fid_interval=jackknife_interval(change, left_out_G - other_left_out_G),
            clip=None if change_N is None else float(change_N.mean()),
            clip_interval=_mean_interval(change_N, weights_RN),
        )
    return CocoReport(
        protocol=protocol, figure=protocol.figure, rows=measured, differences=differences
    )


def _mean_interval(values_N: np.ndarray | None, weights_RN: torch.Tensor | None) -> Interval | None:
    if values_N is None or weights_RN is None:
        return None
    return interval(mean_of_draws(torch.from_numpy(values_N), weights_RN))


def warnings_of(report: CocoReport) -> list[str]:
    """What a reader should know before comparing these numbers with published ones."""
    return [f"Not the peers' measurement: {text}" for text in report.protocol.departures]


def difference_lines(report: CocoReport) -> list[str]:
    """A sentence for each row beside the first one: whether it is better, and how sure that is."""
    first = next(iter(report.rows))
    lines = []
    for name, change in report.differences.items():
        parts = [_difference(report.figure, change.fid, change.fid_interval, lower_is_better=True)]
        if change.clip is not None and change.clip_interval is not None:
            parts.append(
                _difference("CLIP score", change.clip, change.clip_interval, lower_is_better=False)
            )
        lines.append(f"{name} against {first}: {'; '.join(parts)}.")
    return lines


def _difference(figure: str, change: float, limits: Interval, *, lower_is_better: bool) -> str:
    low, high = limits
    digits = 2 if lower_is_better else 4
    numbers = f"{change:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    if float(f"{max(abs(low), abs(high)):.{digits}f}") == 0:
        return f"{figure} equal, to {digits} digits"
    if low <= 0 <= high:
        return f"{figure} not told apart, {numbers}"
    better = (change < 0) == lower_is_better
    return f"{figure} {'better' if better else 'worse'}, {numbers}"


HEADINGS = ("CLIP score",)


def _cells(row: CocoRow) -> list[str]:
    low, high = row.fid_interval
    cells = [f"{row.fid:.2f} ({low:.2f} to {high:.2f})"]
    if row.clip is None:
        cells.append("none")
    elif row.clip_interval is None:
        cells.append(f"{row.clip:.4f}")
    else:
        low, high = row.clip_interval
        cells.append(f"{row.clip:.4f} ({low:.4f} to {high:.4f})")
    return cells


def coco_table(report: CocoReport) -> Table:
    """The rows as a table for the terminal."""
    known = report.protocol
    title = f"COCO {known.year}, {known.images:,} images"
    table = Table("", report.figure, *HEADINGS, title=title)
    for name, row in report.rows.items():
        table.add_row(name, *_cells(row))
    return table


def coco_markdown(report: CocoReport) -> str:
    """The whole report as Markdown: table, spread, differences, notes and protocol."""
    lines = [f"# {report.figure} on COCO {report.protocol.year}", ""]
    for warning in warnings_of(report):
        lines += [f"**{warning}**", ""]
    lines += [f"| | {report.figure} | {' | '.join(HEADINGS)} |", "|---|---|---|"]
    for name, row in report.rows.items():
        lines.append(f"| {name} | {' | '.join(_cells(row))} |")
    lines += ["", SPREAD, ""]
    for line in difference_lines(report):
        lines += [f"- {line}"]
    for name, row in report.rows.items():
        if row.notes:
            lines += [f"- {name}: {' '.join(row.notes)}"]
    lines += ["", "## Protocol", ""]
    lines += [f"- {line}" for line in report.protocol.description]
    known = report.protocol
    lines += ["", "| what | SHA-256 |", "|---|---|"]
    lines.append(f"| captions, one a line | `{known.captions_sha256}` |")
    lines.append(f"| names of the real images | `{known.reference_sha256}` |")
    lines.append(f"| Inception's weights | `{known.inception_sha256}` |")
    if known.clip_sha256:
        lines.append(f"| CLIP's weights | `{known.clip_sha256}` |")
    return "\n".join(lines) + "\n"


SPREAD = (
    "In brackets: intervals of 95 %. That of the distance is a jackknife over "
    f"{GROUPS} groups of images, as a bootstrap would repeat images and so raise every distance. "
    "That of the CLIP score is a bootstrap of 1,000 draws of the captions. They say how far the "
    "numbers depend on captions and noise, and nothing of another training."
)
