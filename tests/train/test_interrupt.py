from __future__ import annotations

import os
import signal
import threading

import pytest

from hipa_deploy.train.interrupt import interruptible


def test_sigterm_stops_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_under_a_launcher_the_second_interrupt_waits_too() -> None:
    with interruptible(patient=True) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(1)


def test_second_interrupt_is_immediate() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(1)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
