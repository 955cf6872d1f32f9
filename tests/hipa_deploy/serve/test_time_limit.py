"""A time limit without a task."""

from __future__ import annotations

import asyncio

import pytest

from hipa_deploy.serve.time_limit import LateError, TimeLimit


def test_what_ends_in_time() -> None:
    async def run() -> str:
        with TimeLimit(60):
            await asyncio.sleep(0)
            return "done"

    assert asyncio.run(run()) == "done"


@pytest.mark.parametrize("seconds", [0.02, 0, -1])
def test_what_is_late(seconds: float) -> None:
    async def run() -> str:
        with pytest.raises(LateError), TimeLimit(seconds):
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)  # nothing of the cancellation is left
        return "goes on"

    assert asyncio.run(run()) == "goes on"


def test_an_error_of_the_block_stays() -> None:
    async def run() -> None:
        with TimeLimit(60):
            raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(run())


def test_a_cancellation_from_outside_stays_one() -> None:
    async def run() -> bool:
        async def limited() -> None:
            with TimeLimit(60):
                await asyncio.sleep(60)

        task = asyncio.create_task(limited())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(run())


def test_a_block_within_a_block() -> None:
    async def run() -> str:
        with TimeLimit(60):
            with pytest.raises(LateError), TimeLimit(0.01):
                await asyncio.sleep(60)
            return "outer"

    assert asyncio.run(run()) == "outer"
