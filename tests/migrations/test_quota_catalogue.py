"""The tables of quotas, as PostgreSQL's catalogue has them: a Piccolo class knows one of the three."""

from __future__ import annotations

import pytest
from catalogue import columns, constraints, indexes

from kitrocket.engine import Engine

pytestmark = pytest.mark.asyncio

CASCADE = "FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE"
TABLES = ("usage_alerts", "usage_quotas", "usage_reservations")


async def test_the_tables_of_quotas_are_these(engine: Engine) -> None:
    async with engine.direct() as connection:
        found = [(row[0], row[2], row[3], row[4]) for row in await columns(connection, "kitrocket") if row[0] in TABLES]
        rules = [(row[0], row[1], row[3]) for row in await constraints(connection, "kitrocket") if row[0] in TABLES]
        served = [(row[1], row[3]) for row in await indexes(connection, "kitrocket") if row[0] in TABLES]
    assert found == [
        ("usage_alerts", "user_id", "text", True),
        ("usage_alerts", "quota", "text", True),
        ("usage_alerts", "percent", "integer", True),
        ("usage_alerts", "period_start", "timestamp without time zone", True),
        ("usage_alerts", "fired_at", "timestamp without time zone", True),
        ("usage_quotas", "user_id", "text", True),
        ("usage_quotas", "touched_at", "timestamp without time zone", True),
        ("usage_reservations", "id", "text", True),
        ("usage_reservations", "user_id", "text", True),
        ("usage_reservations", "model", "text", True),
        ("usage_reservations", "tokens", "integer", True),
        ("usage_reservations", "used", "integer", True),
        ("usage_reservations", "created_at", "timestamp without time zone", True),
        ("usage_reservations", "expires_at", "timestamp without time zone", True),
        ("usage_reservations", "thresholds", "jsonb", False),
    ]
    assert rules == [
        ("usage_alerts", "usage_alerts_pkey", "PRIMARY KEY (user_id, quota, percent, period_start)"),
        ("usage_alerts", "usage_alerts_user_id_users_id_fk", CASCADE),
        ("usage_quotas", "usage_quotas_pkey", "PRIMARY KEY (user_id)"),
        ("usage_quotas", "usage_quotas_user_id_users_id_fk", CASCADE),
        ("usage_reservations", "usage_reservations_pkey", "PRIMARY KEY (id)"),
        ("usage_reservations", "usage_reservations_user_id_fkey", CASCADE),
    ]
    assert served == [
        ("usage_alerts_pkey", True),
        ("usage_quotas_pkey", True),
        ("usage_reservations_pkey", True),
        ("usage_reservations_user_id", True),
    ]
