"""Every figure that this project publishes for a GPU, by one command, in under ten minutes.

Purpose: whoever holds an NVIDIA GPU runs it once and sends back one file.

Commands, from the repository's root. Nothing needs to be installed but the packages that the first
lines name where one is missing; hipa-deploy itself runs from this folder::

    python benchmarks/gpu/run.py --out gpu-figures
    python benchmarks/gpu/run.py --out gpu-figures --minutes 60    # what ten minutes cut
    python benchmarks/gpu/run.py --device cpu --tiny --out tiny    # checks the script, no GPU

Expected time: what --minutes says, 9.5 by default, and at most half a minute more. The parts run in
the order of their worth, each within its share of the time; the result says what was cut. The same
command goes on where it stopped: a part's figures are kept in a file of its own, OUT/PART.json.

What comes back: OUT/gpu-figures.json (all figures, with conditions and validity) and OUT/report.md
(the same as tables). OUT/work holds models and bundles, some 25 GB at SD 1.5's size, and can be
deleted. docs/how-to/measure-on-a-gpu.md says more, also how to prepare a machine without network.

Not run on a GPU yet: it was tested on a CPU, with --device cpu --tiny.
"""

# Only the standard library here: whatever is missing must be said, not raised.
from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).absolute().parents[2]

# Module -> what pip calls it. Without these nothing runs.
NEEDED = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime-gpu",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "typer": "typer",
    "safetensors": "safetensors",
}
# Without these a part, or some cases of it, are left out, and the result says so.
OPTIONAL = {
    "peft": "peft",
    "accelerate": "accelerate",
    "tensorboard": "tensorboard",
    "torchmetrics": "torchmetrics",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "optimum.onnxruntime": "optimum-onnx",
    "polygraphy": "polygraphy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}

# Part -> its share of the time, what it does, in the order of worth. What a part does not use
# passes to those after it.
PARTS = {
    "tests": (3.0, "the tests that need a GPU"),
    "bundles": (3.0, "models and bundles (preparation; beside the tests)"),
    "rates": (0.7, "matrix products and copies of this card"),
    "torch": (2.2, "one-step images: diffusers, torch.compile"),
    "backends": (2.4, "one-step images: this project on every backend"),
    "training": (2.0, "training steps and their memory"),
}
# Parts that run at the same time: the tests use the GPU, the exports the CPU, neither is timed.
TOGETHER = (("tests", "bundles"), ("rates",), ("torch",), ("backends",), ("training",))
# After its deadline a part may end the query that it is in. Then it is stopped.
GRACE_SECONDS = 20.0
TINY_NOTE = "cpu, tiny: checks the script and says nothing of a GPU"


def main() -> int:
    """Run the parts, and put their figures together; the exit code."""
    request = parse()
    missing = absent(NEEDED)
    if missing:
        print(explain(missing), file=sys.stderr)
        return 1
    if request.device == "cuda" and not gpu_answers():
        print(
            "error: no NVIDIA GPU answers to torch.cuda. Install PyTorch for CUDA and the driver, "
            "or check the script without a GPU: --device cpu --tiny",
            file=sys.stderr,
        )
        return 1

    # The code of this folder is measured, whatever is installed.
    out = request.out.absolute()
    work = (request.work or out / "work").absolute()
    tree = linked_tree(work)
    sys.path.insert(0, str(tree))
    # CUDA then counts GPUs as nvidia-smi does.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"

    from benchmarks.gpu.figures import check_conditions, find_conditions
    from hipa_deploy.errors import HipaError

    try:
        check_conditions(out, find_conditions(TINY_NOTE if request.tiny else None))
        say_what_is_missing()
        failed = run_parts(request, out, work, tree)
        write_report(out)
    except HipaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Every figure that hipa-deploy publishes for a GPU, in under ten minutes."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data files")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="time for all parts together (default: 9.5)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS,
        help="run this part alone; may be repeated. Images by this project need the part bundles, "
        "shares of the card's rates need the part rates.",
    )
    parser.add_argument(
        "--work", type=Path, help="folder of models and bundles (default: OUT/work)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU: checks the script alone"
    )
    request = parser.parse_args()
    if (request.device == "cpu") != request.tiny:
        parser.error("--device cpu and --tiny go together: figures of a CPU are no GPU's.")
    if not 0.1 <= request.minutes <= 600:
        parser.error(f"--minutes is {request.minutes:g}. Expected 0.1 to 600.")
    return request


def absent(modules: dict[str, str]) -> list[str]:
    """What pip calls the modules that are not installed."""
    names = []
    for module, package in modules.items():
        try:
            found = find_spec(module) is not None
        except (ImportError, ValueError):  # the parent of a dotted name is missing
            found = False
        if not found:
            names.append(package)
    return names


def explain(missing: list[str]) -> str:
    """What to do about packages without which nothing runs."""
    names = " ".join(missing)
    return (
        f"error: not installed: {', '.join(missing)}.\n"
        f"With a network, run: {sys.executable} -m pip install {names}\n"
        "Without one, with a folder of wheels (docs/how-to/measure-on-a-gpu.md), run: "
        f"{sys.executable} -m pip install --no-index --find-links WHEELS {names}"
    )


def say_what_is_missing() -> None:
    """Name the packages without which something is left out."""
    missing = absent(OPTIONAL)
    if missing:
        print(f"not installed, so some cases are left out: {', '.join(missing)}", flush=True)


def gpu_answers() -> bool:
    """Whether PyTorch sees a GPU; asked in a process of its own, which gives the GPU back."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def linked_tree(work: Path) -> Path:
    """A folder from which this repository's code imports as it does when it is installed.

    setuptools maps the folders train, export and engines into the package hipa_deploy
    (pyproject.toml). Links do the same, and need no installation.
    """
    tree = work / "tree"
    package = tree / "hipa_deploy"
    package.mkdir(parents=True, exist_ok=True)
    links = {tree / name: ROOT / name for name in ("benchmarks", "tests", "docs", "pyproject.toml")}
    for stage in ("train", "export", "engines"):
        links[package / stage] = ROOT / stage
    for source in (ROOT / "hipa_deploy").iterdir():
        if source.name != "__pycache__":
            links[package / source.name] = source
    for link, source in links.items():
        if link.is_symlink():
            link.unlink()
        link.symlink_to(source)
    return tree


def run_parts(request: argparse.Namespace, out: Path, work: Path, tree: Path) -> bool:
    """Run the parts that are asked for; returns whether one of them failed as a whole."""
    from benchmarks.gpu.figures import read_part

    wanted = []
    for part in request.only or PARTS:
        before = read_part(out, part)
        if before is not None and before.complete:
            print(f"{part}: measured before, see {out / part}.json", flush=True)
        else:
            wanted.append(part)

    groups = [[part for part in group if part in wanted] for group in TOGETHER]
    groups = [group for group in groups if group]
    weights = [max(PARTS[part][0] for part in group) for group in groups]
    ends = time.time() + 60 * request.minutes
    failed = False
    for number, group in enumerate(groups):
        # What the parts before did not use is shared by those that are left.
        share = weights[number] / sum(weights[number:])
        deadline = time.time() + share * max(0.0, ends - time.time())
        children: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for part in group:
                seconds = deadline - time.time()
                print(f"{part}: {PARTS[part][1]}, at most {seconds:.0f} s", flush=True)
                children[part] = start(part, request, out, work, tree, deadline)
            for part, child in children.items():
                failed |= not finished(part, child, deadline)
        finally:
            # Ctrl-C too must leave no export and no build behind.
            for child in children.values():
                end_group(child)
    return failed


def start(
    part: str, request: argparse.Namespace, out: Path, work: Path, tree: Path, deadline: float
) -> subprocess.Popen[bytes]:
    """Begin a part in a process, and a process group, of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, "--out", str(out)]
    command += ["--work", str(work), "--device", request.device, "--deadline", str(deadline)]
    if request.tiny:
        command.append("--tiny")
    log = (work / f"{part}.log").open("wb")
    with log:
        return subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finished(part: str, child: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait for a part, and stop it some time after its deadline; whether it ended by itself."""
    try:
        code = child.wait(timeout=max(0.0, deadline + GRACE_SECONDS - time.time()))
    except subprocess.TimeoutExpired:
        end_group(child)
        print(f"{part}: stopped, it did not end in time", flush=True)
        return True
    if code:
        print(f"{part}: failed with code {code}, see its log in the folder work", flush=True)
    return code == 0


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a part: its builds, exports and tests are processes of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def write_report(out: Path) -> None:
    """Put the parts' files together, and print their tables."""
    from benchmarks.gpu.figures import merge
    from benchmarks.gpu.tables import render
    from hipa_deploy.disk.files import write_file

    report = merge(out, PARTS)
    text = render(report)
    write_file(out / "gpu-figures.json", (report.model_dump_json(indent=1) + "\n").encode())
    write_file(out / "report.md", text.encode())
    print(text)
    print(f"Send back {out / 'gpu-figures.json'}")


if __name__ == "__main__":
    sys.exit(main())
