"""Verify a webhook delivery, and sign one.

``standardwebhooks`` computes the signatures. Its ``verify`` is left alone: it reads the system's clock and lets
five kinds of error out.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pydantic import SecretStr
from standardwebhooks import Webhook

from kitrocket.dodo.events import Event, read_event
from kitrocket.errors import (
    ConfigurationError,
    WebhookNotConfiguredError,
    WebhookPayloadError,
    WebhookTooLargeError,
    WebhookVerificationError,
)

#: How far the time a delivery was signed at may be from the clock, either way.
TOLERANCE = timedelta(seconds=300)

_ID, _TIMESTAMP, _SIGNATURE = HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
_ID_FORM = re.compile(r"[\x20-\x7e]{1,255}")
_TIMESTAMP_FORM = re.compile(r"[0-9]{1,11}")
_ENTRY_FORM = re.compile(r"v1,[A-Za-z0-9+/=]{44}")
#: A signature is 47 characters; a header with room for 170 of them is nobody's key rotation.
_SIGNATURES_MAX = 8192


class Delivery(NamedTuple):
    """A verified delivery: its id, the exact text of its body, and the event in it."""

    webhook_id: str
    text: str
    event: Event


class Verifier:
    """Checks deliveries against one or several webhook keys, any of which may match.

    ``keys`` are ``whsec_…`` or the base64 alone, of 16 to 64 bytes; another form raises
    :class:`~kitrocket.errors.ConfigurationError`. ``max_bytes`` is the largest body.
    """

    def __init__(self, keys: Iterable[str | SecretStr], *, max_bytes: int) -> None:
        self._signers = [_signer(key) for key in keys]
        self._max_bytes = max_bytes

    def verify(self, body: bytes, headers: Mapping[str, str], *, now: datetime) -> Delivery:
        """Return what was delivered. Raises a :class:`~kitrocket.errors.WebhookError` for everything else."""
        if not self._signers:
            raise WebhookNotConfiguredError("no_key")
        if not isinstance(body, bytes | bytearray | memoryview):
            raise WebhookPayloadError("body_not_bytes")
        body = bytes(body)
        if len(body) > self._max_bytes:
            raise WebhookTooLargeError("too_large")
        webhook_id, timestamp, signatures = _three_headers(headers)
        if not _ID_FORM.fullmatch(webhook_id):
            raise WebhookVerificationError("bad_id")
        if not _TIMESTAMP_FORM.fullmatch(timestamp):
            raise WebhookVerificationError("bad_timestamp")
        signed_at = datetime.fromtimestamp(int(timestamp), UTC)
        if abs(now - signed_at) > TOLERANCE:
            raise WebhookVerificationError("time_out_of_tolerance")
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError:
            # `from None`: the decoder's error holds the body.
            raise WebhookPayloadError("not_utf8") from None
        # The signature is over the header's own characters: another spelling of the same number was not signed.
        if str(int(timestamp)) != timestamp or not self._matches(webhook_id, signed_at, text, signatures):
            raise WebhookVerificationError("bad_signature")
        return Delivery(webhook_id, text, read_event(text))

    def _matches(self, webhook_id: str, signed_at: datetime, text: str, signatures: str) -> bool:
        if len(signatures) > _SIGNATURES_MAX:
            return False
        entries = [entry.encode("ascii") for entry in signatures.split(" ") if _ENTRY_FORM.fullmatch(entry)]
        expected = [signer.sign(webhook_id, signed_at, text).encode("ascii") for signer in self._signers]
        return any(hmac.compare_digest(ours, theirs) for ours in expected for theirs in entries)


def sign(body: bytes, *, key: str, webhook_id: str, at: datetime) -> dict[str, str]:
    """Return the headers with which the provider would deliver ``body`` at the timezone-aware instant ``at``.

    Raises :class:`~kitrocket.errors.ConfigurationError` for a key that cannot be one.
    """
    at = at.astimezone(UTC).replace(microsecond=0)
    signature = _signer(key).sign(webhook_id, at, body.decode("utf-8"))
    return dict(zip(HEADERS, (webhook_id, str(int(at.timestamp())), signature), strict=True))


def _signer(key: str | SecretStr) -> Webhook:
    text = key.get_secret_value() if isinstance(key, SecretStr) else key
    try:
        secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not 16 <= len(secret) <= 64:
        raise ConfigurationError(
            "dodo_payments_webhook_key: each key is the provider's `whsec_…`, base64 of 16 to 64 bytes; "
            "copy it from the endpoint's page (DODO_PAYMENTS_WEBHOOK_KEY)"
        )
    return Webhook(secret)


def _three_headers(headers: Mapping[str, str]) -> tuple[str, str, str]:
    found: dict[str, str] = {}
    if not isinstance(headers, Mapping):
        raise WebhookVerificationError("headers_not_a_mapping")
    # A mapping of several values, such as Starlette's, gives a doubled name twice here.
    for name, value in headers.items():
        lowered = name.lower() if isinstance(name, str) else ""
        if lowered not in HEADERS:
            continue
        if lowered in found:
            raise WebhookVerificationError("doubled_header")
        if not isinstance(value, str) or not value:
            raise WebhookVerificationError("empty_header")
        found[lowered] = value
    if len(found) < len(HEADERS):
        raise WebhookVerificationError("missing_header")
    return found[_ID], found[_TIMESTAMP], found[_SIGNATURE]
