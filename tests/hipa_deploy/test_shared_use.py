"""Calls share, a change is alone and does not wait for ever."""

from __future__ import annotations

import threading

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.shared_use import SharedUse
from tests.threads import in_threads


def test_calls_share() -> None:
    use = SharedUse()
    meeting = threading.Barrier(8, timeout=10)

    def call(number: int) -> None:
        with use.shared():
            meeting.wait()  # all eight are inside

    in_threads(call)


def test_a_change_is_alone() -> None:
    use = SharedUse()
    inside: list[str] = []

    def call_or_change(number: int) -> None:
        for _ in range(200):
            if number < 2:
                with use.alone():
                    assert not inside
                    inside.append("change")
                    inside.remove("change")
            else:
                with use.shared():
                    assert "change" not in inside
                    inside.append("call")
                    inside.remove("call")

    in_threads(call_or_change)


def test_a_change_that_waits_goes_before_later_calls() -> None:
    use = SharedUse()
    order: list[str] = []
    wanted = threading.Event()

    def change() -> None:
        wanted.set()
        with use.alone():
            order.append("change")

    def call() -> None:
        with use.shared():
            order.append("later call")

    with use.shared():
        changer = threading.Thread(target=change)
        changer.start()
        wanted.wait()
        while not use._change_wanted:
            pass
        caller = threading.Thread(target=call)
        caller.start()
        with use.shared():  # a call within the call does not wait for the change
            order.append("inner call")
    changer.join()
    caller.join()
    assert order == ["inner call", "change", "later call"]


def test_a_change_inside_a_call_is_an_error_and_no_deadlock() -> None:
    use = SharedUse()
    with (
        use.shared(),
        pytest.raises(HipaError, match="from inside one of its own calls"),
        use.alone(),
    ):
        pass
    with use.alone():
        pass


def test_what_fails_gives_the_lock_back() -> None:
    use = SharedUse()
    for hold in (use.shared, use.alone):
        with pytest.raises(ZeroDivisionError), hold():
            raise ZeroDivisionError
    with use.alone():
        pass
