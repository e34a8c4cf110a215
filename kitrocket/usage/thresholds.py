"""Thresholds of limits: told once, by whichever call is the first to see that calls have used so much."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.models import Limit, UsageAlert, Value
from kitrocket.sql import statements
from kitrocket.usage.limits import Quota

_SQL = statements("quotas")
_log = logging.getLogger("kitrocket.usage")

#: By how many points the use of a sliding window must fall below a threshold before that fires again.
_REARM = 10

#: What is told that a threshold was crossed: a function, or one to be awaited.
OnThreshold = Callable[[UsageAlert], object]


class Watch(Value):
    """Which thresholds of which limits are looked at, as a reservation remembers it for its settlement."""

    limits: list[Limit]
    percents: list[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """When a threshold of a quota had fired, by its name and percentage."""

    fired_at: Mapping[tuple[str, int], datetime]


class Thresholds:
    """Notes what was crossed in ``kitrocket.usage_alerts``, whose key lets one call win, and tells it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hooks: list[OnThreshold] = []

    def add(self, hook: OnThreshold) -> None:
        """Tell ``hook`` too."""
        self._hooks.append(hook)

    async def seen(self, user_id: str, quotas: Sequence[Quota]) -> Seen:
        """Read what has fired. It must be read before the calls are counted: then these are among them."""
        keys, starts = [quota.key for quota in quotas], [quota.period_start for quota in quotas]
        rows = await self._engine.fetch(_SQL["alerts"], user_id, keys, starts)
        return Seen({(row["quota"], row["percent"]): row["fired_at"] for row in rows})

    async def note(
        self,
        user_id: str,
        quotas: Sequence[Quota],
        used: Sequence[int],
        percents: Sequence[int],
        *,
        seen: Seen,
        now: datetime,
    ) -> list[UsageAlert]:
        """Note what was crossed, and return what nobody noted before; let fire again what has fallen far enough."""
        wanted = {
            (quota.key, percent): (quota, some)
            for quota, some in zip(quotas, used, strict=True)
            for percent in percents
        }
        crossed = [
            (key, percent, quota.period_start)
            for (key, percent), (quota, some) in wanted.items()
            if some * 100 >= quota.tokens * percent and (key, percent) not in seen.fired_at
        ]
        low = [
            (key, percent, seen.fired_at[key, percent])
            for (key, percent), (quota, some) in wanted.items()
            if isinstance(quota.window, timedelta)
            and (key, percent) in seen.fired_at
            and some * 100 < quota.tokens * (percent - _REARM)
        ]
        if low:
            await self._engine.fetch(_SQL["rearm"], user_id, *map(list, zip(*low, strict=True)))
        if not crossed:
            return []
        rows = await self._engine.fetch(_SQL["fire"], user_id, *map(list, zip(*crossed, strict=True)), to_db(now))
        won = {(row["quota"], row["percent"]) for row in rows}
        return [
            UsageAlert(user_id=user_id, limit=quota.tokens, window=quota.window, percent=key[1], used=some, at=now)
            for key, (quota, some) in wanted.items()
            if key in won
        ]

    async def tell(self, alerts: Sequence[UsageAlert]) -> list[int]:
        """Tell every hook of what was committed, and return the percentages. A hook that fails is logged."""
        for alert in alerts:
            for hook in self._hooks:
                try:
                    answer = hook(alert)
                    if inspect.isawaitable(answer):
                        await answer
                except Exception:  # noqa: BLE001 - whatever a hook raises, the tokens are reserved or recorded
                    _log.exception("a function told of a threshold failed")
        return sorted({alert.percent for alert in alerts})
