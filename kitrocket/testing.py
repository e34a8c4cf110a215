"""A pytest plugin for applications that use kitrocket, and what their tests need: a clock to set, signed webhooks.

Installed with kitrocket; a test asks for a fixture by name and nothing happens before that.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class ManualClock:
    """A :data:`~kitrocket.clock.Clock` that stands still until it is told to move."""

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        if now.tzinfo is None:
            raise ValueError("the clock needs a timezone-aware datetime")
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta) -> datetime:
        """Move the clock by a duration, which may be negative, and return the new instant."""
        self.now += by
        return self.now
