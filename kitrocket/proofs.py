"""Tokens that are sent by e-mail, to verify an address or to set a new password. No table holds them.

A token is ``base64url(JSON) . base64url(HMAC-SHA256)``. The JSON tells purpose, user and end. The MAC covers it, and
the state that redeeming the token changes: that is why a token works once, and not after what it is about has changed.
Each purpose has a key of its own, derived from the secret.
"""

from __future__ import annotations

import hmac
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kitrocket import inputs
from kitrocket.errors import ConfigurationError, InvalidInputError, InvalidTokenError

#: What a token is for.
Purpose = Literal["reset", "verify"]

#: How long a token can be redeemed.
LIFE = timedelta(seconds=3600)

#: The shortest secret, in bytes.
SECRET_MIN = 32

_TOKEN_MAX = 4096
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Claim:
    """What a presented token says, still to be held against the user's state."""

    purpose: Purpose
    user_id: str
    payload: str
    mac: str


class Proofs:
    """Makes and checks such tokens with the keys of one secret.

    Raises :class:`ConfigurationError` for a secret of less than 32 bytes, and without one as soon as it is needed.
    """

    def __init__(self, secret: str | None = None) -> None:
        self._keys: dict[Purpose, bytes] = {}
        if secret is None:
            return
        material = secret.encode(errors="surrogatepass")
        if len(material) < SECRET_MIN:
            raise ConfigurationError(f"KITROCKET_SECRET has less than {SECRET_MIN} bytes")
        for purpose in get_args(Purpose):
            derivation = HKDF(algorithm=SHA256(), length=32, salt=None, info=f"kitrocket {purpose}".encode())
            self._keys[purpose] = derivation.derive(material)

    def make(self, purpose: Purpose, user_id: str, state: Sequence[str | None], now: datetime) -> str:
        """Return a token for a user whose state this is; it ends an hour after ``now``."""
        claim = {"purpose": purpose, "user": user_id, "exp": int((now + LIFE).timestamp())}
        payload = _encode(json.dumps(claim, separators=(",", ":"), ensure_ascii=False).encode())
        return f"{payload}.{self._mac(purpose, payload, state)}"

    def read(self, purpose: Purpose, token: str, now: datetime) -> Claim:
        """Return what a presented token claims, unless it is malformed, over, or for another purpose.

        Raises :class:`InvalidTokenError`.
        """
        self._key(purpose)
        found = _TOKEN.fullmatch(token) if len(token) <= _TOKEN_MAX else None
        try:
            if found is None:
                raise InvalidTokenError
            claim = json.loads(urlsafe_b64decode(found[1] + "=" * (-len(found[1]) % 4)))
            user_id = inputs.identifier("token", claim["user"])
            if claim["purpose"] == purpose and type(claim["exp"]) is int and now.timestamp() < claim["exp"]:
                return Claim(purpose, user_id, found[1], found[2])
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError, InvalidInputError):
            pass  # whatever is wrong with it, the answer is the same
        raise InvalidTokenError

    def check(self, claim: Claim, state: Sequence[str | None]) -> None:
        """Raise :class:`InvalidTokenError` unless the token was made for this very state."""
        if not hmac.compare_digest(self._mac(claim.purpose, claim.payload, state), claim.mac):
            raise InvalidTokenError

    def _mac(self, purpose: Purpose, payload: str, state: Sequence[str | None]) -> str:
        covered = json.dumps([payload, *state], separators=(",", ":")).encode()
        return _encode(hmac.digest(self._key(purpose), covered, "sha256"))

    def _key(self, purpose: Purpose) -> bytes:
        key = self._keys.get(purpose)
        if key is None:
            raise ConfigurationError(f"tokens for e-mail need KITROCKET_SECRET, text of at least {SECRET_MIN} bytes")
        return key


def _encode(octets: bytes) -> str:
    return urlsafe_b64encode(octets).decode().rstrip("=")
