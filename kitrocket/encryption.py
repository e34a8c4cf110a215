"""OAuth tokens at rest: ``f1$`` and a Fernet token when keys are configured, plain text when none are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from kitrocket.errors import ConfigurationError

_PREFIX = "f1$"


class TokenCipher:
    """Encrypts with the first key and reads with all of them, so that keys can be rotated.

    A key is what ``Fernet.generate_key()`` makes: 32 bytes as URL-safe base64. Raises :class:`ConfigurationError` for
    anything else.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        try:
            fernets = [Fernet(key) for key in keys]
        except (ValueError, TypeError, AttributeError) as error:
            # The cause quotes nothing of the key: it only says what its length is.
            raise ConfigurationError(
                "KITROCKET_TOKEN_KEYS has a key that is not 32 bytes in URL-safe base64; make one with "
                "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'`"
            ) from error
        self._fernet = MultiFernet(fernets) if fernets else None

    def encrypt(self, token: str | None, now: datetime) -> str | None:
        """Return what is stored for a token; ``now`` is written into it."""
        if token is None or self._fernet is None:
            return token
        return _PREFIX + self._fernet.encrypt_at_time(token.encode(), int(now.timestamp())).decode()

    def decrypt(self, stored: str | None) -> str | None:
        """Return the token behind a stored text, which may be plain: written before there were keys.

        Raises :class:`ConfigurationError` when none of the keys reads it.
        """
        if stored is None or not stored.startswith(_PREFIX):
            return stored
        try:
            if self._fernet is not None:
                return self._fernet.decrypt(stored.removeprefix(_PREFIX)).decode()
        except InvalidToken as error:
            raise ConfigurationError("no key of KITROCKET_TOKEN_KEYS reads a stored OAuth token") from error
        raise ConfigurationError("a stored OAuth token is encrypted, and KITROCKET_TOKEN_KEYS is empty")
