"""Rows of tables that several services read, as models."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import asyncpg

from kitrocket.clock import from_db
from kitrocket.models import Account, User


def user_from_row(row: asyncpg.Record | dict[str, Any]) -> User:
    """Return the user whose columns stand in a row, under their own names."""
    return User(
        id=row["id"],
        email=row["email"],
        name=row["name"],
        email_verified=_optional(row["email_verified"]),
        avatar=row["avatar"],
        created_at=from_db(row["created_at"]),
        updated_at=from_db(row["updated_at"]),
    )


def account_from_row(row: asyncpg.Record | dict[str, Any]) -> Account:
    """Return the account whose columns stand in a row, with ``has_password`` in the place of the password."""
    return Account(
        id=row["id"],
        user_id=row["user_id"],
        provider=row["provider"],
        provider_account_id=row["provider_account_id"],
        expires_at=_optional(row["expires_at"]),
        has_password=row["has_password"],
        created_at=from_db(row["created_at"]),
    )


def _optional(stored: datetime | None) -> datetime | None:
    return None if stored is None else from_db(stored)
