from __future__ import annotations

import hashlib
import io
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hipa_deploy.errors import HipaError
from hipa_deploy.train.loop.scalars import OtherTracker, Scalars, Trackers, wandb_run_id
from hipa_deploy.train.training_request import TRACKERS, check_trackers

IMAGE = np.zeros((4, 6, 3), np.uint8)
CONFIG = {"steps": 4, "optimiser.learning_rate": 0.1}


def test_failing_to_close_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full_disk)
    with pytest.raises(HipaError, match="the cause"), Scalars(tmp_path, 0):
        raise HipaError("the cause")
    screen = Console(file=io.StringIO(), width=1000)
    with Scalars(tmp_path, 0, screen):
        pass
    assert "warning: tracker tensorboard failed (OSError: [Errno 28]" in screen.file.getvalue()


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    screen = Console(file=io.StringIO(), width=1000)
    hook = threading.excepthook
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Scalars(tmp_path, 0, screen) as scalars:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))  # bytes of a file
        try:
            # The writer's thread writes every two minutes: now.
            worker = scalars.writer.file_writer.event_writer._async_writer._worker
            worker._next_flush_time = 0
            for step in range(1, 1000):
                scalars.add({"loss": 0.5}, step)
                time.sleep(0.01 if scalars.writer else 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        scalars.add_image("samples", IMAGE, 1000)
    printed = screen.file.getvalue()
    assert printed.count("warning: tracker tensorboard failed (OSError: [Errno 27]") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(HipaError, match=r"tensorboard cannot be written: File exists\. Check its"):
        Scalars(tmp_path / "tensorboard", 0)


def test_without_a_folder_nothing_is_recorded() -> None:
    with Scalars(None, 0) as scalars:
        scalars.add({"loss": 1.0}, 1)
        scalars.add_image("samples", IMAGE, 1)
    assert scalars.writer is None
    with Trackers(None, 0, ["tensorboard"], {}) as trackers:
        trackers.add({"loss": 1.0}, 1)
    assert not trackers.open


def test_a_tracker_of_accelerate_gets_values_and_images(tmp_path: Path) -> None:
    # accelerate's own for TensorBoard: the one of them that needs no other package.
    with OtherTracker("tensorboard", tmp_path, CONFIG, None) as tracker:
        tracker.add({"loss": 0.5, "held_out/dists_like": 0.1}, 3)
        tracker.tracker.log_images({"samples": IMAGE[None]}, step=3, dataformats="NHWC")
    (folder,) = (tmp_path / "trackers").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (3, 0.5)
    assert "samples" in "".join(events.Tags()["images"])


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    PartialState(cpu=True)  # as every training makes it before its trackers
    run = tmp_path / "adaptor.run"
    with Trackers(run, 0, ["tensorboard", "wandb"], CONFIG) as trackers:
        trackers.add({"loss": 0.5}, 1)
        trackers.add_image("samples", IMAGE, 1)
        wandb_run = trackers.open[1].tracker.tracker
        assert wandb_run.name == "adaptor"
        assert wandb_run.config["optimiser.learning_rate"] == 0.1
    (folder,) = (run / "trackers" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert list(folder.rglob("samples*.png"))


def test_a_training_has_an_id_of_its_own_at_wandb(tmp_path: Path) -> None:
    run = tmp_path / "adaptor.run"
    first = wandb_run_id(run)
    assert wandb_run_id(run) == first  # resumed

    # A second training of that name, after the first one was removed, or on another machine.
    shutil.rmtree(run)
    assert wandb_run_id(run) != first

    # What was begun before there was a file goes on where it was.
    shutil.rmtree(run)
    (run / "trackers" / "wandb").mkdir(parents=True)
    named = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    assert wandb_run_id(run) == wandb_run_id(run) == named


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize(("mode", "ends"), [("online", True), ("offline", False)])
def test_no_key_of_wandb(tmp_path: Path, mode: str, ends: bool) -> None:
    """In a process of its own: wandb remembers the mode of its first call."""
    program = (
        "from hipa_deploy.train.loop.scalars import log_in\n"
        "log_in(['tensorboard'])\n"
        "log_in(['tensorboard', 'wandb'])"
    )
    environment = os.environ | {"WANDB_MODE": mode, "NETRC": str(tmp_path / "netrc")}
    environment.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 1) is ends
    assert ("tracker wandb cannot be opened (UsageError: No API key" in done.stderr) is ends


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), width=1000)
    with OtherTracker("tensorboard", tmp_path, CONFIG, screen) as tracker:
        tracker.tracker.writer.close()
        tracker.tracker.writer = None
        tracker.add({"loss": 0.5}, 1)
        tracker.add({"loss": 0.5}, 2)
    printed = screen.file.getvalue()
    assert printed.count("warning: tracker tensorboard failed") == 1

    def refuse(self: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["tensorboard"], "start", refuse)
    with pytest.raises(HipaError, match=r"cannot be opened \(RuntimeError: no API key\)"):
        OtherTracker("tensorboard", tmp_path, CONFIG, None)


def test_names_of_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    check_trackers(["tensorboard"])
    with pytest.raises(HipaError, match=r"--log-with paper is unknown\. Expected one of: tensor"):
        check_trackers(["paper"])
    monkeypatch.setitem(TRACKERS, "wandb", ("no_such_module", "wandb"))
    with pytest.raises(HipaError, match="needs package wandb, not installed; run: pip install"):
        check_trackers(["wandb"])
