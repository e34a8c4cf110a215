"""Rows written straight into the tables, for tests whose subject is something else. Each returns the row's id.

Every column is written; times are timezone-aware and default to :data:`AT`, the instant at which a ``ManualClock``
begins.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

from kitrocket.clock import to_db
from kitrocket.engine import Engine

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)

_numbers = itertools.count(1)


def _db(instant: datetime | None) -> datetime | None:
    return None if instant is None else to_db(instant)


async def make_user(
    engine: Engine,
    *,
    id: str | None = None,
    email: str | None = None,
    name: str = "Ada",
    email_verified: datetime | None = None,
    avatar: str | None = None,
    at: datetime = AT,
) -> str:
    number = next(_numbers)
    id = id or f"user_{number}"
    await engine.fetch(
        "INSERT INTO users (id, email, name, email_verified, avatar, created_at, updated_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $6)",
        id,
        email or f"user{number}@example.com",
        name,
        _db(email_verified),
        avatar,
        to_db(at),
    )
    return id


async def make_account(
    engine: Engine,
    user_id: str,
    *,
    id: str | None = None,
    provider: str = "github",
    provider_account_id: str | None = None,
    access_token: str | None = None,
    refresh_token: str | None = None,
    expires_at: datetime | None = None,
    password: str | None = None,
    at: datetime = AT,
) -> str:
    number = next(_numbers)
    id = id or f"account_{number}"
    if provider_account_id is None:
        provider_account_id = user_id if provider == "credential" else str(number)
    await engine.fetch(
        "INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token, refresh_token, expires_at,"
        " password, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        id,
        user_id,
        provider,
        provider_account_id,
        access_token,
        refresh_token,
        _db(expires_at),
        password,
        to_db(at),
    )
    return id


async def make_session(
    engine: Engine,
    user_id: str,
    *,
    id: str | None = None,
    token: str | None = None,
    expires_at: datetime = AT + timedelta(days=7),
    ip_address: str | None = None,
    user_agent: str | None = None,
    at: datetime = AT,
) -> str:
    """``token`` is what the column holds."""
    number = next(_numbers)
    id = id or f"session_{number}"
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at, ip_address, user_agent, created_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        id,
        user_id,
        token or f"stored-token-{number}",
        to_db(expires_at),
        ip_address,
        user_agent,
        to_db(at),
    )
    return id


async def make_subscription(
    engine: Engine,
    user_id: str,
    *,
    id: str | None = None,
    plan: str = "pro",
    status: str = "active",
    dodo_customer_id: str | None = None,
    dodo_subscription_id: str | None = None,
    current_period_end: datetime | None = None,
    at: datetime = AT,
) -> str:
    id = id or f"subscription_{next(_numbers)}"
    await engine.fetch(
        "INSERT INTO subscriptions (id, user_id, plan, status, dodo_customer_id, dodo_subscription_id,"
        " current_period_end, created_at, updated_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)",
        id,
        user_id,
        plan,
        status,
        dodo_customer_id,
        dodo_subscription_id,
        _db(current_period_end),
        to_db(at),
    )
    return id


async def make_usage(
    engine: Engine,
    user_id: str,
    *,
    id: str | None = None,
    tokens: int = 1,
    model: str = "claude-sonnet-4-20250514",
    at: datetime = AT,
) -> str:
    id = id or f"usage_{next(_numbers)}"
    await engine.fetch(
        "INSERT INTO usage (id, user_id, tokens_used, model, created_at) VALUES ($1, $2, $3, $4, $5)",
        id,
        user_id,
        tokens,
        model,
        to_db(at),
    )
    return id


async def make_mirror(
    engine: Engine,
    subscription_id: str,
    *,
    user_id: str | None = None,
    plan: str = "pro",
    status: str = "active",
    at: datetime = AT,
) -> str:
    """A snapshot in ``kitrocket.dodo_subscriptions``, which makes ``subscription_id`` a known one."""
    await engine.fetch(
        "INSERT INTO kitrocket.dodo_subscriptions (subscription_id, user_id, customer_id, product_id, plan, status,"
        " created_at, cancel_at_next_billing_date, trial_period_days, started, event_at, event_key, needs_check,"
        " version, dispute_open, charged, charge_failed)"
        " VALUES ($1, $2, $3, 'pdt_1', $4, $5, $6, false, 0, true, $6, '', false, 1, false, false, false)",
        subscription_id,
        user_id,
        f"cus_{next(_numbers)}",
        plan,
        status,
        to_db(at),
    )
    return subscription_id
