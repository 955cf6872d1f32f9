"""Signals to whole commands: one line, the signal's exit code, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from hipa_deploy import embedded
from hipa_deploy.commands import app as command_line
from hipa_deploy.commands.app import main
from hipa_deploy.errors import HipaWarning

HIPA = (sys.executable, "-m", "hipa_deploy")
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until ``condition`` holds; fail if the process ends first."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """The ids of all processes that a process started, and of those that these started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(after_name[1]) == pid and after_name[0] != "Z":
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts a command in a folder of its own, with an empty cache."""
    monkeypatch.setenv("HIPA_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [*HIPA, *arguments]
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=work)

    return run


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_generation_that_is_stopped(
    number: signal.Signals, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(
        "generate", "emoji", embedded.EXAMPLE_PROMPT, "--count", "500", "--out", "images"
    )
    images = tmp_path / "work" / "images"
    wait_until(lambda: images.exists() and len(list(images.glob("*.png"))) > 1, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (EXIT_CODES[number], "hipa: stopped\n")
    assert {path.suffix for path in images.iterdir()} == {".png"}


def test_an_export_that_is_stopped_leaves_nothing(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    pytest.importorskip("diffusers")
    process = start("export", "--model", "emoji", "--out", "bundle", "--dtype", "fp32")
    work = tmp_path / "work"
    wait_until(lambda: any(work.glob(".bundle-*/bundle/*")), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "hipa: stopped"
    assert list(work.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_workers_of_a_build_end_with_it(
    number: signal.Signals,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    make_small_bundle: Callable[[], Path],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    process = start("build", str(make_small_bundle()), "--backend", "rtx", "--target", "rtx40")
    wait_until(lambda: bool(descendants(process.pid)), process)
    workers = descendants(process.pid)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.fixture
def make_small_bundle(tmp_path: Path) -> Callable[[], Path]:
    """A function that copies the included bundle, to build engines into."""

    def make() -> Path:
        ignored = shutil.ignore_patterns("engines")
        return Path(shutil.copytree(embedded.BUNDLE, tmp_path / "bundle", ignore=ignored))

    return make


def test_the_end_of_a_file_is_no_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def truncated(*_: object, **__: object) -> None:
        raise EOFError("No data left in file")

    monkeypatch.setattr(import_module("hipa_deploy.doctor.examine"), "examine", truncated)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "a file ends too early (No data left in file)" in error
    assert error.count("\n") == 1


def test_ctrl_c_inside_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("hipa_deploy.doctor.examine"), "examine", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "hipa: stopped\n"


# What libraries make of an interruption: each function is called in place of ``examine``.
LOSSES = """
import os, sys, tempfile
from importlib import import_module
from hipa_deploy.disk.files import new_folder, write_file
from hipa_deploy.errors import as_line
from hipa_deploy.commands.app import main
from pathlib import Path

def press():
    os.kill(os.getpid(), {number})

class Pressing:
    def __set_name__(self, owner, name):
        press()

def rewrapped():
    class Owner:  # Python up to 3.11 raises a RuntimeError
        attribute = Pressing()

def in_a_text():
    exec("press()")

def as_an_error():
    with as_line("a file cannot be read", "Copy it again."):
        try:
            press()
        except BaseException as error:
            raise ImportError("initialization failed") from error

def as_a_bug():
    try:
        press()
    except BaseException as error:
        raise ValueError("a bug") from error

def as_success():
    try:
        press()
    except BaseException:
        sys.exit(0)

def lost():
    try:
        press()
    except BaseException:
        pass

def lost_before_a_file():
    lost()
    write_file(Path("file"), b"half")

def lost_before_a_folder():
    with new_folder(Path("folder")):
        lost()

def while_a_folder_is_made():
    make = tempfile.mkdtemp

    def pressing(*arguments, **options):
        folder = make(*arguments, **options)
        press()
        return folder

    tempfile.mkdtemp = pressing
    try:
        with new_folder(Path("folder")):
            pass
    finally:
        tempfile.mkdtemp = make

# The text last: another one would make Python forget the signal.
ways = (rewrapped, as_an_error, as_a_bug, as_success, lost, lost_before_a_file,
        lost_before_a_folder, while_a_folder_is_made, in_a_text)
for way in ways:
    import_module("hipa_deploy.doctor.examine").examine = lambda *_, **__: way()
    try:
        main(["doctor"])
    except SystemExit as end:
        print(way.__name__, end.code, file=sys.stderr)
sys.exit(7)
"""
WAYS = (
    "rewrapped", "as_an_error", "as_a_bug", "as_success", "lost", "lost_before_a_file",
    "lost_before_a_folder", "while_a_folder_is_made", "in_a_text",
)  # fmt: skip


@pytest.mark.parametrize("number", EXIT_CODES)
def test_an_interruption_that_a_library_changes(number: signal.Signals, tmp_path: Path) -> None:
    module = tmp_path / "losses.py"
    module.write_text(LOSSES.replace("{number}", str(int(number))))
    # As a module, as "python -m hipa_deploy" is: a script's exit code is not changed at the end.
    command = [sys.executable, "-m", "losses"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    expected = [f"hipa: stopped\n{way} {EXIT_CODES[number]}\n" for way in WAYS]
    assert done.stderr == "".join(expected)
    assert done.returncode == 7  # Python itself has forgotten the signal
    assert {path.name for path in tmp_path.iterdir()} <= {"losses.py", "__pycache__"}


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_command_that_is_stopped_while_it_is_imported(
    number: signal.Signals, tmp_path: Path
) -> None:
    # A package of the commands that is imported before they are.
    (tmp_path / "typer.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*HIPA, "--help"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (EXIT_CODES[number], "hipa: stopped\n")


@pytest.mark.parametrize("code", [0, None, 3, "words"])
def test_a_library_that_ends_the_process_is_an_error(
    code: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(*_: object, **__: object) -> None:
        sys.exit(code)

    monkeypatch.setattr(import_module("hipa_deploy.doctor.examine"), "examine", leave)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    line = f"hipa: a library ended the command (exit code {code}). The work is not done.\n"
    assert capsys.readouterr().err == line


def test_a_warning_for_the_user_is_one_line_and_comes_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = command_line._Warnings()
    told.show(HipaWarning("two\nlines"), HipaWarning, "x.py", 1)
    assert capsys.readouterr().err == "hipa: warning: two lines\n"
    # Blamed on another line, by a check that ran before.
    told.show(HipaWarning("two\nlines"), HipaWarning, "y.py", 2)
    told.show(HipaWarning("another"), HipaWarning, "x.py", 1)
    assert capsys.readouterr().err == "hipa: warning: another\n"
    told.show(UserWarning("other"), UserWarning, "x.py", 1)
    assert "x.py:1: UserWarning: other" in capsys.readouterr().err
