"""The ids that kitrocket makes: text, made in Python, never by the database."""

from __future__ import annotations

import secrets
import string
from datetime import datetime

_ALPHABET = string.ascii_letters + string.digits
#: The character that each byte becomes, and the bytes that are thrown away: 256 is no multiple of 62, so with them the
#: first characters would come up more.
_LETTERS = (_ALPHABET * 5)[:256].encode()
_BIASED = bytes(range(256 - 256 % len(_ALPHABET), 256))

#: A hexadecimal digit → the one with its last two bits that says that a UUID is laid out as in RFC 9562, section 4.1.
_VARIANT = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))


def random_text(length: int) -> str:
    """Return ``length`` random characters of ``[A-Za-z0-9]`` (5.95 bits each) from the system's secure source."""
    text = b""
    while len(text) < length:
        text += secrets.token_bytes(2 * (length - len(text))).translate(_LETTERS, _BIASED)
    return text[:length].decode()


def new_id() -> str:
    """Return a random id of 32 characters ``[A-Za-z0-9]``, the form Better Auth uses."""
    return random_text(32)


def new_usage_id(now: datetime) -> str:
    """Return a UUIDv7 (RFC 9562, section 5.7) for the instant ``now``: 48 bits of Unix milliseconds, 74 random ones.

    Time-ordered keys keep inserts at the right edge of the primary key's index.
    """
    milliseconds = int(now.timestamp() * 1000) & ((1 << 48) - 1)
    text = (milliseconds.to_bytes(6) + secrets.token_bytes(10)).hex()
    return f"{text[:8]}-{text[8:12]}-7{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:]}"
