"""The provider's own SDK, as each part of kitrocket that talks to DodoPayments uses it. The extra is ``dodo``."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import cache

from pydantic import SecretStr

from kitrocket.errors import ConfigurationError, MissingExtraError

try:
    import dodopayments
    import httpx
except ImportError as error:
    raise MissingExtraError("asking DodoPayments", "dodo") from error

# The SDK too is imported from here, so that where it is missing the error names the extra.
__all__ = ["dodopayments", "make_client", "retry_after"]


@cache
def _tls() -> ssl.SSLContext:
    # Making one blocks the event loop for 30 to 100 ms, and a client is made every few seconds.
    return httpx.create_ssl_context()


def make_client(
    *, api_key: str | SecretStr, base_url: str | SecretStr | None, timeout_seconds: float
) -> dodopayments.AsyncDodoPayments:
    """Return a client that tries nothing again by itself; whoever makes it closes it.

    Raises :class:`ConfigurationError` for a key that no header can carry.
    """
    token = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
    if not re.fullmatch("[!-~]+", token):
        raise ConfigurationError("DODO_PAYMENTS_API_KEY: it is empty or has characters that no key has")
    return dodopayments.AsyncDodoPayments(
        bearer_token=token,
        base_url=base_url.get_secret_value() if isinstance(base_url, SecretStr) else base_url,
        max_retries=0,
        timeout=timeout_seconds,
        http_client=dodopayments.DefaultAsyncHttpxClient(verify=_tls()),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for, told in seconds or as an instant; ``None`` without one."""
    told = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", told):
        return float(told)
    try:
        # By the provider's own clock.
        wait = parsedate_to_datetime(told) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        return None
    return max(wait.total_seconds(), 0.0)
