"""One part of ``run.py``, in a process of its own: ``python -m benchmarks.gpu.part PART …``."""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.figures import PartFile
from benchmarks.gpu.job import Job
from hipa_deploy.extras import missing

MODULES = {
    "tests": "gpu_tests",
    "bundles": "models",
    "rates": "rates",
    "torch": "torch_inference",
    "backends": "backends",
    "training": "training",
}
# The extra of pyproject.toml that a part is imported with.
EXTRAS = {"training": "train"}


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--deadline", type=float, required=True)
    request = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    request.work.mkdir(parents=True, exist_ok=True)
    job = Job(
        out=request.out,
        work=request.work,
        device=request.device,
        tiny=request.tiny,
        file=PartFile(request.out, request.part, request.deadline),
    )
    # A part whose packages are missing could not even be imported.
    extra = EXTRAS.get(request.part)
    absent = missing(extra) if extra else []
    if absent:
        job.file.leave_out("everything", f"{', '.join(absent)} is not installed")
        return
    import_module(f"benchmarks.gpu.{MODULES[request.part]}").run(job)
    job.file.save()


if __name__ == "__main__":
    sys.exit(main())
