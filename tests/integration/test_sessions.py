"""Sessions: create, list, revoke. Validation and the sweep have files of their own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import anyio
import pytest
from racing import together, warm_up

from factories import make_session, make_user
from kitrocket.clock import from_db
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, SessionNotFreshError, UserNotFoundError
from kitrocket.models import IssuedSession, Session
from kitrocket.sessions import SessionService
from kitrocket.sessions.service import TokenStorage
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest

pytestmark = pytest.mark.asyncio

SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)


@pytest.fixture
def sessions(engine: Engine, clock: ManualClock) -> SessionService:
    return SessionService(engine, clock=clock)


async def count(engine: Engine, user_id: str) -> int:
    found: int = await engine.fetchval("SELECT count(*) FROM sessions WHERE user_id = $1", user_id)
    return found


# -- create -----------------------------------------------------------------------------------------------------------


async def test_a_new_session_lives_for_its_ttl(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    issued = await sessions.create(user_id, ip_address="203.0.113.7", user_agent="Firefox")
    assert issued.session == Session(
        id=issued.session.id,
        user_id=user_id,
        expires_at=clock.now + 7 * DAY,
        created_at=clock.now,
        seen_at=clock.now,
        ip_address="203.0.113.7",
        user_agent="Firefox",
    )
    row = await engine.fetchrow("SELECT * FROM sessions")
    assert row is not None
    assert row["id"] == issued.session.id != issued.token
    assert (from_db(row["expires_at"]), from_db(row["created_at"])) == (clock.now + 7 * DAY, clock.now)
    assert (row["ip_address"], row["user_agent"]) == ("203.0.113.7", "Firefox")


async def test_times_are_cut_to_milliseconds(engine: Engine) -> None:
    user_id = await make_user(engine)
    sessions = SessionService(engine, clock=lambda: datetime(2026, 3, 1, 12, 0, 0, 123_999, tzinfo=UTC))
    issued = await sessions.create(user_id)
    assert issued.session.created_at.microsecond == 123_000
    assert from_db(await engine.fetchval("SELECT created_at FROM sessions")) == issued.session.created_at


async def test_a_session_that_is_not_remembered_is_short_and_says_when_it_was_seen(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    issued = await sessions.create(await make_user(engine), remember=False)
    assert issued.session.expires_at == clock.now + DAY
    assert issued.session.seen_at == clock.now


async def test_the_cap_holds_from_the_start(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, max_lifetime=3 * DAY)
    issued = await sessions.create(await make_user(engine))
    assert issued.session.expires_at == clock.now + 3 * DAY


@pytest.mark.parametrize(
    ("tokens", "stored"),
    [("digest", digest), ("plain", str), ("digest+plain", digest)],
)
async def test_how_a_token_is_stored(engine: Engine, clock: ManualClock, tokens: TokenStorage, stored: type) -> None:
    issued = await SessionService(engine, clock=clock, tokens=tokens).create(await make_user(engine))
    assert await engine.fetchval("SELECT token FROM sessions") == stored(issued.token)


async def test_only_the_issued_session_carries_the_token(engine: Engine, sessions: SessionService) -> None:
    user_id = await make_user(engine)
    issued = await sessions.create(user_id)
    found = await sessions.validate(issued.token)
    listed = await sessions.list(user_id, current=issued.token)
    assert found is not None
    shown = [repr(issued), repr(found), repr(listed), found.model_dump_json(), issued.session.model_dump_json()]
    dump = str([tuple(row) for row in await engine.fetch("SELECT * FROM sessions")])
    assert not [text for text in [*shown, dump] if issued.token in text]
    assert not [text for text in shown if digest(issued.token) in text]


async def test_an_unknown_user_is_an_error_and_nothing_is_stored(engine: Engine, clock: ManualClock) -> None:
    for max_sessions in (None, 5):
        with pytest.raises(UserNotFoundError) as raised:
            await SessionService(engine, clock=clock, max_sessions=max_sessions).create("nobody")
        assert raised.value.user_id == "nobody"
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 0


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, None),
        ("", None),
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
async def test_ip_addresses(engine: Engine, sessions: SessionService, given: str | None, stored: str | None) -> None:
    issued = await sessions.create(await make_user(engine), ip_address=given)
    assert issued.session.ip_address == stored
    assert await engine.fetchval("SELECT ip_address FROM sessions") == stored


async def test_only_the_network_of_an_ipv6_address_by_option(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, ipv6_network_only=True)
    user_id = await make_user(engine)
    assert (await sessions.create(user_id, ip_address="2001:db8:1:2:3:4:5:6")).session.ip_address == "2001:db8:1:2::/64"
    assert (await sessions.create(user_id, ip_address="203.0.113.7")).session.ip_address == "203.0.113.7"


async def test_user_agents_are_cut(engine: Engine, sessions: SessionService) -> None:
    user_id = await make_user(engine)
    assert (await sessions.create(user_id, user_agent="é" * 1_000_000)).session.user_agent == "é" * 512
    assert (await sessions.create(user_id, user_agent="")).session.user_agent is None


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("user_id", {"user_id": ""}),
        ("user_id", {"user_id": None}),
        ("user_id", {"user_id": "a\0b"}),
        ("user_id", {"user_id": "a" * 256}),
        ("ip_address", {"ip_address": "300.1.1.1"}),
        ("ip_address", {"ip_address": "203.0.113.7, 10.0.0.1"}),
        ("ip_address", {"ip_address": "1" * 1_000_000}),
        ("ip_address", {"ip_address": 1}),
        ("user_agent", {"user_agent": "a\0b"}),
        ("user_agent", {"user_agent": "\ud800"}),
        ("user_agent", {"user_agent": b"Firefox"}),
        ("remember", {"remember": "yes"}),
    ],
)
async def test_create_with_bad_input(
    engine: Engine, sessions: SessionService, field: str, arguments: dict[str, object]
) -> None:
    user_id = await make_user(engine)
    with pytest.raises(InvalidInputError) as raised:
        await sessions.create(**{"user_id": user_id, **arguments})  # type: ignore[arg-type]
    assert raised.value.field == field
    assert await engine.fetchval("SELECT count(*) FROM sessions") == 0


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("ttl", {"ttl": timedelta(0)}),
        ("ttl", {"ttl": 604_800}),
        ("update_age", {"update_age": 7 * DAY}),
        ("update_age", {"update_age": -DAY}),
        ("max_lifetime", {"max_lifetime": timedelta(0)}),
        ("max_sessions", {"max_sessions": 0}),
        ("tokens", {"tokens": "hashed"}),
    ],
)
async def test_settings_that_cannot_be(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as raised:
        SessionService(Engine("postgres://nowhere.invalid/x"), **arguments)  # type: ignore[arg-type]
    assert raised.value.field == field


async def test_a_session_is_fresh_for_a_while(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, fresh_age=timedelta(hours=1))
    session = (await sessions.create(await make_user(engine))).session
    clock.advance(timedelta(hours=1) - SECOND)
    assert sessions.is_fresh(session)
    sessions.require_fresh(session)
    clock.advance(SECOND)
    assert not sessions.is_fresh(session)
    with pytest.raises(SessionNotFreshError) as caught:
        sessions.require_fresh(session)
    assert caught.value.session_id == session.id
    clock.advance(SECOND)
    with pytest.raises(SessionNotFreshError):
        sessions.require_fresh(session)
    assert SessionService(engine, clock=clock, fresh_age=timedelta(0)).is_fresh(session)


# -- a limit of sessions ----------------------------------------------------------------------------------------------


async def test_the_oldest_sessions_make_room(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, max_sessions=2)
    user_id, other = await make_user(engine), await make_user(engine)
    expired = await make_session(engine, user_id, expires_at=clock.now - SECOND, at=clock.now - 8 * DAY)
    await sessions.create(other)
    issued: list[IssuedSession] = []
    for _ in range(3):
        clock.advance(SECOND)
        issued.append(await sessions.create(user_id))
    assert [each.id for each in await sessions.list(user_id)] == [issued[2].session.id, issued[1].session.id]
    assert await sessions.validate(issued[0].token) is None
    assert await count(engine, other) == 1
    # An expired session does not count, and is left to the sweep.
    assert await engine.fetchval("SELECT count(*) FROM sessions WHERE id = $1", expired) == 1


async def test_twenty_logins_at_once_leave_exactly_the_limit(engine: Engine, clock: ManualClock) -> None:
    sessions = SessionService(engine, clock=clock, max_sessions=5)
    user_id = await make_user(engine)
    await warm_up(engine)
    issued = await together([lambda: sessions.create(user_id)] * 20)
    assert await count(engine, user_id) == 5
    live = [each for each in issued if isinstance(each, IssuedSession) and await sessions.validate(each.token)]
    assert len(live) == 5


# -- list -------------------------------------------------------------------------------------------------------------


async def test_a_list_shows_live_sessions_newest_first(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    start = clock.now
    first = await sessions.create(user_id, ip_address="203.0.113.7", user_agent="Firefox")
    await sessions.create(other)
    clock.advance(SECOND)
    second = await sessions.create(user_id)
    await make_session(engine, user_id, expires_at=clock.now, at=start - 7 * DAY)
    await make_session(engine, user_id, expires_at=clock.now + DAY, at=clock.now - 30 * DAY)
    listed = await sessions.list(user_id, current=first.token)
    assert isinstance(listed, list)
    assert listed == [second.session, first.session.model_copy(update={"is_current": True})]
    assert await sessions.list("nobody") == []


async def test_a_list_reads_what_better_auth_writes(engine: Engine, sessions: SessionService) -> None:
    user_id = await make_user(engine)
    await make_session(engine, user_id, ip_address="", user_agent="")
    (session,) = await sessions.list(user_id)
    assert (session.ip_address, session.user_agent) == (None, None)


async def test_when_a_session_was_seen(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    issued = await sessions.create(user_id)
    clock.advance(2 * DAY)
    await sessions.validate(issued.token)
    (session,) = await sessions.list(user_id)
    assert session.seen_at == clock.now


async def test_pages(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    for number in range(7):  # three of one instant, so that the id decides
        await make_session(engine, user_id, id=f"s{number}", at=clock.now - SECOND * (number // 3))
    expected = ["s2", "s1", "s0", "s5", "s4", "s3", "s6"]
    for as_id in (True, False):
        seen: list[str] = []
        after: Session | str | None = None
        while page := await sessions.list(user_id, limit=2, after=after):
            seen += [session.id for session in page]
            after = page[-1].id if as_id else page[-1]
        assert seen == expected
    assert isinstance(after, Session)
    # The session of a page before may be revoked; a session leads on, its id alone does not.
    page = await sessions.list(user_id, limit=2)
    await sessions.revoke("s1", user_id=user_id)
    assert [session.id for session in await sessions.list(user_id, limit=2, after=page[-1])] == ["s0", "s5"]
    assert await sessions.list(user_id, limit=2, after="s1") == []


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("user_id", {"user_id": ""}),
        ("limit", {"limit": 0}),
        ("limit", {"limit": True}),
        ("limit", {"limit": 1.5}),
        ("limit", {"limit": 10**9}),
        ("after", {"after": 5}),
        ("after", {"after": "a\0"}),
        ("current", {"current": b"token"}),
    ],
)
async def test_list_with_bad_input(sessions: SessionService, field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as raised:
        await sessions.list(**{"user_id": "somebody", **arguments})  # type: ignore[arg-type]
    assert raised.value.field == field


# -- revoke -----------------------------------------------------------------------------------------------------------


async def test_revoke_one(engine: Engine, sessions: SessionService) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    issued = await sessions.create(user_id)
    assert await sessions.revoke(issued.session.id, user_id=other) is False
    assert await sessions.validate(issued.token) is not None
    assert await sessions.revoke(issued.session.id, user_id=user_id) is True
    assert await sessions.validate(issued.token) is None
    assert await sessions.revoke(issued.session.id, user_id=user_id) is False


async def test_revoke_others_keeps_one_and_counts_the_expired(
    engine: Engine, sessions: SessionService, clock: ManualClock
) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    for number in range(500):
        await make_session(engine, user_id, expires_at=clock.now + (DAY if number % 2 else -DAY))
    await sessions.create(other)
    current = await sessions.create(user_id)
    assert await sessions.revoke_others(user_id, keep=current.token) == 500
    assert [session.id for session in await sessions.list(user_id)] == [current.session.id]
    assert await count(engine, user_id) == 1
    assert await count(engine, other) == 1


@pytest.mark.parametrize("tokens", ["digest", "plain", "digest+plain"])
async def test_a_token_to_keep_that_is_not_the_users_protects_nothing(
    engine: Engine, clock: ManualClock, tokens: TokenStorage
) -> None:
    sessions = SessionService(engine, clock=clock, tokens=tokens)
    user_id, other = await make_user(engine), await make_user(engine)
    foreign = await sessions.create(other)
    for keep in (foreign.token, "", "junk", "x" * 32, "x" * 1_000_000):
        issued = await sessions.create(user_id)
        assert await sessions.revoke_others(user_id, keep=keep) == 1
        assert await sessions.validate(issued.token) is None
    issued = await sessions.create(user_id)
    stored = await engine.fetchval("SELECT token FROM sessions WHERE user_id = $1", user_id)
    assert await sessions.revoke_others(user_id, keep=stored) == (0 if stored == issued.token else 1)
    assert await sessions.validate(foreign.token) is not None


async def test_revoke_all_and_many(engine: Engine, sessions: SessionService, clock: ManualClock) -> None:
    first, second, third = [await make_user(engine) for _ in range(3)]
    for user_id in (first, second, third):
        await sessions.create(user_id)
        await make_session(engine, user_id, expires_at=clock.now - DAY)
    assert await sessions.revoke_all("nobody") == 0
    assert await sessions.revoke_all(first) == 2
    assert await sessions.revoke_many([first, second, "nobody"]) == 2
    assert await sessions.revoke_many([]) == 0
    assert await count(engine, third) == 2


async def test_revoke_a_thousand_users_at_once(engine: Engine, sessions: SessionService) -> None:
    await engine.fetch(
        "INSERT INTO users (id, email, name)"
        " SELECT 'u' || i, i || '@example.com', 'Ada' FROM generate_series(1, 1000) i"
    )
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at)"
        " SELECT 's' || i || '-' || j, 'u' || i, 't' || i || '-' || j, '2026-03-08'"
        " FROM generate_series(1, 1000) i, generate_series(1, 3) j"
    )
    assert await sessions.revoke_many(f"u{number}" for number in range(1, 1001)) == 3000


async def test_revocations_in_opposite_order_do_not_deadlock(engine: Engine, sessions: SessionService) -> None:
    users = [await make_user(engine) for _ in range(20)]
    for _ in range(10):
        await engine.fetch(
            "INSERT INTO sessions (id, user_id, token, expires_at)"
            " SELECT gen_random_uuid(), u, gen_random_uuid(), '2026-03-08'"
            " FROM unnest($1::text[]) u, generate_series(1, 100)",
            users,
        )
        counts: list[int] = []

        async def revoke(order: list[str], counts: list[int] = counts) -> None:
            counts.append(await sessions.revoke_many(order))

        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(revoke, users if number % 2 else users[::-1])
        assert sum(counts) == 2000


@pytest.mark.parametrize("user_ids", ["somebody", None, 5, [""], [None], ["a", "b\0"]])
async def test_revoke_many_with_bad_input(sessions: SessionService, user_ids: object) -> None:
    with pytest.raises(InvalidInputError):
        await sessions.revoke_many(user_ids)  # type: ignore[arg-type]


async def test_revoke_with_bad_input(sessions: SessionService) -> None:
    with pytest.raises(InvalidInputError):
        await sessions.revoke("", user_id="somebody")
    with pytest.raises(InvalidInputError):
        await sessions.revoke("session", user_id="a" * 256)
    with pytest.raises(InvalidInputError):
        await sessions.revoke_others("somebody", keep=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        await sessions.revoke_all(5)  # type: ignore[arg-type]


async def test_what_is_done_in_a_transaction_is_undone_with_it(engine: Engine, sessions: SessionService) -> None:
    user_id = await make_user(engine)
    kept = await sessions.create(user_id)
    with pytest.raises(RuntimeError):
        async with engine.transaction():
            undone = await sessions.create(user_id)
            assert await sessions.validate(undone.token) is not None
            assert await sessions.revoke_all(user_id) == 2
            raise RuntimeError
    assert await sessions.validate(undone.token) is None
    assert await sessions.validate(kept.token) is not None
