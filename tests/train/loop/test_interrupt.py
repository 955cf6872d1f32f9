"""Signals go to processes of their own: a test's own process has other things to do with them."""

from __future__ import annotations

import subprocess
import sys
import threading

from hipa_deploy.train.loop.interrupt import interruptible

PREAMBLE = """
import os, signal
from hipa_deploy.train.loop.interrupt import interruptible

def press(number):
    os.kill(os.getpid(), number)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], capture_output=True, text=True, timeout=60
    )


def test_sigterm_stops_as_an_interrupt_does() -> None:
    done = run("""
before = signal.getsignal(signal.SIGTERM)
with interruptible() as stop:
    press(signal.SIGTERM)
    assert stop.wait(1)
assert signal.getsignal(signal.SIGTERM) is before
""")
    assert done.returncode == 0, done.stderr


def test_under_a_launcher_the_second_interrupt_waits_too() -> None:
    done = run("""
with interruptible(patient=True) as stop:
    for _ in range(3):
        press(signal.SIGINT)
    assert stop.wait(1)
""")
    assert done.returncode == 0, done.stderr


def test_second_interrupt_is_immediate() -> None:
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


def test_interruptible_outside_the_main_thread() -> None:
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
