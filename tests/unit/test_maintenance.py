from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta

import anyio
import pytest

from kitrocket.maintenance import run_every
from kitrocket.models import SweepResult

pytestmark = pytest.mark.asyncio

INTERVAL = timedelta(seconds=300)


class Enough(BaseException):
    """Ends a loop that has no end."""


class Loop:
    """Ticks that were asked for in advance, and the pauses between them."""

    def __init__(self, *results: object) -> None:
        self.results: Iterator[object] = iter(results)
        self.ticks = 0
        self.pauses: list[float] = []
        self.rest = len(results)

    async def tick(self) -> object:
        self.ticks += 1
        result = next(self.results)
        if isinstance(result, Exception):
            raise result
        return result

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if self.ticks == self.rest:
            raise Enough

    async def run(self, interval: timedelta = INTERVAL) -> None:
        with pytest.raises(Enough):
            await run_every("work", self.tick, interval, sleep=self.sleep, uniform=lambda low, high: high)


async def test_the_first_tick_comes_at_once_and_the_others_after_the_interval() -> None:
    loop = Loop(None, None, None)
    await loop.run()
    assert loop.ticks == 3
    assert loop.pauses == pytest.approx([330, 330, 330])


async def test_the_pause_is_the_interval_give_or_take_a_tenth() -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    loop = Loop(None)
    with pytest.raises(Enough):
        await run_every("work", loop.tick, INTERVAL, sleep=loop.sleep, uniform=uniform)
    assert bounds == [(pytest.approx(0.9), pytest.approx(1.1))]
    assert loop.pauses == pytest.approx([270])


async def test_more_to_do_is_done_after_a_second() -> None:
    more, done = SweepResult(deleted=5, batches=1, more=True), SweepResult(deleted=1, batches=1, more=False)
    loop = Loop(more, more, done)
    await loop.run()
    assert loop.pauses == pytest.approx([1, 1, 330])


async def test_a_failing_tick_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(None, ValueError("broken"), None)
    with caplog.at_level(logging.ERROR, logger="kitrocket.maintenance"):
        await loop.run()
    assert loop.ticks == 3
    assert loop.pauses == pytest.approx([330, 330, 330])
    (record,) = caplog.records
    assert "work failed" in record.message
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_an_interval_of_zero_means_never() -> None:
    loop = Loop(None)
    await run_every("work", loop.tick, timedelta(0), sleep=loop.sleep)
    assert loop.ticks == 0


async def test_cancellation_passes_in_a_tick_and_between_ticks() -> None:
    ticked = anyio.Event()

    async def endless() -> None:
        ticked.set()
        await anyio.sleep_forever()

    async def quick() -> None:
        ticked.set()

    for tick in (endless, quick):
        ticked = anyio.Event()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(run_every, "work", tick, INTERVAL)
                await ticked.wait()
                group.cancel_scope.cancel()
