"""Password hashes: argon2id, and the scrypt text that Better Auth writes.

Both schemes hash the password after NFKC, as UTF-8. A stored text says itself which scheme made it, so both are
always verified; the configured scheme decides what is written.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from base64 import b64encode
from typing import Literal, get_args

import anyio
import anyio.to_thread
import argon2
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from kitrocket import inputs
from kitrocket.errors import ConfigurationError, InvalidInputError

#: What writes a hash. ``"better-auth"`` is for a database that Better Auth also uses.
PasswordScheme = Literal["argon2id", "better-auth"]

#: How many UTF-16 code units a new password may have: what ``length`` counts in JavaScript.
PASSWORD_MIN, PASSWORD_MAX = 8, 128

#: A presented password longer than this, in characters, matches nothing, so that junk costs no normalising.
_PRESENTED_MAX = 1024

#: 3 passes over 64 MiB in 4 lanes.
_ARGON2 = argon2.PasswordHasher.from_parameters(argon2.profiles.RFC_9106_LOW_MEMORY)
_ARGON2_PREFIX = "$argon2id$"
_SCRYPT_TEXT = re.compile("([0-9a-f]{32}):([0-9a-f]{128})")


class Passwords:
    """Hashes and verifies in worker threads, of which ``limiter`` (default: 4 of its own) bounds the number.

    Raises :class:`ConfigurationError` for an unknown scheme.
    """

    def __init__(self, scheme: PasswordScheme = "argon2id", limiter: anyio.CapacityLimiter | None = None) -> None:
        if scheme not in get_args(PasswordScheme):
            raise ConfigurationError(f"password_scheme is not one of {', '.join(get_args(PasswordScheme))}")
        self._scheme = scheme
        self._limiter = limiter or anyio.CapacityLimiter(4)

    async def hash(self, password: str) -> str:
        """Return the text to store for a password that :func:`new_password` accepts."""
        return await anyio.to_thread.run_sync(hash_password, password, self._scheme, limiter=self._limiter)

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether ``password`` is the one behind ``stored``; costs the same where there is none."""
        return await anyio.to_thread.run_sync(verify_password, stored, password, self._scheme, limiter=self._limiter)

    def is_outdated(self, stored: str) -> bool:
        """Whether a text that verified should be hashed anew: never where Better Auth must read it too."""
        if self._scheme != "argon2id":
            return False
        return not stored.startswith(_ARGON2_PREFIX) or _ARGON2.check_needs_rehash(stored)


def new_password(field: str, value: object) -> str:
    """Return a password that may be set: 8 to 128 UTF-16 code units, without NUL or lone surrogates.

    Raises :class:`InvalidInputError`, which does not quote it.
    """
    expected = f"a password of {PASSWORD_MIN} to {PASSWORD_MAX} UTF-16 code units"
    if not isinstance(value, str):
        raise InvalidInputError(field, f"it is a {type(value).__name__}", expected)
    units = len(value) + sum(character > "\uffff" for character in value)
    if not PASSWORD_MIN <= units <= PASSWORD_MAX:
        raise InvalidInputError(field, "it is too short" if units < PASSWORD_MIN else "it is too long", expected)
    return inputs.text(field, value, max=PASSWORD_MAX)


def hash_password(password: str, scheme: PasswordScheme) -> str:
    """Return the text to store, with a fresh salt."""
    normal = unicodedata.normalize("NFKC", password).encode()
    if scheme == "argon2id":
        return _ARGON2.hash(normal)
    salt = secrets.token_hex(16)
    return f"{salt}:{_scrypt(normal, salt).hex()}"


def verify_password(stored: str | None, password: str, scheme: PasswordScheme) -> bool:
    """Whether ``password`` is the one behind ``stored``, whichever scheme made it.

    Where there is nothing to verify (no text, a text of neither scheme, a password that cannot be one), a dummy of
    ``scheme`` is, so that the answer takes as long.
    """
    normal = _presented(password)
    if stored and normal is not None:
        found = _SCRYPT_TEXT.fullmatch(stored)
        if found:
            return hmac.compare_digest(_scrypt(normal, found[1]), bytes.fromhex(found[2]))
        if stored.startswith(_ARGON2_PREFIX) and stored.isascii():
            try:
                return _ARGON2.verify(stored, normal)
            except VerifyMismatchError:
                return False
            except (InvalidHashError, VerificationError):
                pass
    _verify_dummy(normal or b"", scheme)
    return False


def _presented(password: str) -> bytes | None:
    if len(password) > _PRESENTED_MAX:
        return None
    try:
        return unicodedata.normalize("NFKC", password).encode()
    except UnicodeEncodeError:
        return None


def _scrypt(normal: bytes, salt: str) -> bytes:
    # The salt goes in as the letters of its hexadecimal text, as Better Auth has it.
    return hashlib.scrypt(normal, salt=salt.encode(), n=16384, r=16, p=1, dklen=64, maxmem=64 * 1024 * 1024)


def _verify_dummy(normal: bytes, scheme: PasswordScheme) -> None:
    if scheme == "argon2id":
        try:
            _ARGON2.verify(_DUMMY, normal)
        except VerifyMismatchError:
            return
    else:
        _scrypt(normal, "0" * 32)


def _unpadded(octets: int) -> str:
    return b64encode(bytes(octets)).decode().rstrip("=")


#: A text that verifies at full cost and that no password matches.
_DUMMY = (
    f"{_ARGON2_PREFIX}v=19$m={_ARGON2.memory_cost},t={_ARGON2.time_cost},p={_ARGON2.parallelism}"
    f"${_unpadded(_ARGON2.salt_len)}${_unpadded(_ARGON2.hash_len)}"
)
