"""Fill a folder with the wheels that a GPU machine without a network needs for ``run.py``.

Commands, on a machine with a network, from the repository's root::

    make wheels-for-gpu                                     # into wheels/, without torch
    python benchmarks/gpu/wheels.py --out wheels --python 3.12 --with rtx

The packages are this project's own requirements (pyproject.toml) in the versions that its tests use
(constraints.txt). torch and what it brings are left out: a GPU machine has its own PyTorch, whose
CUDA fits its driver. onnxruntime-gpu takes the place of onnxruntime: both install the same module.

It must run in an environment with the project's development packages (``make .venv/installed``):
what each package needs is read from there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).absolute().parents[2]
EXTRAS = ("train", "export", "optimum")
TESTS = ("pytest", "hypothesis")
# The machine's own, with what only it needs.
LEFT_OUT = {"torch", "triton"}
INSTEAD = {"onnxruntime": "onnxruntime-gpu"}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def main() -> int:
    """Download the wheels; the exit code is pip's."""
    parser = argparse.ArgumentParser(description="Wheels for a GPU machine without a network.")
    parser.add_argument("--out", type=Path, default=Path("wheels"), help="folder (default: wheels)")
    parser.add_argument(
        "--python",
        default=f"{sys.version_info.major}.{sys.version_info.minor}",
        help="Python of the GPU machine (default: this one's)",
    )
    parser.add_argument(
        "--arch", choices=("x86_64", "aarch64"), default="x86_64", help="its processor"
    )
    parser.add_argument(
        "--with",
        dest="extras",
        action="append",
        choices=("rtx", "onnxruntime-rtx", "tensorrt"),
        default=[],
        help="also TensorRT-RTX, its plugin for ONNX Runtime, or TensorRT; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the packages alone")
    request = parser.parse_args()

    wanted = packages([*EXTRAS, *request.extras], request.python, request.arch)
    if request.list:
        print("\n".join(wanted))
        return 0
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", request.python, "--implementation", "cp"]
    command += ["--dest", str(request.out)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_{request.arch}"]
    code = subprocess.run([*command, *wanted], check=False).returncode
    if code == 0:
        sizes = [path.stat().st_size for path in request.out.glob("*.whl")]
        print(f"{request.out}: {len(sizes)} wheels, {sum(sizes) / 1e6:.0f} MB")
    return code


def packages(extras: Iterable[str], python: str, arch: str = "x86_64") -> list[str]:
    """'name==version' of all that the project needs with these extras, torch left out.

    Args:
        extras: of pyproject.toml.
        python: the version of the machine's Python, such as '3.12'.
        arch: its processor, as Python's platform.machine names it.

    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [*project["dependencies"], *TESTS]
    for extra in extras:
        waiting += project["optional-dependencies"][extra]

    pins = pinned(python)
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen or name in LEFT_OUT or name.startswith("nvidia-"):
            continue
        if not applies(requirement, python, arch=arch):
            continue
        seen.add(name)
        target = INSTEAD.get(name, name)
        version = pins.get(name)
        # A release of onnxruntime is not always there for GPUs: the newest up to it.
        relation = "==" if target == name else "<="
        found[target] = f"{target}{relation}{version}" if version else target
        waiting += needs(name, requirement.extras)
    return sorted(found.values())


def applies(
    requirement: Requirement, python: str, extras: Iterable[str] = ("",), arch: str = "x86_64"
) -> bool:
    """Whether a requirement holds on Linux with that Python and processor."""
    if requirement.marker is None:
        return True
    values = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": arch,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return any(requirement.marker.evaluate({**values, "extra": extra}) for extra in extras)


def needs(name: str, extras: Iterable[str]) -> list[str]:
    """What an installed package requires, without what other extras would.

    Raises:
        SystemExit: it is not installed, so that its requirements are not known.

    """
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"error: {name} is not installed, so what it needs is not known. Run this in the "
            "project's environment: make .venv/installed, then .venv/bin/python"
        ) from None
    chosen = ["", *extras]
    kept = []
    for line in lines:
        requirement = Requirement(line)
        if applies(requirement, f"{sys.version_info.major}.{sys.version_info.minor}", chosen):
            requirement.marker = None
            kept.append(str(requirement))
    return kept


def pinned(python: str) -> dict[str, str]:
    """Package -> version, of constraints.txt for that Python."""
    versions = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if applies(requirement, python):
            (specifier,) = requirement.specifier
            versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


if __name__ == "__main__":
    sys.exit(main())
