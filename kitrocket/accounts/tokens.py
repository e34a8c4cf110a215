"""Providers and their tokens, checked and encrypted before they are stored."""

from __future__ import annotations

import re
from datetime import datetime

from kitrocket import inputs
from kitrocket.clock import to_db
from kitrocket.encryption import TokenCipher
from kitrocket.errors import InvalidInputError

#: The longest OAuth token, in bytes.
TOKEN_MAX = 16 * 1024

#: Access token, refresh token and expiry, as the columns hold them.
SealedTokens = tuple[str | None, str | None, datetime | None]

_PROVIDER = re.compile("[a-z0-9_-]{1,64}")


def checked_provider(value: object) -> str:
    """Return the name of an OAuth provider."""
    provider = inputs.text("provider", value, max=64, pattern=_PROVIDER)
    if provider == "credential":
        raise InvalidInputError(
            "provider", "a credential account comes with a password", "the name of an OAuth provider"
        )
    return provider


def sealed(
    cipher: TokenCipher, access_token: object, refresh_token: object, expires_at: object, now: datetime
) -> SealedTokens:
    """Return tokens as they are stored; ``None`` stays ``None``."""
    return (
        cipher.encrypt(_token("access_token", access_token), now),
        cipher.encrypt(_token("refresh_token", refresh_token), now),
        None if expires_at is None else to_db(inputs.instant("expires_at", expires_at)),
    )


def _token(field: str, value: object) -> str | None:
    if value is None:
        return None
    token = inputs.text(field, value, max=TOKEN_MAX)
    if len(token.encode()) > TOKEN_MAX:
        raise InvalidInputError(field, "it is too long", f"text of at most {TOKEN_MAX} bytes")
    return token
