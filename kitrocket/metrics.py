"""What ``kitrocket serve`` tells Prometheus, in its text format: numbers alone, of nobody in particular."""

from __future__ import annotations

from datetime import timedelta

from kitrocket.kit import KitRocket


async def measure(kit: KitRocket) -> str:
    """Return the metrics as they are now. Raises as the services do when the database cannot answer."""
    backlog = await kit.usage.export_backlog()
    age = timedelta(0) if backlog.oldest_at is None else kit.clock() - backlog.oldest_at
    gauges = (
        ("usage_export_pending", "Calls that the provider does not have yet.", backlog.pending),
        ("usage_export_waiting", "Those of them whose user is no customer yet.", backlog.waiting),
        ("usage_export_parked", "Calls that the provider refused.", backlog.parked),
        (
            "usage_export_oldest_seconds",
            "The age of the oldest pending call that waits for more than its user's customer.",
            round(max(age.total_seconds(), 0.0), 3),
        ),
    )
    return "".join(
        f"# HELP kitrocket_{name} {meaning}\n# TYPE kitrocket_{name} gauge\nkitrocket_{name} {value}\n"
        for name, meaning, value in gauges
    )
