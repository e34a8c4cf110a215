"""The check of a session, which every request makes: what it finds, when it slides, and how many are asked at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta

import anyio
import asyncpg
import pytest
import pytest_asyncio

from factories import make_session, make_user
from kitrocket.clock import from_db, to_db, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseUnavailableError, InvalidInputError
from kitrocket.models import SessionWithUser
from kitrocket.sessions import SessionService
from kitrocket.sessions.service import TokenStorage
from kitrocket.sql import statements
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest, new_token
from servers import Server

pytestmark = pytest.mark.asyncio

MILLISECOND = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)


@pytest_asyncio.fixture(params=["alone", "coalescing"])
async def sessions(request: pytest.FixtureRequest, engine: Engine, clock: ManualClock) -> AsyncIterator[SessionService]:
    """A service as it stands alone, and as it runs in a kit."""
    service = SessionService(engine, clock=clock)
    if request.param == "alone":
        yield service
    else:
        async with service.coalescing():
            yield service


async def expiry(engine: Engine) -> datetime:
    """The expiry of the only session."""
    (row,) = await engine.fetch("SELECT expires_at FROM sessions")
    return from_db(row["expires_at"])


async def count_updates(engine: Engine) -> None:
    """Let the database count each row of ``sessions`` that is written, in the table ``written``."""
    await engine.fetch("CREATE TABLE written (id text)")
    await engine.fetch(
        "CREATE FUNCTION count_written() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO written VALUES (new.id); RETURN new; END'"
    )
    await engine.fetch(
        "CREATE TRIGGER written BEFORE INSERT OR UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION count_written()"
    )


async def validate_all(service: SessionService, tokens: list[str]) -> list[SessionWithUser | None]:
    """Validate tokens at the same time; the answers stand in the order of the tokens."""
    found: dict[int, SessionWithUser | None] = {}

    async def one(number: int, token: str) -> None:
        found[number] = await service.validate(token)

    async with anyio.create_task_group() as group:
        for number, token in enumerate(tokens):
            group.start_soon(one, number, token)
    return [found[number] for number in range(len(tokens))]


# -- what is found ----------------------------------------------------------------------------------------------------


async def test_a_live_session_comes_with_its_user(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(
        engine, email="ada@example.com", name="Ada", email_verified=clock.now, avatar="https://example.com/a.png"
    )
    issued = await sessions.create(user_id, ip_address="203.0.113.7", user_agent="Firefox")
    for found in (await sessions.validate(issued.token), await sessions.validate(issued.token, refresh=False)):
        assert found is not None
        assert found.session == issued.session
        assert found.refreshed is False
        assert found.user.model_dump() == {
            "id": user_id,
            "email": "ada@example.com",
            "name": "Ada",
            "email_verified": clock.now,
            "avatar": "https://example.com/a.png",
            "created_at": clock.now,
            "updated_at": clock.now,
        }


@pytest.mark.parametrize(
    "token",
    ["", "junk", "a" * 31, "a" * 33, "a" * 32 + "\n", "é" * 32, "a" * 1_000_000, "a" * 31 + "\0", digest("a" * 32)],
)
@pytest.mark.parametrize("tokens", ["digest", "plain", "digest+plain"])
async def test_what_is_no_token_is_none_without_a_query(tokens: TokenStorage, token: str) -> None:
    sessions = SessionService(Engine("postgres://nowhere.invalid/x"), tokens=tokens)
    assert await sessions.validate(token) is None
    assert await sessions.validate(token, refresh=False) is None


@pytest.mark.parametrize("token", [None, b"a" * 32, 5])
async def test_what_is_no_text_is_an_error(sessions: SessionService, token: object) -> None:
    with pytest.raises(InvalidInputError):
        await sessions.validate(token)  # type: ignore[arg-type]


async def test_an_unknown_token_is_none(sessions: SessionService) -> None:
    assert await sessions.validate(new_token()) is None
    assert await sessions.validate(new_token(), refresh=False) is None


@pytest.mark.parametrize("coalescing", [False, True])
@pytest.mark.parametrize(
    ("tokens", "accepts_digest", "accepts_plain"),
    [("digest", True, False), ("plain", False, True), ("digest+plain", True, True)],
)
async def test_which_stored_tokens_are_accepted(
    engine: Engine,
    clock: ManualClock,
    coalescing: bool,
    tokens: TokenStorage,
    accepts_digest: bool,
    accepts_plain: bool,
) -> None:
    user_id = await make_user(engine)
    as_digest, as_plain = new_token(), new_token()
    await make_session(engine, user_id, token=digest(as_digest))
    await make_session(engine, user_id, token=as_plain)
    service = SessionService(engine, clock=clock, tokens=tokens)

    async def check() -> None:
        for token, accepted in ((as_digest, accepts_digest), (as_plain, accepts_plain)):
            assert (await service.validate(token) is not None) is accepted
            assert (await service.validate(token, refresh=False) is not None) is accepted
            assert [found is not None for found in await validate_all(service, [token] * 8)] == [accepted] * 8
        # What stands in the table is never itself a token, unless it is stored plain.
        assert await service.validate(digest(as_digest)) is None

    if coalescing:
        async with service.coalescing():
            await check()
    else:
        await check()


@pytest.mark.parametrize("coalescing", [False, True])
@pytest.mark.parametrize("tokens", ["digest", "plain", "digest+plain"])
async def test_in_every_mode_it_holds_inside_and_outside_of_a_transaction(
    engine: Engine, clock: ManualClock, tokens: TokenStorage, coalescing: bool
) -> None:
    service = SessionService(engine, clock=clock, tokens=tokens)
    issued = await service.create(await make_user(engine))

    async def check(expires_at: datetime, *, refreshed: bool) -> None:
        looked_up = await service.validate(issued.token, refresh=False)
        found = await service.validate(issued.token)
        assert looked_up is not None
        assert found is not None
        assert found.refreshed is refreshed
        assert found.session.expires_at == expires_at == await expiry(engine)
        assert [each is not None for each in await validate_all(service, [issued.token] * 5)] == [True] * 5

    async with AsyncExitStack() as stack:
        if coalescing:
            await stack.enter_async_context(service.coalescing())
        await check(issued.session.expires_at, refreshed=False)
        clock.advance(2 * DAY)
        with pytest.raises(RuntimeError):
            async with engine.transaction():
                found = await service.validate(issued.token)
                assert found is not None
                assert found.refreshed is True
                assert found.session.expires_at == clock.now + 7 * DAY == await expiry(engine)
                assert await service.validate(issued.token, refresh=False) is not None
                raise RuntimeError
        assert await expiry(engine) == issued.session.expires_at
        await check(clock.now + 7 * DAY, refreshed=True)
        # What stands in the table is no token in any mode, unless it is stored plain.
        stored = await engine.fetchval("SELECT token FROM sessions")
        for each in {stored, digest(issued.token)} - {issued.token}:
            assert await service.validate(each) is None
            async with engine.transaction():
                assert await service.validate(each) is None
        assert await service.revoke_all(issued.session.user_id) == 1
        assert await service.validate(issued.token) is None


async def test_what_better_auth_writes_is_read(engine: Engine, clock: ManualClock) -> None:
    token = new_token()
    await make_session(engine, await make_user(engine), token=token, ip_address="", user_agent="")
    sessions = SessionService(engine, clock=clock, tokens="plain")
    for refresh in (True, False):
        found = await sessions.validate(token, refresh=refresh)
        assert found is not None
        assert (found.session.ip_address, found.session.user_agent) == (None, None)


async def test_a_zone_that_is_not_utc_changes_nothing(
    server: Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        async with server.engine(database, pool_size=1) as engine:
            await engine.fetch(f"ALTER DATABASE {database} SET timezone = 'America/New_York'")
            await engine.fetch(f"ALTER ROLE CURRENT_USER IN DATABASE {database} SET timezone = 'America/New_York'")
        stranger = await asyncpg.connect(server.url(database, direct=True))
        assert await stranger.fetchval("SHOW timezone") == "America/New_York"
        await stranger.close()
        async with server.engine(database) as engine:
            sessions = SessionService(engine)
            user_id = await make_user(engine)
            before = utc_now()
            issued = await sessions.create(user_id)
            after = utc_now()
            stored = await engine.fetchval("SELECT created_at FROM sessions")
            found = await sessions.validate(issued.token)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found is not None
    assert before - SECOND < from_db(stored) <= after
    assert found.session.expires_at == issued.session.expires_at == from_db(stored) + 7 * DAY


# -- how long it lives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "live"), [(-SECOND, True), (-MILLISECOND, True), (0 * DAY, False), (SECOND, False)])
@pytest.mark.parametrize("refresh", [True, False])
async def test_a_session_is_dead_at_the_very_instant(
    engine: Engine, sessions: SessionService, clock: ManualClock, offset: timedelta, live: bool, refresh: bool
) -> None:
    issued = await sessions.create(await make_user(engine), remember=False)
    clock.now = issued.session.expires_at + offset
    assert (await sessions.validate(issued.token, refresh=refresh) is not None) is live


@pytest.mark.parametrize(("offset", "live"), [(-SECOND, True), (0 * DAY, False), (SECOND, False)])
@pytest.mark.parametrize("refresh", [True, False])
async def test_the_cap_holds_against_another_writer(
    engine: Engine, sessions: SessionService, clock: ManualClock, offset: timedelta, live: bool, refresh: bool
) -> None:
    issued = await sessions.create(await make_user(engine))
    cap = clock.now + 30 * DAY
    await engine.fetch("UPDATE sessions SET expires_at = '2027-01-01'")
    clock.now = cap + offset
    found = await sessions.validate(issued.token, refresh=refresh)
    assert (found is not None) is live
    if found:
        assert found.session.expires_at == cap
        assert found.refreshed is False


@pytest.mark.parametrize("refresh", [True, False])
async def test_another_writers_infinite_expiry_is_capped(
    engine: Engine, sessions: SessionService, clock: ManualClock, refresh: bool
) -> None:
    issued = await sessions.create(await make_user(engine))
    await engine.fetch("UPDATE sessions SET expires_at = 'infinity'")
    found = await sessions.validate(issued.token, refresh=refresh)
    assert found is not None
    assert found.session.expires_at == clock.now + 30 * DAY


async def test_without_a_cap_a_session_slides_for_ever(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, max_lifetime=None)
    issued = await sessions.create(await make_user(engine))
    for _ in range(20):
        clock.advance(6 * DAY)
        found = await sessions.validate(issued.token)
        assert found is not None
        assert found.session.expires_at == clock.now + 7 * DAY == await expiry(engine)


@pytest.mark.parametrize(("offset", "due"), [(-SECOND, False), (0 * DAY, True), (SECOND, True)])
async def test_it_slides_once_update_age_has_passed(
    engine: Engine, sessions: SessionService, clock: ManualClock, offset: timedelta, due: bool
) -> None:
    issued = await sessions.create(await make_user(engine))
    clock.advance(DAY + offset)
    found = await sessions.validate(issued.token)
    assert found is not None
    expected = clock.now + 7 * DAY if due else issued.session.expires_at
    assert found.refreshed is due
    assert found.session.expires_at == expected == await expiry(engine)
    assert found.session.seen_at == (clock.now if due else issued.session.created_at)


async def test_looking_only_never_slides(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    issued = await sessions.create(await make_user(engine))
    clock.advance(6 * DAY)
    found = await sessions.validate(issued.token, refresh=False)
    assert found is not None
    assert found.refreshed is False
    assert found.session.expires_at == issued.session.expires_at == await expiry(engine)


async def test_it_slides_to_the_cap_and_then_no_more(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    issued = await sessions.create(await make_user(engine))
    cap = clock.now + 30 * DAY
    for day in range(1, 30):
        clock.advance(DAY)
        found = await sessions.validate(issued.token)
        assert found is not None
        assert found.session.expires_at == min(clock.now + 7 * DAY, cap) == await expiry(engine)
        assert found.refreshed is (day <= 23)
    clock.advance(DAY)
    assert await sessions.validate(issued.token) is None


async def test_a_session_that_is_not_remembered_never_slides(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    issued = await sessions.create(await make_user(engine), remember=False)
    for _ in range(20):
        clock.advance(timedelta(hours=1))
        found = await sessions.validate(issued.token)
        assert found is not None
        assert found.refreshed is False
        assert await expiry(engine) == issued.session.expires_at


@pytest.mark.parametrize(("short_by", "slides"), [(MILLISECOND, True), (59 * SECOND, True), (61 * SECOND, False)])
async def test_a_minute_is_allowed_before_a_session_counts_as_short(
    engine: Engine, sessions: SessionService, clock: ManualClock, short_by: timedelta, slides: bool
) -> None:
    token = new_token()
    await make_session(
        engine, await make_user(engine), token=digest(token), at=clock.now, expires_at=clock.now + 7 * DAY - short_by
    )
    clock.advance(2 * DAY)
    found = await sessions.validate(token)
    assert found is not None
    assert found.refreshed is slides


async def test_the_expiry_never_moves_back(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    issued = await sessions.create(await make_user(engine))
    await engine.fetch("UPDATE sessions SET expires_at = $1", to_db(clock.now + 20 * DAY))
    clock.advance(2 * DAY)
    found = await sessions.validate(issued.token)
    assert found is not None
    assert found.refreshed is False
    assert found.session.expires_at == await expiry(engine) == clock.now + 18 * DAY


# -- what it costs ----------------------------------------------------------------------------------------------------


async def test_it_is_one_statement_that_writes_nothing_unless_due(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    issued = await sessions.create(await make_user(engine))
    statements: list[str] = []

    def note(query: asyncpg.connection.LoggedQuery) -> None:
        statements.append(query.query)

    async def validate(*, refresh: bool = True) -> tuple[int, bool]:
        """How many statements a check took, and whether it wrote or locked anything."""
        async with engine.transaction() as transaction:
            transaction.connection.add_query_logger(note)
            statements.clear()
            assert await sessions.validate(issued.token, refresh=refresh) is not None
            await anyio.lowlevel.checkpoint()  # the driver tells its loggers in the next turn of the loop
            taken = len(statements)
            transaction.connection.remove_query_logger(note)
            return taken, await engine.fetchval("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")

    assert await validate() == (1, False)
    clock.advance(DAY)
    assert await validate(refresh=False) == (1, False)
    assert await validate() == (1, True)
    assert await validate() == (1, False)


async def test_looking_only_works_on_a_replica(server: Server, database: str, clock: ManualClock) -> None:
    url = server.url(database)
    pooler = server.pooler is not None
    async with Engine(url, pooler=pooler, replicas={"r": url}) as engine:
        sessions = SessionService(engine, clock=clock)
        issued = await sessions.create(await make_user(engine))
        async with engine.transaction():
            await sessions.revoke_all(issued.session.user_id)
            assert await sessions.validate(issued.token, refresh=False) is None
            # The replica stands outside of the transaction.
            assert await sessions.validate(issued.token, refresh=False, node="r") is not None
        with pytest.raises(InvalidInputError, match="refresh=False"):
            await sessions.validate(issued.token, node="r")
        async with engine.transaction():
            await engine.fetch("SET TRANSACTION READ ONLY")
            assert await sessions.validate(issued.token, refresh=False) is None


@pytest.mark.direct
@pytest.mark.parametrize("tokens", ["digest", "plain", "digest+plain"])
async def test_looking_only_works_where_nothing_can_be_written(
    server: Server, database: str, clock: ManualClock, tokens: TokenStorage
) -> None:
    async with server.engine(database) as engine:
        service = SessionService(engine, clock=clock, tokens=tokens)
        issued = await service.create(await make_user(engine))
        await engine.fetch(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    async with server.engine(database) as engine:
        assert await engine.fetchval("SHOW transaction_read_only") == "on"
        service = SessionService(engine, clock=clock, tokens=tokens)
        found = await service.validate(issued.token, refresh=False)
        assert found is not None
        assert found.session == issued.session
        # The statement that slides cannot run there, even when nothing is due: this is why there are two.
        with pytest.raises(DatabaseUnavailableError) as raised:
            await engine.fetch(
                statements("sessions")["validate"], digest(issued.token), to_db(clock.now), 7 * DAY, DAY, 30 * DAY
            )
        assert isinstance(raised.value.__cause__, asyncpg.ReadOnlySQLTransactionError)


# -- many at once -----------------------------------------------------------------------------------------------------


class Ticking(ManualClock):
    """A clock of which every reading is a millisecond later, so that no two callers have the same instant."""

    def __call__(self) -> datetime:
        return self.advance(MILLISECOND)


@pytest.mark.parametrize("coalescing", [False, True])
async def test_of_fifty_at_once_one_slides(server: Server, database: str, coalescing: bool) -> None:
    async with server.engine(database, pool_size=25) as engine, AsyncExitStack() as stack:
        clock = Ticking()
        service = SessionService(engine, clock=clock, max_lifetime=None)
        tokens = [(await service.create(await make_user(engine))).token] * 50
        if coalescing:
            await stack.enter_async_context(service.coalescing())
        await validate_all(service, tokens)  # opens the connections, so that afterwards all ask at once
        await count_updates(engine)
        for _ in range(30):
            clock.advance(2 * DAY)
            found = await validate_all(service, tokens)
            assert all(found)
            assert any(each.refreshed for each in found if each)
        assert await engine.fetchval("SELECT count(*) FROM written") == 30


async def test_it_never_waits_for_a_lock(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    issued = await sessions.create(await make_user(engine))
    clock.advance(2 * DAY)
    connection = await engine.get_new_connection()
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM sessions FOR UPDATE")
            with anyio.fail_after(30):
                found = await sessions.validate(issued.token)
    finally:
        await connection.close()
    assert found is not None
    assert found.refreshed is False


async def test_a_revoked_session_never_comes_back(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    for _ in range(200):
        issued = await sessions.create(user_id)
        clock.advance(2 * DAY)
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(sessions.validate, issued.token)
            group.start_soon(sessions.revoke_all, user_id)
        assert await sessions.validate(issued.token) is None
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 0


async def test_each_caller_gets_the_answer_to_its_own_token(engine: Engine, sessions: SessionService) -> None:
    issued = [await sessions.create(await make_user(engine)) for _ in range(20)]
    tokens = [*(each.token for each in issued), *(new_token() for _ in range(5))] * 4
    expected = [*(each.session for each in issued), *[None] * 5] * 4
    found = await validate_all(sessions, tokens)
    assert [each and each.session for each in found] == expected
    assert [each and each.user.id for each in found] == [each and each.user_id for each in expected]


@pytest.mark.parametrize("live_first", [True, False])
async def test_each_caller_is_answered_for_its_own_instant(
    engine: Engine, clock: ManualClock, live_first: bool
) -> None:
    issued = await SessionService(engine, clock=clock).create(await make_user(engine), remember=False)
    order = [live_first, not live_first] * 20
    instants = iter([issued.session.expires_at - (MILLISECOND if live else 0 * DAY) for live in order])
    service = SessionService(engine, clock=lambda: next(instants))
    async with service.coalescing():
        found = await validate_all(service, [issued.token] * 40)
    assert [each is not None for each in found] == order


# -- waiting for each other -------------------------------------------------------------------------------------------


class Bar:
    """A lock on a table, which holds every validation up, and an eye on those that wait for it."""

    def __init__(
        self, locker: asyncpg.Connection[asyncpg.Record], observer: asyncpg.Connection[asyncpg.Record]
    ) -> None:
        self.locker = locker
        self.observer = observer

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        async with self.locker.transaction():
            await self.locker.execute("LOCK users")
            yield

    async def waiting(self) -> tuple[set[int], set[int]]:
        """The processes that wait for the lock: those with the statement for one caller, those with that for many."""
        rows = await self.observer.fetch(
            "SELECT pid, query LIKE '%asked%' AS many FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return {row["pid"] for row in rows if not row["many"]}, {row["pid"] for row in rows if row["many"]}

    async def until(self, *, ones: int, batches: int, others_than: Collection[int] = ()) -> tuple[set[int], set[int]]:
        """Wait until so many processes wait, none of them one of ``others_than``."""
        with anyio.fail_after(30):
            while True:
                single, many = await self.waiting()
                if (len(single), len(many)) == (ones, batches) and not (single | many) & set(others_than):
                    return single, many

    async def connections(self) -> int:
        """How many connections to the database there are beside this one's own."""
        found: int = await self.observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> ALL ($1)",
            [self.locker.get_server_pid(), self.observer.get_server_pid()],
        )
        return found


@pytest_asyncio.fixture
async def bar(server: Server, database: str) -> AsyncIterator[Bar]:
    url = server.url(database, direct=True)
    locker, observer = await asyncpg.connect(url), await asyncpg.connect(url)
    yield Bar(locker, observer)
    await locker.close()
    await observer.close()


class Crowd:
    """Callers that validate at the same time."""

    def __init__(self, service: SessionService) -> None:
        self.service = service
        self.answers: dict[str, SessionWithUser | Exception | None] = {}
        self.gone: set[str] = set()
        self._scopes: dict[str, anyio.CancelScope] = {}

    def cancel(self, name: str) -> None:
        self._scopes[name].cancel()

    async def ask(self, name: str, token: str) -> None:
        with anyio.CancelScope() as scope:
            self._scopes[name] = scope
            try:
                self.answers[name] = await self.service.validate(token)
            except Exception as error:  # noqa: BLE001 - it is what the test looks at
                self.answers[name] = error
        if scope.cancelled_caught:
            self.gone.add(name)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.lowlevel.checkpoint()


def all_found(crowd: Crowd) -> bool:
    return all(isinstance(answer, SessionWithUser) for answer in crowd.answers.values())


async def test_a_cancelled_caller_cancels_no_other(engine: Engine, clock: ManualClock, bar: Bar) -> None:
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    crowd = Crowd(service)
    async with service.coalescing(), anyio.create_task_group() as group, bar.closed():
        for name in "abcdefg":
            group.start_soon(crowd.ask, name, issued.token)
        await bar.until(ones=2, batches=0)
        crowd.cancel("d")  # it waits in the queue
        crowd.cancel("a")  # its statement runs; its lane goes to the next, who asks for all who wait
        await bar.until(ones=1, batches=1)
        crowd.cancel("c")  # it asks for all who wait, and another takes that over
        await until(lambda: {"a", "c", "d"} == crowd.gone)
        await bar.until(ones=1, batches=1)
    assert sorted(crowd.answers) == ["b", "e", "f", "g"]
    assert all_found(crowd)


async def test_a_caller_cancelled_by_asyncio_cancels_no_other(engine: Engine, clock: ManualClock, bar: Bar) -> None:
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    crowd = Crowd(service)
    async with service.coalescing():
        async with bar.closed():
            tasks = {name: asyncio.ensure_future(crowd.ask(name, issued.token)) for name in "abcdef"}
            await bar.until(ones=2, batches=0)
            tasks["a"].cancel()
            await bar.until(ones=1, batches=1)
            tasks["c"].cancel()
            await asyncio.wait([tasks["c"]])
        await asyncio.wait(tasks.values())
    assert sorted(crowd.answers) == ["b", "d", "e", "f"]
    assert all_found(crowd)


async def test_a_failing_batch_fails_its_own_callers_only(engine: Engine, clock: ManualClock, bar: Bar) -> None:
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    crowd = Crowd(service)
    async with service.coalescing(), anyio.create_task_group() as group, bar.closed():
        for name in "abcde":
            group.start_soon(crowd.ask, name, issued.token)
        await bar.until(ones=2, batches=0)
        crowd.cancel("a")
        _, (batch,) = await bar.until(ones=1, batches=1)
        await bar.observer.execute("SELECT pg_cancel_backend($1)", batch)
        await until(lambda: len(crowd.answers) == 3)
        for name in "xyz":
            group.start_soon(crowd.ask, name, issued.token)
    failed = dict.fromkeys("cde", asyncpg.QueryCanceledError)
    assert {name: type(answer) for name, answer in crowd.answers.items()} == failed | dict.fromkeys(
        "bxyz", SessionWithUser
    )


async def test_a_lost_connection_is_replaced(engine: Engine, clock: ManualClock, bar: Bar) -> None:
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    crowd = Crowd(service)
    async with service.coalescing(), anyio.create_task_group() as group, bar.closed():
        for name in "abcdef":
            group.start_soon(crowd.ask, name, issued.token)
        lost, _ = await bar.until(ones=2, batches=0)
        for pid in lost:
            await bar.observer.execute("SELECT pg_terminate_backend($1)", pid)
        await bar.until(ones=2, batches=0, others_than=lost)
    assert sorted(crowd.answers) == list("abcdef")
    assert all_found(crowd)


@pytest.mark.parametrize("coalescing", [False, True])
async def test_connections_lost_while_idle_are_replaced(
    engine: Engine, clock: ManualClock, bar: Bar, coalescing: bool
) -> None:
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    async with AsyncExitStack() as stack:
        if coalescing:
            await stack.enter_async_context(service.coalescing())
        assert all(await validate_all(service, [issued.token] * 10))
        await bar.observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> ALL ($1)",
            [bar.locker.get_server_pid(), bar.observer.get_server_pid()],
        )
        assert all(await validate_all(service, [issued.token] * 10))


async def test_inside_a_transaction_it_uses_its_connection(engine: Engine, clock: ManualClock) -> None:
    service = SessionService(engine, clock=clock)
    user_id = await make_user(engine)
    async with service.coalescing(), engine.transaction():
        issued = await service.create(user_id)
        assert await service.validate(issued.token) is not None
        assert await service.revoke_all(user_id) == 1
        assert await service.validate(issued.token) is None


async def test_leaving_answers_who_still_waits_and_closes_what_was_held(
    server: Server, database: str, clock: ManualClock, bar: Bar
) -> None:
    async with server.engine(database, pool_size=1) as engine:
        service = SessionService(engine, clock=clock)
        issued = await service.create(await make_user(engine))
        crowd = Crowd(service)
        async with anyio.create_task_group() as group, service.coalescing(), bar.closed():
            for name in "abcdef":
                group.start_soon(crowd.ask, name, issued.token)
            await bar.until(ones=2, batches=0)
        assert sorted(crowd.answers) == list("abcdef")
        assert all_found(crowd)
        assert await service.validate(issued.token) is not None
        if server.pooler is None:
            with anyio.fail_after(30):
                while await bar.connections() != 1:
                    await anyio.lowlevel.checkpoint()


async def test_it_works_without_named_statements(server: Server, database: str, clock: ManualClock) -> None:
    async with Engine(server.url(database), pooler=True) as engine:
        service = SessionService(engine, clock=clock)
        issued = [await service.create(await make_user(engine)) for _ in range(10)]
        async with service.coalescing():
            found = await validate_all(service, [each.token for each in issued] * 2)
        assert [each and each.session for each in found] == [each.session for each in issued] * 2


async def test_two_lanes_share_a_crowd(engine: Engine, clock: ManualClock) -> None:
    """A lane that answered a crowd waits for them to ask again, and leaves the other lane its half."""
    service = SessionService(engine, clock=clock)
    issued = await service.create(await make_user(engine))
    rounds, callers = 120, 16

    async def ask(times: int) -> None:
        for _ in range(times):
            assert await service.validate(issued.token) is not None

    async with service.coalescing():
        lanes = list(service._validator._free)
        begun = []
        for times in (1, rounds):  # the lanes connect in the first
            async with anyio.create_task_group() as group:
                for _ in range(callers):
                    group.start_soon(ask, times)
            begun.append(sum(lane._begun for lane in lanes))
    statements_run = begun[1] - begun[0]
    # About eight at a time. Where one lane has all of them, and the other the same caller again, it is twice as many.
    assert statements_run < 1.75 * rounds * callers / 8
