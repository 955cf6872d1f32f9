"""What this machine can do, what it lacks, and the command that fixes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from hipa_deploy import __version__, embedded
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.disk.files import check_name
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import EXTRAS, missing, too_new
from hipa_deploy.marks.records import Marks
from hipa_deploy.models.adaptor_folder import WEIGHTS

# A file of each embedded folder without which the folder is no use.
NEEDED = {"model": "model_index.json", "adaptor": WEIGHTS, "bundle": MANIFEST}

VERDICT_COLOURS = {"same": "green", "differs": "red", "unknown": "yellow"}


def check_request(subject: str | None, backend: str) -> None:
    """Check what is asked for, before this machine's devices are.

    Raises:
        HipaError: an unknown backend, or a subject that does not exist, or is another file.

    """
    from hipa_deploy.engines.store.diagnose import is_engine
    from hipa_deploy.generate.runner import check_backend
    from hipa_deploy.marks.read_marks import is_image_file

    check_backend(backend)
    if subject:
        path = embedded.resolve_bundle(subject)
        check_name(path)
        if not path.exists():
            raise HipaError(
                f"{subject} does not exist. Expected a bundle's folder, an .engine file, an image, "
                "or emoji."
            )
        if path.is_file() and not (is_engine(path) or is_image_file(path)):
            raise HipaError(
                f"{subject} is a file of another kind. Expected a bundle's folder, an .engine "
                "file, or an image as PNG, WebP or JPEG."
            )


def examine(subject: str | None = None, backend: str = "auto") -> dict[str, Any]:
    """Facts about this machine, and the state of a bundle or an engine, as JSON types.

    A bundle's reference prompt is run on ``backend`` and compared with the stored outputs.

    Args:
        subject: a bundle folder, 'emoji' for the embedded bundle, an .engine file, or None.
        backend: what runs the bundle; one of ``hipa_deploy.generate.runner.BACKENDS``.

    Returns:
        'version', 'device' (with its 'backends'), 'embedded', 'extras' and 'problems', a line each;
        with a subject also 'bundle' or 'engine'.

    Raises:
        HipaError: an unknown backend. Whatever is wrong with the subject is in 'problems'.

    Example:
        >>> examine("emoji")["bundle"]["size"]
        [64, 64]

    """
    from hipa_deploy.engines.backends.available import describe_device
    from hipa_deploy.engines.store.diagnose import is_engine
    from hipa_deploy.generate.runner import check_backend

    check_backend(backend)
    report: dict[str, Any] = {
        "version": __version__,
        "device": describe_device().model_dump(mode="json"),
        "embedded": {
            "model": str(embedded.MODEL),
            "adaptor": str(embedded.ADAPTOR),
            "bundle": str(embedded.BUNDLE),
        },
        "extras": {extra: _extra(extra) for extra in EXTRAS},
        "problems": [],
    }

    for name, folder in report["embedded"].items():
        if not (Path(folder) / NEEDED[name]).is_file():
            report["problems"].append(f"the embedded {name} is missing. Reinstall hipa-deploy.")

    if subject and is_engine(Path(subject)):
        report["engine"] = _examine_engine(Path(subject), report["problems"])
    elif subject:
        report["bundle"] = _examine_bundle(subject, backend, report["problems"])
    return report


def _examine_engine(path: Path, problems: list[str]) -> dict[str, Any]:
    """What an engine was built for, beside what is here; what is wrong goes to ``problems``."""
    from hipa_deploy.engines.store.diagnose import diagnose

    try:
        diagnosis = diagnose(path)
    except HipaError as error:
        problems.append(str(error))
        return {"path": str(path)}
    problems.extend(f"{path}: {problem}" for problem in diagnosis.problems)
    return diagnosis.model_dump(mode="json", exclude={"problems"})


def _extra(extra: str) -> str:
    """'installed', or what is missing or too new and the command that installs it."""
    absent = missing(extra)
    if not absent:
        return " ".join(too_new(extra)) or "installed"
    return f"{', '.join(absent)} missing. Run: pip install 'hipa-deploy[{extra}]'"


def _examine_bundle(name: str, backend: str, problems: list[str]) -> dict[str, Any]:
    """What a bundle is and whether it runs right; what is wrong goes to ``problems``."""
    path = embedded.resolve_bundle(name)
    try:
        bundle = Bundle.open(path)
        bundle.verify()
    except HipaError as error:
        problems.append(str(error))
        return {"path": str(path)}

    manifest = bundle.manifest
    engines = sorted(
        engine.relative_to(path).as_posix() for engine in path.glob("engines/*/*.engine")
    )
    return {
        "path": str(path),
        "layout": manifest.layout,
        "precision": manifest.precision,
        "size": [manifest.one_step.width, manifest.one_step.height],
        "stages": {stage.spec.name: round(stage.parity.psnr_db, 1) for stage in manifest.stages},
        "marks": _marks_in_words(manifest.marks),
        "safety_checker": "runs on every image" if manifest.safety else "none in this bundle",
        "engines": engines,
        "self_check": _self_check(bundle, backend, problems),
    }


def _marks_in_words(marks: Marks) -> str:
    """How the bundle's owner wants its images marked."""
    words = ["provenance"] if marks.provenance else ["no provenance"]
    if marks.watermark:
        words.append(f"watermark {marks.watermark_id or 'of the UNet'}")
    if marks.c2pa:
        words.append("signed content credentials")
    return ", ".join(words)


def _self_check(bundle: Bundle, backend: str, problems: list[str]) -> dict[str, str]:
    """How each stage did on the reference prompt, in words; failures go to ``problems``."""
    from hipa_deploy.doctor.self_check import END_TO_END, check_bundle

    try:
        result = check_bundle(bundle, backend)
    except HipaError as error:
        problems.append(str(error))
        return {"backend": backend, "outcome": "could not run"}

    remedy = _remedy(bundle, result.backend)
    problems.extend(f"{problem} {remedy}" for problem in result.problems)
    words = {"backend": result.backend, "prompt": result.prompt}
    for name, check in result.stages.items():
        words[name] = str(check)
    words[END_TO_END] = str(result.end_to_end)
    return words


def _remedy(bundle: Bundle, backend: str) -> str:
    """What to do about a bundle whose images are wrong on ``backend``."""
    if backend in ("tensorrt", "rtx"):
        return (
            f"Run: hipa-build {bundle.root} --backend {backend}. "
            "If the problem stays, export the bundle with --dtype fp32."
        )
    if backend == "openvino-bf16":
        return "bfloat16 is too coarse for this bundle. Use --backend openvino."
    return "Export the bundle again. If the problem stays, export it with --dtype fp32."


def render(report: dict[str, Any]) -> Group:
    """The report of ``examine`` as tables for a terminal.

    One table has a row for each fact, backend and problem; a second one, for an engine, has a row
    for each field of its key.
    """
    tables = [_facts(report)]
    fields = report.get("engine", {}).get("fields")
    if fields:
        tables.append(_key_fields(fields))
    return Group(*tables)


def _key_fields(fields: list[dict[str, str]]) -> Table:
    table = Table("field", "as built", "here", "", title="The engine's key")
    for field in fields:
        verdict = field["verdict"]
        table.add_row(
            escape(field["name"]),
            escape(field["built"]),
            escape(field["here"]),
            f"[{VERDICT_COLOURS[verdict]}]{verdict}[/]",
        )
    return table


def _facts(report: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, title=f"hipa-deploy {report['version']}")

    # The machine, then a row for each backend: its version, or the command that makes it work.
    device = report["device"]
    for key, value in device.items():
        if key != "backends":
            table.add_row(f"device.{key}", _plain(value))
    for backend in device["backends"]:
        state = _plain(backend["remedy"])
        if backend["usable"]:
            state = f"[green]works[/green] {_plain(backend['version'])}"
        table.add_row(f"backend.{backend['name']}", state)

    # Then what is installed and what was asked about; an engine's key has a table of its own.
    for section in ("extras", "embedded", "bundle", "engine"):
        for key, value in report.get(section, {}).items():
            if key != "fields":
                table.add_row(f"{section}.{key}", _plain(value))

    # Problems last: at the end of a long table they are what is seen first.
    for problem in report["problems"]:
        table.add_row("[red]problem[/red]", escape(problem))
    return table


def _plain(value: Any) -> str:
    """A JSON value as text for a cell: a line for each key, commas between list items."""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value)
    return "-" if value is None else escape(str(value))
