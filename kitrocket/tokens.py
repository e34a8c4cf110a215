"""Session tokens: made here, shown once, and stored as a digest."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Literal

from kitrocket.ids import random_text

#: How tokens are stored: as digests; plain, as Better Auth has them; digests written and both accepted.
TokenStorage = Literal["digest", "plain", "digest+plain"]

_TOKEN = re.compile("[A-Za-z0-9]{32}")


def new_token() -> str:
    """Return a new session token: 32 random characters ``[A-Za-z0-9]``, 190 bits."""
    return random_text(32)


def is_possible(token: str) -> bool:
    """Whether ``token`` can be a session token at all. A stored digest, ``k1$…``, never is one."""
    return _TOKEN.fullmatch(token) is not None


def digest(token: str) -> str:
    """Return what is stored for a token: ``k1$`` and 64 hexadecimal digits of its SHA-256.

    No salt: the token is random, and the digest is what it is looked up by.
    """
    return "k1$" + sha256(token.encode()).hexdigest()


def stored_forms(token: str, storage: TokenStorage) -> tuple[str, ...]:
    """Return what a token may be stored as; the first is how it is written."""
    if storage == "plain":
        return (token,)
    return (digest(token),) if storage == "digest" else (digest(token), token)
