"""The ids that kitrocket makes: text, made in Python, never by the database."""

from __future__ import annotations

import secrets
import string
from datetime import datetime

_ALPHABET = string.ascii_letters + string.digits
#: The largest multiple of 62 below 256. Bytes from here on are thrown away, or the first letters would come up more.
_UNBIASED = 256 - 256 % len(_ALPHABET)


def random_text(length: int) -> str:
    """Return ``length`` random characters of ``[A-Za-z0-9]`` (5.95 bits each) from the system's secure source."""
    text = ""
    while len(text) < length:
        spare = secrets.token_bytes(2 * (length - len(text)))
        text += "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in spare if byte < _UNBIASED)
    return text[:length]


def new_id() -> str:
    """Return a random id of 32 characters ``[A-Za-z0-9]``, the form Better Auth uses."""
    return random_text(32)


def new_usage_id(now: datetime) -> str:
    """Return a UUIDv7 (RFC 9562, section 5.7) for the instant ``now``: 48 bits of Unix milliseconds, 74 random ones.

    Time-ordered keys keep inserts at the right edge of the primary key's index.
    """
    milliseconds = int(now.timestamp() * 1000) & ((1 << 48) - 1)
    random_bits = secrets.randbits(74)
    value = milliseconds << 80 | 0x7 << 76 | (random_bits >> 62) << 64 | 0b10 << 62 | random_bits & ((1 << 62) - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
