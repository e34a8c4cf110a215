"""The session cookie: its name, its value, its attributes, with no framework.

With a Better Auth secret it is Better Auth's own cookie, so that a browser that signed in on one side is signed in on
the other: ``better-auth.session_token``, whose value is the percent-encoded ``token.signature``. Without one it is
``kitrocket.session_token`` and holds the token alone. A signature would add nothing there: the token is 190 random
bits that the database knows, and another secret to keep would be one more to lose. Two names, because one cookie read
in two ways would sign people out whenever the setting changed hands between processes.

On https both have the prefix ``__Secure-``: no page of plain http can then plant one.
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import quote, unquote

from kitrocket.errors import InvalidInputError
from kitrocket.tokens import is_possible

#: What ``encodeURIComponent`` leaves as it is, beside letters, digits and ``_.-~``.
_UNRESERVED = "!*'()"
#: The length of a signature: the base64 of 32 bytes, with its one ``=``.
_SIGNATURE = 44
_NOT_REMEMBERED = "true"


def sign(value: str, secret: str) -> str:
    """Return ``value``, a dot and the base64 of HMAC-SHA256 over it, keyed by the UTF-8 of ``secret``: not encoded."""
    return f"{value}.{_signature(value, secret)}"


def read_signed(text: str, secrets: Iterable[str]) -> str | None:
    """Return the value in a signed cookie's text, percent-encoded or not, if one of ``secrets`` signed it."""
    value, dot, signature = unquote(text).rpartition(".")
    if not dot or not value or len(signature) != _SIGNATURE or not signature.endswith("="):
        return None
    presented = signature.encode(errors="replace")
    # Every secret is tried, so that the time tells nothing about which one fits.
    matches = [hmac.compare_digest(presented, _signature(value, secret).encode()) for secret in secrets]
    return value if any(matches) else None


def _signature(value: str, secret: str) -> str:
    return b64encode(hmac.digest(secret.encode(), value.encode(errors="replace"), "sha256")).decode()


def parse(header: str) -> dict[str, str]:
    """Return a ``Cookie`` header's cookies, undecoded. Of two with one name the first counts, as in Better Auth."""
    found: dict[str, str] = {}
    for part in header.split(";"):
        name, equals, value = part.partition("=")
        if equals:
            value = value.strip()
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            found.setdefault(name.strip(), value[1:-1] if quoted else value)
    return found


@dataclass(frozen=True)
class SessionCookie:
    """How the session cookie is written and read.

    ``secrets`` are Better Auth's: the first signs, all read; empty: the cookie is kitrocket's own. ``secure`` says that
    the site is on https. ``max_age`` is how long a browser keeps it.
    """

    secrets: Sequence[str] = field(default=(), repr=False)
    secure: bool = True
    max_age: timedelta = timedelta(days=7)

    @property
    def name(self) -> str:
        """The cookie's name."""
        return self._named("session_token")

    def read(self, header: str) -> str | None:
        """Return the token in a ``Cookie`` header, or ``None``: no such cookie, or one that nobody here signed."""
        text = parse(header).get(self.name)
        if text is None:
            return None
        token = read_signed(text, self.secrets) if self.secrets else text
        return token if token is not None and is_possible(token) else None

    def is_remembered(self, header: str) -> bool:
        """Whether the browser was told to keep the cookie. Only Better Auth's pair of cookies tells otherwise."""
        text = parse(header).get(self._named("dont_remember"))
        return not self.secrets or text is None or read_signed(text, self.secrets) != _NOT_REMEMBERED

    def write(self, token: str, *, remember: bool = True) -> list[str]:
        """Return the ``Set-Cookie`` headers for a token.

        Not remembered, the browser drops the cookie when it closes; a second one then tells Better Auth so. Raises
        :class:`InvalidInputError` for what is no token.
        """
        if not is_possible(token):
            raise InvalidInputError("token", "it is no session token", "32 letters and digits")
        lines = [self._line(self.name, self._value(token), self.max_age if remember else None)]
        if self.secrets:
            other = self._named("dont_remember")
            lines += [self._gone(other)] if remember else [self._line(other, self._value(_NOT_REMEMBERED), None)]
        return lines

    def clear(self) -> list[str]:
        """Return the ``Set-Cookie`` headers that take the cookie away. Revoke the session first."""
        names = [self.name, *([self._named("dont_remember")] if self.secrets else [])]
        return [self._gone(name) for name in names]

    def _named(self, what: str) -> str:
        owner = "better-auth" if self.secrets else "kitrocket"
        return f"{'__Secure-' if self.secure else ''}{owner}.{what}"

    def _value(self, value: str) -> str:
        return quote(sign(value, self.secrets[0]), safe=_UNRESERVED) if self.secrets else value

    def _gone(self, name: str) -> str:
        return self._line(name, "", timedelta(0))

    def _line(self, name: str, value: str, max_age: timedelta | None) -> str:
        age = "" if max_age is None else f"; Max-Age={int(max_age.total_seconds())}"
        return f"{name}={value}{age}; Path=/; HttpOnly{'; Secure' if self.secure else ''}; SameSite=Lax"
