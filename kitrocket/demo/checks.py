"""What the services say, held against what was planned and against plain SQL on a connection of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TypeAlias

import asyncpg

from kitrocket.clock import from_db, to_db
from kitrocket.demo.delivery import Tally
from kitrocket.demo.lifecycles import Event, Expected, Person
from kitrocket.demo.traffic import (
    EXPIRED_SESSIONS,
    USAGE_REPEATED,
    USAGE_ROWS,
    USAGE_WINDOW,
    SessionFigures,
    SignIns,
    UsageFigures,
    due_sessions,
    planned_totals,
    prices,
)
from kitrocket.kit import KitRocket
from kitrocket.models import UsageEntry

#: A plain connection. (A text, because the class takes no parameter when it runs.)
Raw: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_ROWS = """
SELECT s.user_id, s.status, s.plan, s.current_period_end FROM subscriptions s
"""
_FINGERPRINT = """
SELECT md5(coalesce(string_agg(s::text, '|' ORDER BY s.id), '')) || (SELECT count(*) FROM kitrocket.webhook_events)
FROM subscriptions s
"""
_USAGE_BY_USER = """
SELECT user_id, sum(tokens_used)::bigint AS tokens, count(*) AS calls FROM usage WHERE created_at >= $1 GROUP BY user_id
"""
_COST_BY_MODEL = """
SELECT u.model, sum(u.tokens_used * p.per_million / 1000000) AS cost
FROM usage u
JOIN kitrocket.model_prices p ON p.model = u.model AND p.currency = 'USD' AND p.valid_from = (
    SELECT max(valid_from) FROM kitrocket.model_prices
    WHERE model = u.model AND currency = 'USD' AND valid_from <= u.created_at
)
WHERE u.created_at >= $1
GROUP BY u.model
"""
_USAGE_BY_MODEL = """
SELECT model, sum(tokens_used)::bigint AS tokens FROM usage WHERE created_at >= $1 GROUP BY model
"""


@dataclass
class Checks:
    """Figures compared; the failed ones say what was found and what was expected."""

    made: int = 0
    failed: list[str] = field(default_factory=list)

    def equal(self, what: str, found: object, expected: object) -> bool:
        """Compare a figure, remember a difference, and return whether it was as expected."""
        self.made += 1
        if found != expected:
            self.failed.append(f"{what}: found {found}, expected {expected}")
        return found == expected


@dataclass(frozen=True)
class SubscriptionLine:
    """A user's subscription as the services show it."""

    person: Person
    status: str | None
    plan: str | None
    until: datetime | None
    allowed: bool
    reason: str


@dataclass(frozen=True)
class UsageLine:
    """A user's, or a model's, last 30 days: by the service and by plain SQL."""

    name: str
    calls: int
    tokens: int
    raw: int


async def fingerprint(raw: Raw) -> str:
    """Return a text that changes when any subscription or the number of stored deliveries does."""
    return str(await raw.fetchval(_FINGERPRINT))


async def check_people(checks: Checks, raw: Raw, people: Sequence[Person], signed_in: SignIns) -> None:
    """Compare users, credential accounts, and who was let in."""
    checks.equal("users stored", await raw.fetchval("SELECT count(*) FROM users"), len(people))
    hashed = "SELECT count(*) FROM accounts WHERE provider = 'credential' AND password LIKE '$argon2id$%'"
    checks.equal("passwords stored as argon2id", await raw.fetchval(hashed), len(people))
    checks.equal("right sign-ins let in", signed_in.welcomed, 4)
    checks.equal("wrong sign-ins refused", signed_in.refused, 3)


async def check_deliveries(checks: Checks, raw: Raw, events: Sequence[Event], counts: Tally) -> None:
    """Compare statuses and outcomes: each event counted once, its second delivery a duplicate."""
    checks.equal("deliveries answered 200", counts.statuses[200], 2 * len(events))
    checks.equal("second deliveries known as duplicates", counts.second["duplicate"], len(events))
    checks.equal("outcomes that no order of arrival explains", counts.surprises, [])
    stored = await raw.fetchrow("SELECT count(*) AS events, sum(deliveries) AS times FROM kitrocket.webhook_events")
    checks.equal("events in the inbox", stored and stored["events"], len(events))
    checks.equal("deliveries counted in the inbox", stored and stored["times"], 2 * len(events))


async def check_subscriptions(
    checks: Checks, kit: KitRocket, raw: Raw, people: Sequence[Person], expected: Mapping[str, Expected]
) -> list[SubscriptionLine]:
    """Compare each user's row, by service and by SQL, and access with what the story says."""
    rows = {row["user_id"]: row for row in await raw.fetch(_ROWS)}
    lines = []
    for person in people:
        wanted = expected[person.id]
        found = await kit.users.get_with_subscription(person.id)
        shown = found.subscription if found else None
        checks.equal(f"{person.name}'s subscription, read alone", await kit.subscriptions.get(person.id), shown)
        row = rows.pop(person.id, None)
        columns = (wanted.status, wanted.plan, wanted.period_end)
        end = row["current_period_end"] if row else None
        stored = (row["status"], row["plan"], end and from_db(end)) if row else (None, None, None)
        checks.equal(f"{person.name}'s row", _texts(*stored), _texts(*columns))
        seen = (shown.status, shown.plan, shown.current_period_end) if shown else (None, None, None)
        checks.equal(f"{person.name}'s subscription", _texts(*seen), _texts(*columns))
        access = await kit.subscriptions.access(person.id)
        answer = _texts(access.allowed, access.reason, access.until, access.status, access.plan)
        story = _texts(wanted.allowed, wanted.reason, wanted.until, wanted.status, wanted.plan)
        checks.equal(f"{person.name}'s access", answer, story)
        lines.append(SubscriptionLine(person, access.status, access.plan, access.until, access.allowed, access.reason))
    checks.equal("subscription rows of nobody in the story", list(rows), [])
    return lines


async def check_sessions(checks: Checks, raw: Raw, figures: SessionFigures) -> None:
    """Compare what was swept, what slid, and what is left."""
    checks.equal("sessions that slid when due", figures.slid, due_sessions())
    checks.equal("sessions that slid a second time", figures.slid_again, 0)
    checks.equal("junk tokens and stored digests accepted", figures.junk_accepted, 0)
    checks.equal("expired sessions swept", figures.swept.deleted, EXPIRED_SESSIONS)
    checks.equal("expired sessions left behind", figures.swept.more, False)
    checks.equal("live sessions refused during the sweep", figures.lost, 0)
    checks.equal("validations while sweeping", figures.during_sweep > 0, True)
    checks.equal("sessions left in the table", await raw.fetchval("SELECT count(*) FROM sessions"), figures.live)


@dataclass(frozen=True)
class CostSeen:
    """What a model cost, by the service and by plain SQL."""

    model: str
    cost: Decimal
    raw: Decimal


async def check_usage(
    checks: Checks,
    kit: KitRocket,
    raw: Raw,
    people: Sequence[Person],
    entries: Sequence[UsageEntry],
    figures: UsageFigures,
) -> tuple[list[UsageLine], list[UsageLine]]:
    """Compare counts and 30-day totals: planned, by the service, by plain SQL. Return lines by user and by model."""
    checks.equal("calls recorded", figures.recorded, USAGE_ROWS)
    checks.equal("calls sent again and known", figures.repeated + figures.repeated_in_bulk, USAGE_REPEATED)
    checks.equal("usage rows", await raw.fetchval("SELECT count(*) FROM usage"), USAGE_ROWS)
    since = kit.clock() - USAGE_WINDOW
    by_user, by_model = planned_totals(entries, since)
    rows = {row["user_id"]: row for row in await raw.fetch(_USAGE_BY_USER, to_db(since))}
    users = []
    for person in people:
        row = rows.get(person.id)
        line = UsageLine(
            person.name, row["calls"] if row else 0, await kit.usage.total(person.id), row["tokens"] if row else 0
        )
        checks.equal(f"{person.name}'s tokens in 30 days", (line.tokens, line.raw), (by_user[person.id],) * 2)
        days = await kit.usage.breakdown(person.id, by="day", since=since)
        checks.equal(f"{person.name}'s tokens, day by day", sum(day.tokens for day in days), line.tokens)
        users.append(line)
    await _check_top(checks, kit, since, rows)
    return users, await _by_model(checks, kit, raw, people, by_model, since)


async def check_cost(checks: Checks, kit: KitRocket, raw: Raw) -> list[CostSeen]:
    """Set dated prices, then compare what 30 days cost by model: by the service, by plain SQL a row at a time."""
    since = kit.clock() - USAGE_WINDOW
    await kit.usage.set_prices(prices(kit.clock()))
    report = await kit.usage.cost(since=since, by="model")
    rows = {row["model"]: row["cost"] for row in await raw.fetch(_COST_BY_MODEL, to_db(since))}
    seen = [CostSeen(line.model or "", line.cost, rows.get(line.model, Decimal(0))) for line in report.lines]
    for line in seen:
        checks.equal(f"cost of {line.model}", line.cost, line.raw)
    checks.equal("cost of all models", report.total, round(sum(rows.values(), Decimal(0)), 2))
    return seen


async def _check_top(checks: Checks, kit: KitRocket, since: datetime, rows: Mapping[str, asyncpg.Record]) -> None:
    top = await kit.usage.top_users(since=since, limit=5)
    ranked = sorted(rows.values(), key=lambda row: (-row["tokens"], row["user_id"]))[:5]
    checks.equal("the five with most tokens", [user.user_id for user in top], [row["user_id"] for row in ranked])


async def _by_model(
    checks: Checks,
    kit: KitRocket,
    raw: Raw,
    people: Sequence[Person],
    planned: Mapping[str, int],
    since: datetime,
) -> list[UsageLine]:
    tokens: dict[str, int] = {}
    calls: dict[str, int] = {}
    for person in people:
        for bucket in await kit.usage.breakdown(person.id, by="model", since=since):
            assert bucket.model is not None
            tokens[bucket.model] = tokens.get(bucket.model, 0) + bucket.tokens
            calls[bucket.model] = calls.get(bucket.model, 0) + bucket.calls
    rows = {row["model"]: row["tokens"] for row in await raw.fetch(_USAGE_BY_MODEL, to_db(since))}
    for model in sorted(planned):
        checks.equal(f"tokens of {model}", (tokens.get(model), rows.get(model)), (planned[model],) * 2)
    ordered = sorted(planned, key=lambda model: -tokens.get(model, 0))
    return [UsageLine(model, calls.get(model, 0), tokens.get(model, 0), rows.get(model, 0)) for model in ordered]


def _texts(*values: object) -> tuple[str, ...]:
    """Write values as a person reads them, so that a difference can be read too."""
    return tuple(f"{value:%Y-%m-%d %H:%M:%S.%f}" if isinstance(value, datetime) else str(value) for value in values)
