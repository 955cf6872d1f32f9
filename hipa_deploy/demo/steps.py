"""The steps that every demo has: its folder, export, build, latency, and the final summary."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hipa_deploy import embedded
from hipa_deploy.demo.contact_sheet import SHEET
from hipa_deploy.disk.files import check_writable, write_file
from hipa_deploy.disk.locks import locked
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle

MARKER = "demo.json"
# What a valid latency takes; see engines/latency/validity.py.
LATENCY_RUNS = 100
LATENCY_SECONDS = 10.0
DEFAULT = Path("demo")


def choose_folder(identity: dict[str, Any]) -> Path:
    """The folder of a demo for which none was given: demo, or demo-2 and so on if that is taken.

    A folder of a demo with the same identity is not taken: that demo is continued.
    """
    for out in _default_folders():
        if not os.path.lexists(out) or _is_of(out, identity):
            return out
    raise AssertionError  # they have no end


def begun_folder(out: Path | None, identities: Sequence[dict[str, Any]]) -> tuple[Path, int] | None:
    """A folder in which one of several demos was begun, and the number of that demo.

    Args:
        out: the folder; None looks at those that ``choose_folder`` would give.
        identities: as for ``open_folder``, one a demo.

    Returns:
        None where none was begun.

    Raises:
        HipaError: ``out`` holds a demo with another identity.

    """
    for folder in [out] if out is not None else _default_folders():
        for number, identity in enumerate(identities):
            if _is_of(folder, identity):
                return folder, number
        if not os.path.lexists(folder):
            return None
    if out is not None and (out / MARKER).exists():
        raise _other_demo(out)
    return None


def _default_folders() -> Iterator[Path]:
    """demo, demo-2, demo-3 and so on, without an end."""
    yield DEFAULT
    for number in count(2):
        yield DEFAULT.with_name(f"{DEFAULT.name}-{number}")


def _is_of(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether a demo with this identity was begun in a folder."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_bytes() == _marker_content(identity)


def _marker_content(identity: dict[str, Any]) -> bytes:
    return json.dumps(identity, sort_keys=True).encode()


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Begin a demo's folder, or continue one with the same identity.

    Args:
        out: the folder. It is new, empty, or one of a demo that was stopped.
        identity: the model and what is done with it, as JSON types; kept in ``demo.json``.

    Raises:
        HipaError: ``out`` holds something else, or a demo with another identity.

    """
    content = _marker_content(identity)
    marker = out / MARKER
    if marker.exists():
        # Adaptor and bundle in the folder are kept as they are; they must be of this very demo.
        if marker.read_bytes() != content:
            raise _other_demo(out)
        return
    check_folder(out)
    write_file(marker, content)


def _other_demo(out: Path) -> HipaError:
    return HipaError(
        f"{out} holds a demo of another model or with other options. "
        "Remove it, or choose another --out."
    )


def check_folder(out: Path) -> None:
    """Check that a demo can write to a folder.

    Raises:
        HipaError: ``out`` holds something else than a demo, or cannot be written.

    """
    check_writable(out / MARKER)
    is_other = out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists()
    if out.is_file() or is_other:
        raise HipaError(f"{out} is not empty and not a demo's folder. Choose another --out.")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of a demo's folder.

    Raises:
        HipaError: another demo is running there.

    """
    remedy = "Wait until it ends, or choose another --out."
    with locked(out / ".lock", f"demo folder {out}", remedy):
        yield


def export(out: Path, adaptor: Path, console: Console) -> Bundle:
    """The bundle of the embedded model with ``adaptor``, exported now unless it is there."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.export.export_bundle import export_bundle
    from hipa_deploy.export.export_options import ExportOptions

    root = out / "bundle"
    if not root.exists():
        console.rule("2. merge and export: ONNX, checked against PyTorch")
        export_bundle(ExportOptions(model=embedded.NAME, adaptor=adaptor, out=root), console)
    return Bundle.open(root)


def build(bundle: Bundle, console: Console) -> list[Path]:
    """Paths of the bundle's TensorRT-RTX engines; none where TensorRT-RTX is not installed."""
    from hipa_deploy.engines.build.build_bundle import build_bundle

    if importlib.util.find_spec("tensorrt_rtx") is None:
        return []
    console.rule("3. compile: TensorRT-RTX engines")
    return [engine.path for engine in build_bundle(bundle, backend="rtx", console=console)]


def profile(out: Path, console: Console) -> str:
    """Write latency.json of the bundle on this CPU; give the line to print about it."""
    from hipa_deploy.engines.latency.measure import profile_pipeline
    from hipa_deploy.engines.latency.table import render_table

    console.rule("5. profile: ONNX Runtime on this CPU")
    with OneStepPipeline.load(out / "bundle", backend="onnxruntime") as pipe:
        report = profile_pipeline(pipe, runs=LATENCY_RUNS, seconds=LATENCY_SECONDS, console=console)
    write_file(out / "latency.json", (report.model_dump_json(indent=2) + "\n").encode())
    console.print(render_table(report))
    return f"latency.json: {report.end_to_end.runs} runs, ONNX Runtime, this CPU"


def print_summary(
    out: Path,
    columns: Sequence[str],
    engines: list[Path],
    results: list[str],
    trained_with: str | None,
    seconds: float,
    console: Console,
) -> None:
    """Print where everything is, what was measured, and what ran on this machine.

    Args:
        out: the demo's folder.
        columns: headings of the contact sheet.
        engines: paths of the engines that were built.
        results: a line for each measurement.
        trained_with: what the training ran on; None where nothing was trained.
        seconds: how long the demo took.
        console: where to print.

    """
    if engines:
        built = f"{len(engines)} TensorRT-RTX engines compiled; none was run: that needs an RTX GPU"
    else:
        built = "none compiled: TensorRT-RTX is not installed (pip install 'hipa-deploy[rtx]')"
    training = f"training ({trained_with}), " if trained_with else ""

    console.rule("done")
    lines = [
        f"contact sheet: {out / SHEET} ({' | '.join(columns)})",
        *results,
        f"engines: {built}",
        f"run on this machine: {training}export, ONNX Runtime (CPU); {seconds / 60:.1f} minutes",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
