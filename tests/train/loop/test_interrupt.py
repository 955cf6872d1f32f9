"""The signals go to new processes: in the tests' own they would stop the tests."""

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
