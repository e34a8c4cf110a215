"""From a ``postgres://`` URL to what asyncpg wants in order to connect."""

from __future__ import annotations

import re
import ssl
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kitrocket.errors import ConfigurationError

_LOCAL = re.compile(r"^(localhost|127(\.\d+){3}|\[?::1\]?|/.*|%2F.*|)$", re.IGNORECASE)


def is_transaction_pooler(url: str | None) -> bool:
    """Whether a URL leads to Supabase's transaction pooler, known by its port 6543."""
    return url is not None and any(port == "6543" for _, port in _hosts(url))


def connection_arguments(url: str | None, *, pooler: bool) -> dict[str, Any]:
    """Return asyncpg's keyword arguments: UTC on every connection, no statement cache behind a pooler, verified TLS.

    ``sslmode`` and ``sslrootcert`` in the URL decide about TLS. Without ``sslmode`` a host that is not local must offer
    TLS with a certificate that ``sslrootcert``, or else the system, trusts; ``sslmode=verify-full`` asks for that too.

    Raises :class:`ConfigurationError` when ``sslrootcert`` cannot be read.
    """
    arguments: dict[str, Any] = {"server_settings": {"timezone": "UTC", "application_name": "kitrocket"}}
    if pooler:
        arguments["statement_cache_size"] = 0
    if url is not None:
        arguments["dsn"] = url
        if _must_verify(url):
            arguments["ssl"] = _verifying(parse_qs(urlsplit(url).query).get("sslrootcert", [None])[0])
    return arguments


def _must_verify(url: str) -> bool:
    mode = parse_qs(urlsplit(url).query).get("sslmode")
    return mode == ["verify-full"] if mode else not all(_LOCAL.match(host) for host, _ in _hosts(url))


def _verifying(authority: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise ConfigurationError(f"sslrootcert {authority!r} cannot be read") from error


def _hosts(url: str) -> list[tuple[str, str]]:
    """Return the hosts and ports of a URL, which may name several, or name them in its query."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    places = query.get("host", [parts.netloc.rpartition("@")[2]])[0].split(",")
    ports = query.get("port", [""])[0].split(",")
    found: list[tuple[str, str]] = []
    for index, place in enumerate(places):
        host, _, port = place.rpartition(":") if re.search(r":\d+$", place) else (place, "", "")
        found.append((host, port or (ports[index] if index < len(ports) else ports[0])))
    return found
