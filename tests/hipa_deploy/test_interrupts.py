"""The signals go to new processes: in the tests' own they would stop the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hipa_deploy.interrupts import interruptible

PREAMBLE = """
import os, signal
from hipa_deploy.interrupts import *
from hipa_deploy.interrupts import interruptible

def press(number):
    os.kill(os.getpid(), number)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can press() a signal."""
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], capture_output=True, text=True, timeout=60
    )


def test_sigterm_sets_the_event_and_its_handler_is_restored() -> None:
    done = run("""
before = signal.getsignal(signal.SIGTERM)
with interruptible() as stop:
    press(signal.SIGTERM)
    assert stop.wait(1)
    assert stop.number == signal.SIGTERM
assert signal.getsignal(signal.SIGTERM) is before
""")
    assert done.returncode == 0, done.stderr


def test_under_a_launcher_later_interrupts_set_the_event_too() -> None:
    done = run("""
with interruptible(under_launcher=True) as stop:
    for _ in range(3):
        press(signal.SIGINT)
    assert stop.wait(1)
""")
    assert done.returncode == 0, done.stderr


def test_the_second_interrupt_takes_effect_at_once() -> None:
    done = run("""
try:
    with interruptible() as stop:
        press(signal.SIGINT)
        assert stop.wait(1)
        press(signal.SIGINT)
        raise SystemExit("went on")
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""")
    assert done.returncode == 0, done.stderr


def test_outside_the_main_thread_the_event_is_never_set() -> None:
    failures = []

    def work() -> None:
        try:
            with interruptible() as stop:
                failures.extend([1] if stop.is_set() else [])
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_raises_what_ctrl_c_raises(number: str) -> None:
    done = run(f"""
before = signal.getsignal(signal.{number})
try:
    with signals_interrupt() as interruption:
        press(signal.{number})
        raise SystemExit("went on")
except KeyboardInterrupt:
    assert interruption.number == signal.{number}
assert signal.getsignal(signal.{number}) is before
""")
    assert done.returncode == 0, done.stderr


def test_an_interruption_that_was_lost_is_raised_again() -> None:
    done = run("""
raise_interruption()
with signals_interrupt() as interruption:
    raise_interruption()
    try:
        press(signal.SIGTERM)
    except KeyboardInterrupt:
        pass  # as a library does
    try:
        raise_interruption()
        raise SystemExit("went on")
    except KeyboardInterrupt:
        assert interrupting_signal() == signal.SIGTERM
    try:
        press(signal.SIGINT)
    except KeyboardInterrupt:
        assert interrupting_signal() == signal.SIGTERM  # the first one counts
assert interrupting_signal() is None
raise_interruption()
""")
    assert done.returncode == 0, done.stderr


def test_an_ignored_sigterm_stays_ignored() -> None:
    done = run("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with signals_interrupt() as interruption:
    press(signal.SIGTERM)
    assert interruption.number is None
""")
    assert done.returncode == 0, done.stderr


def test_handlers_that_a_library_sets_are_taken_back() -> None:
    """As Ray's, which ends the process with code 15."""
    done = run("""
with signals_interrupt() as interruption:
    with keeping_handlers():
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(number))
    try:
        press(signal.SIGTERM)
    except KeyboardInterrupt:
        pass
    assert interruption.number == signal.SIGTERM
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_end_of_the_cleaning(number: str) -> None:
    done = run(f"""
cleaned = False
try:
    with signals_interrupt() as interruption:
        with uninterrupted():
            press(signal.{number})
            press(signal.{number})
            cleaned = True
        raise SystemExit("went on")
except KeyboardInterrupt:
    assert interruption.number == signal.{number}
assert cleaned
""")
    assert done.returncode == 0, done.stderr


CHILD = """
import time
from hipa_deploy.interrupts import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(120)
"""
PARENT = """
import subprocess, sys, time
pipe = subprocess.PIPE
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=pipe, stdout=pipe)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(120)
"""
# As on systems that have no prctl.
WITHOUT_PRCTL = "import sys; sys.platform = 'other'\n"


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("before", ["", WITHOUT_PRCTL])
def test_a_child_dies_with_a_parent_that_was_killed(before: str) -> None:
    child = before + CHILD
    command = [sys.executable, "-c", PARENT, child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    alive = is_alive(pid)
    if alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def test_a_child_of_a_living_parent_ends_normally() -> None:
    code = "from hipa_deploy.interrupts import die_with_parent; die_with_parent(); print('done')"
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
        assert process.wait() == 0
