"""Settings for every test."""

import atexit
import copy
import functools
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports torch: one thread per worker. With several threads, on CPUs with AMX, the
# same convolution of one or two rows sometimes rounds otherwise, and the tests of resumed runs
# compare bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As hipa_deploy sets it: some tests import ONNX Runtime before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# No test reads or changes the user's cache. Workers of pytest-xdist inherit the folder.
if "HIPA_CACHE" not in os.environ:
    os.environ["HIPA_CACHE"] = tempfile.mkdtemp(prefix="hipa-tests-")
    atexit.register(shutil.rmtree, os.environ["HIPA_CACHE"], ignore_errors=True)

import pytest
from filelock import FileLock
from hypothesis import settings

# With two workers of torch on two cores, the time of one example says nothing.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# A shell starts background commands with SIGINT ignored, and the processes that the tests start
# would inherit that. Some tests interrupt such a process as Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Let workers take the files in the order below, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first where workers share them, and the smallest last.

    A long file that comes last would leave the other worker without work.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    weights: dict[Path, int] = {}
    for item in items:
        weight = 1000 if item.get_closest_marker("slow") else 1
        weights[item.path] = weights.get(item.path, 0) + weight
    items.sort(key=lambda item: (-weights[item.path], str(item.path)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave the imported libraries and the collected tests out of every later collection.

    An export and a training collect garbage many times, and each time would walk through millions
    of objects of torch, diffusers and pytest that live until the end.
    """
    if "hipa_deploy.export.graph.to_onnx" in sys.modules:
        _prepare_many_exports()
    gc.collect()
    gc.freeze()


def _prepare_many_exports() -> None:
    """Import what torch.onnx imports when it is first used, and make its table of operators once.

    torch.onnx reads the source of 500 operators anew in every export of a stage, a quarter
    of the time of a tiny model's export. Each export gets its own copy of the table.
    """
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.export")
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")

    registry_type = registration.ONNXRegistry
    table_for = functools.cache(registry_type.from_torchlib)

    def copied_table(opset_version: int = registration._constants.TORCHLIB_OPSET) -> Any:
        table = table_for(opset_version)
        copied = copy.copy(table)
        copied.functions = {name: list(found) for name, found in table.functions.items()}
        return copied

    registry_type.from_torchlib = staticmethod(copied_table)
    copied_table()


@pytest.fixture(scope="session")
def emoji_task_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the embedded model's bundle for a task. Copy it; never write into it.

    It is exported once in a run of the tests, by whichever worker asks first.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of all workers

    def bundle_for(task: str) -> Path:
        from hipa_deploy import embedded
        from hipa_deploy.export.export_bundle import export_bundle
        from hipa_deploy.export.export_options import ExportOptions

        out = root / f"emoji-{task}"
        with FileLock(root / f"emoji-{task}.lock"):
            if not out.exists():
                adaptor = embedded.resolve_adaptor(f"emoji-{task}")
                export_bundle(ExportOptions(model="emoji", adaptor=adaptor, out=out))
        return out

    return bundle_for
