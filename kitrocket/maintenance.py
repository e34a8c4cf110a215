"""Background work: a tick, again and again."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio

_log = logging.getLogger(__name__)

#: How long to pause while a tick says that there is more to do, in seconds.
_PAUSE = 1.0


async def run_every(
    name: str,
    tick: Callable[[], Awaitable[object]],
    interval: timedelta,
    *,
    jitter: float = 0.1,
    sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> None:
    """Await ``tick()`` at once and then every ``interval``, give or take ``jitter`` of it, until cancelled.

    A tick whose result has a true ``more`` is followed by the next one after a second. A tick that fails is logged, and
    the next one comes as usual. An interval of zero means never. ``sleep`` and ``uniform`` are there for tests.
    """
    seconds = interval.total_seconds()
    if seconds <= 0:
        return
    while True:
        more = False
        try:
            more = bool(getattr(await tick(), "more", False))
        except Exception:  # noqa: BLE001 - whatever a tick raises, the next one runs
            _log.exception("%s failed; it runs again in about %g s", name, seconds)
        await sleep(_PAUSE if more else seconds * uniform(1 - jitter, 1 + jitter))
