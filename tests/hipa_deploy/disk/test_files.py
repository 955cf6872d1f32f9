import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hipa_deploy.disk import files
from hipa_deploy.disk.files import new_folder, sweep, temporary_folder, write_file
from hipa_deploy.errors import HipaError

# A process that makes scratch in the folder argv[1] and waits until it is killed.
MAKES_A_FOLDER = """
import sys, time
from pathlib import Path
from hipa_deploy.disk.files import new_folder
with new_folder(Path(sys.argv[1]) / "out") as scratch:
    (scratch / "x").write_text("1")
    print("ready", flush=True)
    time.sleep(120)
"""
MAKES_A_FILE = """
import sys, time
from pathlib import Path
from hipa_deploy.disk import files
file, scratch = files._scratch_file(Path(sys.argv[1]) / "out")
file.write(b"1")
print("ready", flush=True)
time.sleep(120)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], subprocess.Popen[str]]]:
    """A function that starts a program with a folder, and returns when it has made its scratch."""
    started = []

    def run(program: str, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_new_folder_appears_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as scratch:
        (scratch / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"


def test_new_folder_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as scratch:
            (scratch / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_file", [True, False])
def test_new_folder_refuses_what_is_there(tmp_path: Path, as_file: bool) -> None:
    out = tmp_path / "out"
    if as_file:
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(HipaError, match="not empty"), new_folder(out):
        pass
    assert (out if as_file else out / "mine").read_text() == "mine"


def test_new_folder_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "x").touch()
    assert (tmp_path / "out" / "x").exists()


def test_write_file_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.bin"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("program", [MAKES_A_FOLDER, MAKES_A_FILE])
def test_scratch_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(
    program: str, tmp_path: Path, start: Callable[[str, Path], subprocess.Popen[str]]
) -> None:
    dead = start(program, tmp_path)
    dead.kill()
    dead.wait()
    (left,) = tmp_path.iterdir()
    start(program, tmp_path)
    (living,) = set(tmp_path.iterdir()) - {left}
    assert not left.exists()  # swept by the second process when it began
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [living]


def test_a_folder_is_made_where_a_killed_process_left_scratch(
    tmp_path: Path, start: Callable[[str, Path], subprocess.Popen[str]]
) -> None:
    dead = start(MAKES_A_FOLDER, tmp_path)
    dead.kill()
    dead.wait()
    with new_folder(tmp_path / "other") as scratch:
        (scratch / "y").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_a_user_has_named_like_scratch_stays(tmp_path: Path) -> None:
    (tmp_path / ".photos-abcd1234").mkdir()
    (tmp_path / ".photos-abcd1234" / "x").touch()
    (tmp_path / ".notes-abcd1234").touch()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / files._LOCK).touch()
    (tmp_path / ".link-abcd1234").symlink_to(mine)
    (tmp_path / ".file-abcd1234.hipa-tmp").symlink_to(mine / files._LOCK)
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".out-abcd1234"
    left.mkdir()
    (left / files._LOCK).touch()
    monkeypatch.setattr("hipa_deploy.disk.locks.fcntl", None)
    sweep(tmp_path)
    assert left.exists()
    monkeypatch.undo()
    sweep(tmp_path)
    assert not left.exists()


def test_a_new_folder_of_two_processes_is_that_of_the_first(tmp_path: Path) -> None:
    def write(text: str, *, meanwhile: Callable[[], None]) -> None:
        with new_folder(tmp_path / "out") as scratch:
            (scratch / "x").write_text(text)
            meanwhile()

    with pytest.raises(HipaError, match="not empty"):
        write("slow", meanwhile=lambda: write("fast", meanwhile=lambda: None))
    assert (tmp_path / "out" / "x").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder("hipa-test") as folder:
        assert list(folder.iterdir()) == []
        (folder / "x").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_long_name(tmp_path: Path) -> None:
    name = "ü" * 120 + ".png"  # 244 bytes: nothing fits behind it
    write_file(tmp_path / name, b"x")
    with new_folder(tmp_path / name.removesuffix(".png")):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/x")
    write_file(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "x").read_bytes() == b"1"


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_file(Path(os.devnull), b"1")
    assert Path(os.devnull).is_char_device()


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "x").touch()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "there" / "x").exists()


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_a_link_that_leads_nowhere_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(target)
    with (
        pytest.raises(HipaError, match=r"is a (link that leads nowhere|loop of links)"),
        new_folder(tmp_path / "out"),
    ):
        pass


def test_two_processes_that_make_one_folder(
    tmp_path: Path, start: Callable[[str, Path], subprocess.Popen[str]]
) -> None:
    program = MAKES_A_FOLDER.replace('"out")', '"out", alone=True)')
    other = start(program, tmp_path)
    with (
        pytest.raises(HipaError, match=rf"out: process {other.pid} .* is writing here\. Wait"),
        new_folder(tmp_path / "out", alone=True),
    ):
        pass
    other.kill()
    other.wait()
    with new_folder(tmp_path / "out", alone=True) as scratch:
        (scratch / "x").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_says_what_is_needed_and_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "x"
    write_file(path, b"old")
    with pytest.raises(OSError, match=r"2\.0 MB needed, 1\.0 MB free") as full:
        write_file(path, bytes(2_000_000))
    assert full.value.filename == str(path)
    assert full.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["x"]


def test_a_folder_on_a_full_disk(small_disk: Path) -> None:
    def fill() -> None:
        with new_folder(small_disk / "out") as scratch:
            (scratch / "a").write_bytes(bytes(800_000))
            raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors'

    message = r"out cannot be written: the disk is full\. 800\.0 kB .* and [0-9.]+ kB are free\."
    with pytest.raises(HipaError, match=message):
        fill()
    assert list(small_disk.iterdir()) == []


def test_another_error_in_a_folder_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), new_folder(tmp_path / "out"):
        raise RuntimeError("a bug")


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    """A limit on the size of files has an error without a name."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from hipa_deploy.disk.files import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_file(Path(sys.argv[1]), bytes(5000))\n"
    )
    path = tmp_path / "x"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not files.HAS_LOCKS, reason="no locks here")
@pytest.mark.parametrize("removes_before", [False, True], ids=["later", "at once"])
def test_new_scratch_that_a_sweep_took_for_a_leftover_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removes_before: bool
) -> None:
    """Another process's sweep locks the scratch in the moment before its maker does."""
    real = files.is_locked_now
    sweeps = []

    def after_a_sweep(file):
        if not sweeps:
            path = Path(file.name if isinstance(file.name, str) else newest(tmp_path))
            sweeps.append((path, path.open("r+b")))
            assert real(sweeps[0][1])
            if removes_before:
                path.unlink()
        return real(file)

    def newest(folder: Path) -> Path:
        return max(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns)

    monkeypatch.setattr(files, "is_locked_now", after_a_sweep)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with temporary_folder("scratch") as folder:
        lock, held = sweeps[0]
        shutil.rmtree(lock.parent, ignore_errors=True)
        held.close()
        (folder / "x").write_text("1")
        assert (folder / "x").read_text() == "1"
    assert list(tmp_path.iterdir()) == []

    sweeps.clear()
    write_file(tmp_path / "file", b"content")
    sweeps[0][1].close()
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_a_new_file_is_for_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "image.png", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "image.png").stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private.png"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
