"""AI token usage: one row a call, counted exactly once, summed over any window."""

from kitrocket.usage.calls import FUTURE_LIMIT
from kitrocket.usage.metering import Meter
from kitrocket.usage.service import UsageService

__all__ = ["FUTURE_LIMIT", "Meter", "UsageService"]
