"""What an application does with sessions."""

from __future__ import annotations

import ipaddress
import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime, timedelta

import anyio
import asyncpg

from kitrocket import inputs
from kitrocket.clock import Clock, db_now, from_db, to_db, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError, SessionNotFreshError, UserNotFoundError
from kitrocket.ids import new_id
from kitrocket.models import DigestResult, IssuedSession, Session, SessionWithUser, SweepResult
from kitrocket.rotation import Rotation
from kitrocket.sessions.validation import Validator
from kitrocket.sql import statements
from kitrocket.tokens import TokenStorage, is_possible, new_token, stored_forms

_SQL = statements("sessions")
_log = logging.getLogger(__name__)

#: ``SessionWithUser.model_validate`` without its options, which cost a microsecond.
_VALIDATED: Callable[[object], SessionWithUser] = SessionWithUser.__pydantic_validator__.validate_python

_USER_AGENT_MAX = 512
_PAGE_MAX = 1000
_BATCH_MAX = 100_000
#: How many batches in a row may delete nothing: rows may be found that somebody's trigger keeps.
_PATIENCE = 3


class SessionService:
    """Sessions: created, validated, listed, revoked and swept.

    A session lives for ``ttl`` (``short_ttl`` when it is not to be remembered), and using it extends that, at most once
    per ``update_age`` and never past ``max_lifetime`` (``None``: no cap). It is fresh until ``fresh_age`` after it was
    created (zero: always). A user keeps the newest ``max_sessions`` (``None``: all). ``tokens`` says how tokens are
    stored; ``ipv6_network_only`` stores only the /64 network of an IPv6 address.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock = utc_now,
        ttl: timedelta = timedelta(days=7),
        update_age: timedelta = timedelta(days=1),
        short_ttl: timedelta = timedelta(days=1),
        max_lifetime: timedelta | None = timedelta(days=30),
        fresh_age: timedelta = timedelta(days=1),
        max_sessions: int | None = None,
        tokens: TokenStorage = "digest",
        ipv6_network_only: bool = False,
    ) -> None:
        least = timedelta(milliseconds=1)
        self._ttl = inputs.duration("ttl", ttl, min=least)
        self._short_ttl = inputs.duration("short_ttl", short_ttl, min=least)
        self._max_lifetime = None if max_lifetime is None else inputs.duration("max_lifetime", max_lifetime, min=least)
        self._fresh_age = inputs.duration("fresh_age", fresh_age)
        self._max_sessions = None if max_sessions is None else inputs.whole_number("max_sessions", max_sessions, min=1)
        if not inputs.duration("update_age", update_age) < ttl:
            raise InvalidInputError("update_age", "it is not shorter than ttl", "a shorter timedelta")
        if tokens not in ("digest", "plain", "digest+plain"):
            raise InvalidInputError("tokens", "it is unknown", '"digest", "plain" or "digest+plain"')
        self._engine = engine
        self._clock = clock
        self._tokens = tokens
        self._ipv6_network_only = ipv6_network_only
        #: Ends these sessions when a credential changes: for the arguments of ``UserService`` and ``AccountService``.
        self.rotation = Rotation(engine, ttl=ttl, short_ttl=short_ttl, max_lifetime=max_lifetime, tokens=tokens)
        self._validator = Validator(engine, ttl=ttl, update_age=update_age, max_lifetime=max_lifetime)

    async def create(
        self, user_id: str, *, ip_address: str | None = None, user_agent: str | None = None, remember: bool = True
    ) -> IssuedSession:
        """Start a session and return it with its token, which is not shown again.

        With ``remember=False`` it lives for ``short_ttl`` and is never extended. An IP address that cannot be read is
        an error; a user agent is cut at 512 characters. With ``max_sessions`` the oldest ones make room.
        Raises :class:`UserNotFoundError`, :class:`InvalidInputError`.
        """
        now = db_now(self._clock)
        inputs.identifier("user_id", user_id)
        token = new_token()
        ttl = self._ttl if inputs.flag("remember", remember) else self._short_ttl
        expires_at = now + (ttl if self._max_lifetime is None else min(ttl, self._max_lifetime))
        session = Session(
            id=new_id(),
            user_id=user_id,
            expires_at=from_db(expires_at),
            created_at=from_db(now),
            seen_at=from_db(max(now, expires_at - self._ttl)),
            ip_address=_ip_address(ip_address, network_only=self._ipv6_network_only),
            user_agent=_user_agent(user_agent),
        )
        row = (
            session.id,
            user_id,
            stored_forms(token, self._tokens)[0],
            expires_at,
            session.ip_address,
            session.user_agent,
            now,
        )
        if self._max_sessions is None:
            await self._engine.fetch(_SQL["create"], *row)
        else:
            async with self._engine.transaction():
                if await self._engine.fetchval(_SQL["lock_user"], user_id) is None:
                    raise UserNotFoundError(user_id)
                await self._engine.fetch(
                    _SQL["delete_beyond"], user_id, self._max_sessions - 1, now, self._max_lifetime
                )
                await self._engine.fetch(_SQL["create"], *row)
        return IssuedSession(session=session, token=token)

    async def validate(self, token: str, *, refresh: bool = True, node: str | None = None) -> SessionWithUser | None:
        """Return the live session of a token with its user, or ``None``. One statement, and none for what is no token.

        When it is due the expiry is extended, and ``refreshed`` says so. ``refresh=False`` only reads, and then
        ``node`` may name a replica, which can lag: a session revoked a moment ago may still be live there. When the
        database is away it is tried again for about 5 s, then :class:`DatabaseUnavailableError` is raised.
        """
        if refresh is not True:
            inputs.flag("refresh", refresh)
        if node is not None:
            inputs.identifier("node", node)
            if refresh:
                raise InvalidInputError("node", "a replica cannot refresh", "refresh=False with it")
        forms = self._possible_forms("token", token)
        if not forms:
            return None
        now = db_now(self._clock)
        if refresh:
            row = await self._validator.find(forms, now)
        else:
            row = await self._validator.look_up(forms, now, node=node)
        return None if row is None else _session_with_user(row)

    def coalescing(self) -> AbstractAsyncContextManager[None]:
        """``async with sessions.coalescing():`` validate on two held connections, all who wait as one statement.

        For a server, whose calls are many at once. Without it each call takes a connection of the pool.
        """
        return self._validator.coalescing()

    def is_fresh(self, session: Session) -> bool:
        """Whether a session is young enough for what asks for a recent login."""
        if not isinstance(session, Session):
            raise InvalidInputError("session", f"it is a {type(session).__name__}", "a Session")
        return not self._fresh_age or from_db(db_now(self._clock)) - self._fresh_age < session.created_at

    def require_fresh(self, session: Session) -> None:
        """Raise :class:`SessionNotFreshError` unless a session :meth:`is_fresh`."""
        if not self.is_fresh(session):
            raise SessionNotFreshError(session.id)

    async def list(
        self, user_id: str, *, current: str | None = None, limit: int = 50, after: Session | str | None = None
    ) -> Sequence[Session]:
        """Return a page of a user's live sessions, newest first.

        ``current`` is the token of the one that asks: it gets ``is_current``. ``after`` is the last session of the page
        before, or its id (which an application can put in a URL, but which leads nowhere once that session is revoked).
        """
        now = db_now(self._clock)
        after_id, after_at = (after.id, to_db(after.created_at)) if isinstance(after, Session) else (after, None)
        rows = await self._engine.fetch(
            _SQL["list"],
            inputs.identifier("user_id", user_id),
            now,
            self._ttl,
            self._max_lifetime,
            [] if current is None else self._possible_forms("current", current),
            inputs.whole_number("limit", limit, min=1, max=_PAGE_MAX),
            None if after_id is None else inputs.identifier("after", after_id),
            after_at,
        )
        return [Session.model_validate(dict(row)) for row in rows]

    async def revoke(self, session_id: str, *, user_id: str) -> bool:
        """End one session of a user; answer whether there was one. Another user's session is left alone."""
        gone: int = await self._engine.fetchval(
            _SQL["revoke"], inputs.identifier("session_id", session_id), inputs.identifier("user_id", user_id)
        )
        return gone > 0

    async def revoke_others(self, user_id: str, *, keep: str) -> int:
        """End every session of a user but the one whose token is ``keep``; return how many, expired ones included."""
        gone: int = await self._engine.fetchval(
            _SQL["revoke_others"], inputs.identifier("user_id", user_id), self._possible_forms("keep", keep)
        )
        return gone

    async def revoke_all(self, user_id: str) -> int:
        """End every session of a user; return how many, expired ones included."""
        return await self.revoke_many([inputs.identifier("user_id", user_id)])

    async def revoke_many(self, user_ids: Iterable[str]) -> int:
        """End every session of many users in one statement; return how many, expired ones included."""
        if isinstance(user_ids, str) or not isinstance(user_ids, Iterable):
            raise InvalidInputError("user_ids", f"it is a {type(user_ids).__name__}", "several ids")
        gone: int = await self._engine.fetchval(
            _SQL["revoke_many"], [inputs.identifier("user_ids", user_id) for user_id in user_ids]
        )
        return gone

    async def delete_expired(
        self,
        *,
        limit: int | None = None,
        batch_size: int = 1000,
        budget: timedelta | None = None,
        report: Callable[[int], object] | None = None,
    ) -> SweepResult:
        """Delete the sessions that are no longer live, oldest first, a transaction per batch.

        It stops after ``limit`` rows, and starts no batch once ``budget`` is spent, though always one; ``more`` then
        says whether rows are left. ``report`` is called after each batch with the number deleted so far: what is
        reported stays deleted, whatever cancels the sweep. Any number of sweepers may run at once: one that meets
        another goes on further up, and comes back for the older ones later. Where others write sessions too (``tokens``
        is not ``"digest"``) it also looks for those past their cap.
        """
        now = db_now(self._clock)
        most = math.inf if limit is None else inputs.whole_number("limit", limit, min=1)
        inputs.whole_number("batch_size", batch_size, min=1, max=_BATCH_MAX)
        stop_at = anyio.current_time() + _seconds("budget", budget)
        _check_report(report)
        oldest = self._outlived(now)
        own = not self._engine.in_transaction()
        deleted = batches = 0
        stopped = False
        for sql, horizon in ((_SQL["delete_expired"], now), (_SQL["delete_outlived"], oldest)):
            stretches: list[tuple[datetime | None, datetime]] = []
            idle = 0
            while horizon is not None and not stopped and idle < _PATIENCE:
                # What came up behind the batches, or was skipped, or changed as it was locked, is found from the start.
                begin, end = stretches.pop() if stretches else (None, horizon)
                wanted = int(min(batch_size, most - deleted))
                row = await self._engine.fetchrow(sql, end, wanted, own, begin)
                assert row is not None
                gone, found, last, skipped, _ = row
                if begin is None and not found:
                    break
                if found == wanted:
                    stretches += _rest(last, end, shared=skipped)
                deleted += gone
                batches += gone > 0
                idle = 0 if gone else idle + (found > 0)
                if report is not None and gone:
                    report(deleted)
                stopped = deleted >= most or anyio.current_time() >= stop_at
        if deleted:
            _log.info("swept %d expired sessions in %d batches", deleted, batches)
        more = stopped and bool(await self._engine.fetchval(_SQL["any_expired"], now, oldest))
        return SweepResult(deleted=deleted, batches=batches, more=more)

    async def count_expired(self) -> int:
        """Return how many sessions :meth:`delete_expired` would delete now."""
        now = db_now(self._clock)
        found: int = await self._engine.fetchval(_SQL["count_expired"], now, self._outlived(now))
        return found

    async def digest_tokens(
        self,
        *,
        batch_size: int = 1000,
        budget: timedelta | None = None,
        report: Callable[[int], object] | None = None,
    ) -> DigestResult:
        """Replace each token that is stored plain by its digest, a transaction per batch. Nobody is signed out.

        It is for a database that was another library's, while ``tokens`` is ``"digest+plain"``. It starts no batch once
        ``budget`` is spent, though always one; ``more`` then says whether plain ones are left. ``report`` is called
        after each batch with the number replaced so far. It may be cancelled and begun again, and run twice at once.
        Raises :class:`ConfigurationError` where only plain tokens are accepted.
        """
        inputs.whole_number("batch_size", batch_size, min=1, max=_BATCH_MAX)
        stop_at = anyio.current_time() + _seconds("budget", budget)
        _check_report(report)
        if self._tokens == "plain":
            raise ConfigurationError(
                "only plain tokens are accepted here, so digests would sign everyone out: set session_tokens to "
                '"digest+plain" first'
            )
        digested = batches = 0
        last, full = "", True
        while full:
            row = await self._engine.fetchrow(_SQL["digest_tokens"], last, batch_size)
            assert row is not None
            count, last = row
            digested += count
            batches += count > 0
            if report is not None and count:
                report(digested)
            full = count == batch_size
            if anyio.current_time() >= stop_at:
                break
        if digested:
            _log.info("replaced %d plain tokens by their digests in %d batches", digested, batches)
        more = full and bool(await self._engine.fetchval(_SQL["any_plain"], last))
        return DigestResult(digested=digested, batches=batches, more=more)

    async def count_plain(self) -> int:
        """Return how many sessions have a token that is stored plain. It reads the whole table."""
        found: int = await self._engine.fetchval(_SQL["count_plain"])
        return found

    def _outlived(self, now: datetime) -> datetime | None:
        """Until when a session was created that is past its cap; ``None`` where none can live that long."""
        return now - self._max_lifetime if self._max_lifetime and self._tokens != "digest" else None

    def _possible_forms(self, field: str, token: str) -> tuple[str, ...]:
        return stored_forms(token, self._tokens) if is_possible(inputs.secret(field, token)) else ()


def _session_with_user(row: asyncpg.Record) -> SessionWithUser:
    """Make a validated answer, in one pass over plain dictionaries: this runs on every request."""
    id, user_id, expires_at, created_at, seen_at, ip_address, user_agent, refreshed, *rest = row
    email, name, email_verified, avatar, user_created_at, user_updated_at, *_ = rest
    return _VALIDATED(
        {
            "session": {
                "id": id,
                "user_id": user_id,
                "expires_at": expires_at,
                "created_at": created_at,
                "seen_at": seen_at,
                "ip_address": ip_address,
                "user_agent": user_agent,
            },
            "user": {
                "id": user_id,
                "email": email,
                "name": name,
                "email_verified": email_verified,
                "avatar": avatar,
                "created_at": user_created_at,
                "updated_at": user_updated_at,
            },
            "refreshed": refreshed,
        }
    )


def _rest(last: datetime, end: datetime, *, shared: bool) -> list[tuple[datetime, datetime]]:
    """Return what is left to sweep of a stretch, the next part last. One that is shared with others is cut in two."""
    if not shared:
        return [(last, end)]
    cut = last + (end - last) * random.uniform(0.25, 0.75)  # noqa: S311 - so that not all go to the same place
    return [(last, cut), (cut, end)]


def _seconds(field: str, budget: timedelta | None) -> float:
    return math.inf if budget is None else inputs.duration(field, budget).total_seconds()


def _check_report(report: object) -> None:
    if report is not None and not callable(report):
        raise InvalidInputError("report", f"it is a {type(report).__name__}", "a function of one number")


def _ip_address(value: str | None, *, network_only: bool) -> str | None:
    """Return the canonical text of an IP address: an IPv4-mapped one as IPv4, an IPv6 one without its zone."""
    if value is None or value == "":
        return None
    expected = "an IPv4 or IPv6 address such as 203.0.113.7"
    if not isinstance(value, str):
        raise InvalidInputError("ip_address", f"it is a {type(value).__name__}", expected)
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    with suppress(ValueError):  # it quotes the value, so it is left behind before ours is raised
        address = ipaddress.ip_address(value)
    if address is None:
        raise InvalidInputError("ip_address", "it cannot be read", expected)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    plain = ipaddress.IPv6Address(int(address))
    return str(ipaddress.IPv6Network((plain, 64), strict=False) if network_only else plain)


def _user_agent(value: str | None) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = value[:_USER_AGENT_MAX]
    return inputs.text("user_agent", value, max=_USER_AGENT_MAX)
