"""What this machine can do, what it lacks, and the command that mends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from hipa_deploy import __version__, embedded
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.extras import EXTRAS, missing
from hipa_deploy.models.adaptor_folder import WEIGHTS

NEEDED = {"model": "model_index.json", "adaptor": WEIGHTS, "bundle": MANIFEST}


def examine(subject: str | None = None, backend: str = "auto") -> dict[str, Any]:
    """Facts as JSON types: version, device and backends, extras, embedded folders, problems.

    With ``subject``, a bundle or an engine, its state as well.

    A bundle's reference prompt is run on ``backend`` and compared with the stored outputs.

    Raises:
        HipaError: a backend of another name.

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
    from hipa_deploy.engines.store.diagnose import diagnose

    try:
        diagnosis = diagnose(path)
    except HipaError as error:
        problems.append(str(error))
        return {"path": str(path)}
    problems.extend(f"{path}: {problem}" for problem in diagnosis.problems)
    return diagnosis.model_dump(mode="json", exclude={"problems"})


def _extra(extra: str) -> str:
    """'installed', or what is missing and the command that mends it."""
    absent = missing(extra)
    return (
        f"{', '.join(absent)} missing. Run: pip install 'hipa-deploy[{extra}]'"
        if absent
        else "installed"
    )


def _examine_bundle(name: str, backend: str, problems: list[str]) -> dict[str, Any]:
    path = embedded.resolve_bundle(name)
    try:
        opened = Bundle.open(path)
        opened.verify()
    except HipaError as error:
        problems.append(str(error))
        return {"path": str(path)}
    manifest = opened.manifest
    return {
        "path": str(path),
        "layout": manifest.layout,
        "precision": manifest.precision,
        "size": [manifest.one_step.width, manifest.one_step.height],
        "stages": {stage.spec.name: round(stage.parity.psnr_db, 1) for stage in manifest.stages},
        "engines": sorted(p.relative_to(path).as_posix() for p in path.glob("engines/*/*.engine")),
        "self_check": _self_check(opened, backend, problems),
    }


def _self_check(bundle: Bundle, backend: str, problems: list[str]) -> dict[str, str]:
    """What each stage of the reference prompt gave, in words; failures go to ``problems``."""
    from hipa_deploy.doctor.self_check import END_TO_END, check_bundle

    try:
        found = check_bundle(bundle, backend)
    except HipaError as error:
        problems.append(str(error))
        return {"backend": backend, "outcome": "could not run"}
    problems.extend(f"{problem} {_mend(bundle, found.backend)}" for problem in found.problems)
    checks = {**found.stages, END_TO_END: found.end_to_end}
    return {
        "backend": found.backend,
        "prompt": found.prompt,
        **{name: str(check) for name, check in checks.items()},
    }


def _mend(bundle: Bundle, backend: str) -> str:
    if backend in ("tensorrt", "rtx"):
        return f"Run: hipa-build {bundle.root} --backend {backend}; if it stays, export with --dtype fp32."
    if backend == "openvino-bf16":
        return "bfloat16 is too coarse for this bundle. Use --backend openvino."
    return "Export the bundle again; if it stays, with --dtype fp32."


def render(report: dict[str, Any]) -> Group:
    """The report as tables: a row for each fact, each backend, each field of an engine's key, and each problem."""
    engine = report.get("engine", {}).get("fields")
    return Group(_facts(report), *([_key_fields(engine)] if engine else []))


def _key_fields(fields: list[dict[str, str]]) -> Table:
    table = Table("field", "as built", "here", "", title="The engine's key")
    colours = {"same": "green", "differs": "red", "unknown": "yellow"}
    for field in fields:
        verdict = field["verdict"]
        text = (escape(field[column]) for column in ("name", "built", "here"))
        table.add_row(*text, f"[{colours[verdict]}]{verdict}[/]")
    return table


def _facts(report: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, title=f"hipa-deploy {report['version']}")
    device = report["device"]
    for key, value in device.items():
        if key != "backends":
            table.add_row(f"device.{key}", _plain(value))
    for backend in device["backends"]:
        usable = f"[green]works[/green] {_plain(backend['version'])}"
        table.add_row(
            f"backend.{backend['name']}", usable if backend["usable"] else _plain(backend["remedy"])
        )
    for section in ("extras", "embedded", "bundle", "engine"):
        for key, value in report.get(section, {}).items():
            if key != "fields":
                table.add_row(f"{section}.{key}", _plain(value))
    for problem in report["problems"]:
        table.add_row("[red]problem[/red]", escape(problem))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value)
    return "-" if value is None else escape(str(value))
