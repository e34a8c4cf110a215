"""Passwords and addresses that change, and the sessions that go with them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import anyio.lowlevel
import argon2
import asyncpg
import pytest
from racing import together, until_someone_waits, warm_up

from factories import AT, make_account, make_session, make_user
from kitrocket import KitRocket, Settings
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import EmailTakenError, InvalidInputError, UserNotFoundError, WrongPasswordError
from kitrocket.models import CredentialChange, IssuedSession
from kitrocket.sessions import SessionService
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest, new_token
from kitrocket.users import UserService
from servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("cheap_hashes")]

OLD, NEW = "correct horse", "battery staple"
SECOND = timedelta(seconds=1)
TTL, SHORT_TTL = timedelta(days=7), timedelta(days=1)


@pytest.fixture
def kit(engine: Engine, clock: ManualClock) -> KitRocket:
    return KitRocket(Settings(), engine=engine, clock=clock, background=False)


@pytest.fixture
def old_hash(cheap_hashes: argon2.PasswordHasher) -> str:
    return cheap_hashes.hash(OLD)


async def make_login(engine: Engine, old_hash: str, *, email: str | None = None) -> str:
    """A user whose password is OLD."""
    user_id = await make_user(engine, email=email)
    await make_account(engine, user_id, provider="credential", password=old_hash)
    return user_id


async def dump(engine: Engine) -> list[str]:
    """Every row of the tables that a credential touches."""
    rows: list[str] = []
    for table in ("users", "accounts", "sessions"):
        rows += [row[0] for row in await engine.fetch(f"SELECT {table}::text FROM {table} ORDER BY id")]
    return rows


async def count(engine: Engine, user_id: str) -> int:
    found = await engine.fetchval("SELECT count(*)::int FROM sessions WHERE user_id = $1", user_id)
    assert isinstance(found, int)
    return found


# -- change_password ------------------------------------------------------------------------------------------------


async def test_a_new_password_ends_the_other_sessions_and_renews_the_kept_one(
    kit: KitRocket, engine: Engine, clock: ManualClock, old_hash: str
) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    mine = await kit.sessions.create(user_id, ip_address="203.0.113.7", user_agent="Firefox")
    others = [await kit.sessions.create(user_id) for _ in range(3)]
    for _ in range(2):
        await make_session(engine, user_id, expires_at=AT - SECOND)
    stranger = await kit.sessions.create(await make_user(engine))
    clock.advance(timedelta(hours=5))
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token)
    assert change.revoked == 5
    assert change.user == await kit.users.get(user_id)
    assert change.issued is not None
    assert change.issued.token != mine.token
    assert change.issued.session == mine.session.model_copy(
        update={
            "id": change.issued.session.id,
            "created_at": clock.now,
            "seen_at": clock.now,
            "expires_at": clock.now + TTL,
        }
    )
    assert change.issued.session.id != mine.session.id
    for issued in (mine, *others):
        assert await kit.sessions.validate(issued.token) is None
    found = await kit.sessions.validate(change.issued.token)
    assert found is not None
    assert found.session == change.issued.session
    assert await kit.sessions.validate(stranger.token) is not None
    assert await kit.users.authenticate(email="ada@example.com", password=OLD) is None
    assert await kit.users.authenticate(email="ada@example.com", password=NEW) == change.user


async def test_services_alone_share_how_sessions_live(engine: Engine, clock: ManualClock, old_hash: str) -> None:
    sessions = SessionService(
        engine, clock=clock, ttl=2 * TTL, short_ttl=timedelta(hours=3), max_lifetime=None, tokens="plain"
    )
    users = UserService(engine, clock=clock, rotation=sessions.rotation)
    user_id = await make_login(engine, old_hash)
    kept = {remember: await sessions.create(user_id, remember=remember) for remember in (True, False)}
    clock.advance(timedelta(hours=1))
    current, new = OLD, NEW
    for remember, life in ((True, 2 * TTL), (False, timedelta(hours=3))):
        keep = kept[remember].token
        change = await users.change_password(user_id, current=current, new=new, keep=keep, revoke="none")
        current, new = new, current
        assert change.issued is not None
        found = await sessions.validate(change.issued.token)
        assert found is not None
        assert found.session.expires_at == clock.now + life


@pytest.mark.parametrize(("revoke", "left", "is_kept"), [("none", 3, True), ("others", 1, True), ("all", 0, False)])
async def test_which_sessions_end(
    kit: KitRocket, engine: Engine, old_hash: str, revoke: Any, left: int, is_kept: bool
) -> None:
    user_id = await make_login(engine, old_hash)
    mine, *_ = [await kit.sessions.create(user_id) for _ in range(3)]
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token, revoke=revoke)
    assert (await count(engine, user_id), change.revoked) == (left, 3 - left)
    assert (change.issued is not None) is is_kept
    assert await kit.sessions.validate(mine.token) is None


async def test_a_token_to_keep_that_is_not_the_users_protects_nothing(
    kit: KitRocket, engine: Engine, old_hash: str
) -> None:
    stranger = await kit.sessions.create(await make_user(engine))
    stored = await engine.fetchval("SELECT token FROM sessions")
    for keep in (None, "", "junk", "\0", "x" * 100_000, new_token(), stranger.token, stored):
        user_id = await make_login(engine, old_hash)
        await kit.sessions.create(user_id)
        change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=keep)
        assert (change.issued, change.revoked, await count(engine, user_id)) == (None, 1, 0)
    assert await kit.sessions.validate(stranger.token) is not None


@pytest.mark.parametrize("late", [-1, 0, 1])
@pytest.mark.parametrize("end", ["expiry", "cap"])
async def test_only_a_live_session_is_kept(
    kit: KitRocket, engine: Engine, clock: ManualClock, old_hash: str, end: str, late: int
) -> None:
    user_id = await make_login(engine, old_hash)
    token = new_token()
    created_at, expires_at = (AT, AT + TTL) if end == "expiry" else (AT - timedelta(days=30) + TTL, AT + 9 * TTL)
    await make_session(engine, user_id, token=digest(token), at=created_at, expires_at=expires_at)
    clock.now = AT + TTL + late * SECOND
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=token)
    assert (change.issued is not None) is (late < 0)
    assert change.revoked == (late >= 0)


@pytest.mark.parametrize(("beyond", "life"), [(-1, SHORT_TTL), (0, TTL), (1, TTL)])
async def test_a_short_session_stays_short(
    kit: KitRocket, engine: Engine, clock: ManualClock, old_hash: str, beyond: int, life: timedelta
) -> None:
    user_id = await make_login(engine, old_hash)
    token = new_token()
    length = TTL - timedelta(seconds=60) + beyond * SECOND
    await make_session(engine, user_id, token=digest(token), expires_at=AT + length)
    clock.advance(timedelta(hours=1))
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=token)
    assert change.issued is not None
    assert change.issued.session.expires_at == clock.now + life
    clock.advance(life - SECOND)
    found = await kit.sessions.validate(change.issued.token)
    assert found is not None
    assert found.refreshed is (life == TTL), "a short one never slides"


async def test_the_cap_holds_for_the_kept_session(engine: Engine, clock: ManualClock, old_hash: str) -> None:
    for cap, life in ((timedelta(days=3), timedelta(days=3)), (None, TTL)):
        settings = Settings(session_max_lifetime=cap)
        kit = KitRocket(settings, engine=engine, clock=clock, background=False)
        user_id = await make_login(engine, old_hash)
        mine = await kit.sessions.create(user_id)
        change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token)
        assert change.issued is not None
        assert change.issued.session.expires_at == clock.now + life
        assert await engine.fetchval("SELECT max(expires_at) FROM sessions WHERE user_id = $1", user_id) == to_db(
            clock.now + life
        )


@pytest.mark.parametrize(
    ("mode", "form"),
    [("digest", digest), ("plain", str), ("digest+plain", digest), ("digest+plain", str)],
    ids=["digest", "plain", "both, stored as digest", "both, stored plain"],
)
async def test_the_kept_session_is_stored_as_tokens_are(
    engine: Engine, clock: ManualClock, old_hash: str, mode: Any, form: Callable[[str], str]
) -> None:
    kit = KitRocket(Settings(session_tokens=mode), engine=engine, clock=clock, background=False)
    user_id = await make_login(engine, old_hash)
    token = new_token()
    await make_session(engine, user_id, token=form(token))
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=token)
    assert change.issued is not None
    renewed = change.issued.token
    assert await engine.fetchval("SELECT token FROM sessions") == (renewed if mode == "plain" else digest(renewed))
    assert await kit.sessions.validate(token) is None
    assert await kit.sessions.validate(renewed) is not None


async def test_a_rollback_restores_all(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    mine, other = await kit.sessions.create(user_id), await kit.sessions.create(user_id)
    before = await dump(engine)
    with pytest.raises(ZeroDivisionError):
        async with kit.transaction():
            change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token)
            assert change.issued is not None
            assert await kit.sessions.validate(mine.token) is None
            raise ZeroDivisionError
    assert await dump(engine) == before
    for issued in (mine, other):
        assert await kit.sessions.validate(issued.token) is not None
    assert await kit.users.authenticate(email="ada@example.com", password=OLD) is not None


@pytest.mark.parametrize("event", ["DELETE ON sessions", "UPDATE ON sessions", "UPDATE ON accounts"])
async def test_a_fault_anywhere_changes_nothing(kit: KitRocket, engine: Engine, old_hash: str, event: str) -> None:
    user_id = await make_login(engine, old_hash)
    mine, _ = await kit.sessions.create(user_id), await kit.sessions.create(user_id)
    before = await dump(engine)
    await engine.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a fault'; END $$"
    )
    await engine.fetch(f"CREATE TRIGGER refuse AFTER {event} FOR EACH ROW EXECUTE FUNCTION refuse()")
    with pytest.raises(asyncpg.RaiseError):
        await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token)
    assert await dump(engine) == before


async def test_a_wrong_password_changes_nothing(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    user_id = await make_login(engine, old_hash)
    without = await make_user(engine)
    await make_account(engine, without, provider="credential", password="")
    mine = await kit.sessions.create(user_id)
    before = await dump(engine)
    for owner, wrong in ((user_id, NEW), (user_id, ""), (user_id, "\0"), (user_id, "x" * 10_000), (without, OLD)):
        with pytest.raises(WrongPasswordError) as caught:
            await kit.users.change_password(owner, current=wrong, new=NEW, keep=mine.token)
        assert not wrong or wrong not in f"{caught.value!r} {caught.value}"
    with pytest.raises(UserNotFoundError):
        await kit.users.change_password("nobody", current=OLD, new=NEW)
    for bad in ("short", "x" * 129, "new\0password", 5):
        with pytest.raises(InvalidInputError) as refused:
            await kit.users.change_password(user_id, current=OLD, new=bad)  # type: ignore[arg-type]  # on purpose
        assert refused.value.field == "new"
    for revoke in ("other", None, ["all"]):
        with pytest.raises(InvalidInputError) as refused:
            await kit.users.change_password(user_id, current=OLD, new=NEW, revoke=revoke)  # type: ignore[arg-type]
        assert refused.value.field == "revoke"
    assert await dump(engine) == before


async def test_no_secret_is_in_the_repr_of_a_change(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    user_id = await make_login(engine, old_hash)
    mine = await kit.sessions.create(user_id)
    change = await kit.users.change_password(user_id, current=OLD, new=NEW, keep=mine.token)
    assert change.issued is not None
    assert change.issued.token not in repr(change)


async def test_of_many_changes_at_once_one_wins(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    await warm_up(engine)
    words = [f"{NEW} {number}" for number in range(10)]
    answers = await together([partial(kit.users.change_password, user_id, current=OLD, new=new) for new in words])
    won = [new for new, answer in zip(words, answers, strict=True) if isinstance(answer, CredentialChange)]
    assert len(won) == 1
    assert sum(isinstance(answer, WrongPasswordError) for answer in answers) == 9
    assert await kit.users.authenticate(email="ada@example.com", password=won[0]) is not None


async def while_waiting(
    engine: Engine, call: Callable[[], Awaitable[object]], user_id: str, sql: str, *arguments: object
) -> object:
    """Start a call that waits for the user's row; change something under that lock; return the call's answer."""
    answers: list[object] = []

    async def run() -> None:
        answers.extend(await together([call]))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until_someone_waits(engine)
            await other.execute(sql, *arguments)
            await transaction.commit()
    return answers[0]


@pytest.mark.parametrize(("meanwhile", "answer"), [(OLD, CredentialChange), ("something else", WrongPasswordError)])
async def test_a_hash_that_was_replaced_meanwhile_is_verified_again(
    kit: KitRocket,
    engine: Engine,
    old_hash: str,
    cheap_hashes: argon2.PasswordHasher,
    meanwhile: str,
    answer: type[object],
) -> None:
    user_id = await make_login(engine, old_hash)
    found = await while_waiting(
        engine,
        partial(kit.users.change_password, user_id, current=OLD, new=NEW),
        user_id,
        "UPDATE accounts SET password = $1",
        cheap_hashes.hash(meanwhile),
    )
    assert isinstance(found, answer)


async def test_changing_and_revoking_at_once_never_deadlock(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    for _ in range(30):
        user_id = await make_login(engine, old_hash)
        issued = [await kit.sessions.create(user_id) for _ in range(6)]
        answers = await together(
            [
                partial(kit.users.change_password, user_id, current=OLD, new=NEW, keep=issued[3].token),
                partial(kit.sessions.revoke_all, user_id),
                partial(kit.sessions.revoke_others, user_id, keep=issued[0].token),
            ]
        )
        assert [type(answer).__name__ for answer in answers] == ["CredentialChange", "int", "int"]
        assert await kit.sessions.validate(issued[3].token) is None


async def test_sessions_are_locked_in_the_order_of_their_ids(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    """Who holds the first and wants the last finds nobody who holds the last and wants the first."""
    user_id = await make_login(engine, old_hash)
    kept = "A" * 32
    for id, token in (("z", kept), ("m", "other"), ("a", "x" * 32)):
        await make_session(engine, user_id, id=id, token=digest(token))
    answers: list[object] = []

    async def change() -> None:
        answers.append(await kit.users.change_password(user_id, current=OLD, new=NEW, keep=kept))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM sessions WHERE id = 'a' FOR UPDATE")
        async with anyio.create_task_group() as group:
            group.start_soon(change)
            await until_someone_waits(engine)
            await other.execute("SELECT FROM sessions WHERE id IN ('m', 'z') FOR UPDATE NOWAIT")
            await transaction.rollback()
    assert isinstance(answers[0], CredentialChange)


async def test_a_session_that_slides_meanwhile_is_not_brought_back(
    kit: KitRocket, engine: Engine, clock: ManualClock, old_hash: str
) -> None:
    for _ in range(50):
        user_id = await make_login(engine, old_hash)
        mine, other = await kit.sessions.create(user_id), await kit.sessions.create(user_id)
        clock.advance(timedelta(days=2))
        answers = await together(
            [
                partial(kit.sessions.validate, other.token),
                partial(kit.users.change_password, user_id, current=OLD, new=NEW, keep=mine.token),
                partial(kit.sessions.validate, mine.token),
            ]
        )
        change = answers[1]
        assert isinstance(change, CredentialChange)
        assert change.issued is not None
        assert change.issued.session.expires_at == clock.now + TTL
        assert [await kit.sessions.validate(issued.token) for issued in (mine, other)] == [None, None]


# -- create, with a session -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["users", "accounts", "sessions"])
async def test_a_fault_while_signing_up_leaves_nothing(kit: KitRocket, engine: Engine, table: str) -> None:
    async def sign_up() -> IssuedSession:
        async with kit.transaction():
            user = await kit.users.create(email="ada@example.com", name="Ada", password=OLD)
            return await kit.sessions.create(user.id)

    await engine.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a fault'; END $$"
    )
    await engine.fetch(f"CREATE TRIGGER refuse AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()")
    with pytest.raises(asyncpg.RaiseError):
        await sign_up()
    assert await dump(engine) == []
    await engine.fetch(f"DROP TRIGGER refuse ON {table}")
    assert await kit.sessions.validate((await sign_up()).token) is not None


async def test_what_is_stored_is_utc_wherever_clock_process_and_database_are(
    engine: Engine, server: Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_york = ZoneInfo("America/New_York")
    await engine.fetch(f"ALTER DATABASE {database} SET timezone = 'America/New_York'")
    await engine.fetch(f"ALTER ROLE CURRENT_USER IN DATABASE {database} SET timezone = 'America/New_York'")
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        async with server.engine(database) as elsewhere:
            settings = Settings(secret="s" * 32)
            kit = KitRocket(settings, engine=elsewhere, clock=lambda: AT.astimezone(new_york), background=False)
            await kit.users.create(email="ada@example.com", name="Ada", password=OLD)
            issued = await kit.sign_in(email="ada@example.com", password=OLD)
            assert issued is not None
            token = await kit.users.request_verification("ada@example.com")
            assert token is not None
            user = await kit.users.verify_email(token)
            change = await kit.users.change_password(user.id, current=OLD, new=NEW, keep=issued.token)
            arrived = await kit.accounts.sign_in(
                provider="github",
                provider_account_id="42",
                email="new@example.com",
                email_verified=True,
                access_token="a",
                expires_at=AT.astimezone(new_york),
            )
            exported = await kit.users.export(user.id)
    finally:
        monkeypatch.undo()
        time.tzset()
    users = await engine.fetch("SELECT created_at, updated_at, email_verified FROM users")
    accounts = await engine.fetch("SELECT created_at, coalesce(expires_at, created_at) FROM accounts")
    sessions = await engine.fetch("SELECT created_at, expires_at - interval '7 days' FROM sessions")
    assert {instant for row in (*users, *accounts, *sessions) for instant in row} == {to_db(AT)}
    assert change.issued is not None
    assert (change.issued.session.created_at, arrived.account.expires_at, user.email_verified) == (AT, AT, AT)
    assert exported.user["email_verified"] == "2026-03-01T12:00:00+00:00"


# -- sign_in --------------------------------------------------------------------------------------------------------


async def test_sign_in_starts_a_session(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    issued = await kit.sign_in(
        email="Ada@Example.com ", password=OLD, ip_address="203.0.113.7", user_agent="Firefox", remember=False
    )
    assert issued is not None
    assert (issued.session.user_id, issued.session.ip_address, issued.session.user_agent) == (
        user_id,
        "203.0.113.7",
        "Firefox",
    )
    assert issued.session.expires_at == AT + SHORT_TTL
    assert await kit.sessions.validate(issued.token) is not None


async def test_sign_in_answers_none_to_everybody_else(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    await make_login(engine, old_hash, email="ada@example.com")
    for email, password in (
        ("ada@example.com", NEW),
        ("eve@example.com", OLD),
        ("junk", OLD),
        ("\0", "\ud800"),
        ("x" * 1_000_000, "x" * 1_000_000),
    ):
        assert await kit.sign_in(email=email, password=password) is None
    for field, bad in (("email", 5), ("password", None), ("ip_address", "no address"), ("remember", "yes")):
        with pytest.raises(InvalidInputError) as caught:
            await kit.sign_in(**{"email": "ada@example.com", "password": OLD} | {field: bad})  # type: ignore[arg-type]
        assert caught.value.field == field
    assert await engine.fetchval("SELECT count(*)::int FROM sessions") == 0


async def test_sign_in_renews_an_old_hash(
    kit: KitRocket, engine: Engine, old_hash: str, cheap_hashes: argon2.PasswordHasher
) -> None:
    weaker = argon2.PasswordHasher(time_cost=1, memory_cost=16, parallelism=1).hash(OLD)
    user_id = await make_login(engine, weaker, email="ada@example.com")
    answers = await together([partial(kit.sign_in, email="ada@example.com", password=OLD)] * 10)
    assert sum(isinstance(answer, IssuedSession) for answer in answers) == 10
    assert await count(engine, user_id) == 10
    assert not cheap_hashes.check_needs_rehash(await engine.fetchval("SELECT password FROM accounts"))


async def test_sign_in_joins_a_transaction(kit: KitRocket, engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with kit.transaction():
            await kit.users.create(email="ada@example.com", name="Ada", password=OLD)
            assert await kit.sign_in(email="ada@example.com", password=OLD) is not None
            raise ZeroDivisionError
    assert await dump(engine) == []


async def test_a_user_keeps_the_newest_sessions_however_many_sign_in(
    engine: Engine, clock: ManualClock, old_hash: str
) -> None:
    kit = KitRocket(Settings(session_max_sessions=5), engine=engine, clock=clock, background=False)
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    await together([partial(kit.sign_in, email="ada@example.com", password=OLD)] * 20)
    assert await count(engine, user_id) == 5


async def test_no_session_made_with_the_old_password_remains(kit: KitRocket, engine: Engine, old_hash: str) -> None:
    async def later(steps: int, email: str) -> object:
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        return await kit.sign_in(email=email, password=OLD)

    signed_in = 0
    for round_ in range(200):
        email = f"ada{round_}@example.com"
        user_id = await make_login(engine, old_hash, email=email)
        change = partial(kit.users.change_password, user_id, current=OLD, new=NEW)
        answers = await together([change, *(partial(later, steps, email) for steps in (0, 3 * round_ % 40))])
        assert isinstance(answers[0], CredentialChange)
        signed_in += sum(isinstance(answer, IssuedSession) for answer in answers)
        assert await count(engine, user_id) == 0
    assert signed_in


@pytest.mark.parametrize(("meanwhile", "sessions"), [(NEW, 0), (OLD, 1)])
async def test_a_password_that_was_changed_before_the_session_was_made(
    kit: KitRocket,
    engine: Engine,
    old_hash: str,
    cheap_hashes: argon2.PasswordHasher,
    meanwhile: str,
    sessions: int,
) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    found = await while_waiting(
        engine,
        partial(kit.sign_in, email="ada@example.com", password=OLD),
        user_id,
        "UPDATE accounts SET password = $1",
        cheap_hashes.hash(meanwhile),
    )
    assert isinstance(found, IssuedSession) is bool(sessions)
    assert await count(engine, user_id) == sessions


async def test_an_address_that_was_given_up_before_the_session_was_made(
    kit: KitRocket, engine: Engine, old_hash: str
) -> None:
    user_id = await make_login(engine, old_hash, email="ada@example.com")
    found = await while_waiting(
        engine,
        partial(kit.sign_in, email="ada@example.com", password=OLD),
        user_id,
        "UPDATE users SET email = 'new@example.com'",
    )
    assert found is None
    assert await count(engine, user_id) == 0


# -- change_email ---------------------------------------------------------------------------------------------------


async def test_a_new_address_is_not_verified_and_ends_the_other_sessions(
    kit: KitRocket, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    mine = await kit.sessions.create(user_id)
    other = await kit.sessions.create(user_id)
    clock.advance(timedelta(hours=5))
    change = await kit.users.change_email(user_id, email=" Lovelace@Example.com", keep=mine.token)
    assert (change.user.email, change.user.email_verified, change.user.updated_at) == (
        "lovelace@example.com",
        None,
        clock.now,
    )
    assert change.user == await kit.users.get(user_id)
    assert change.revoked == 1
    assert change.issued is not None
    assert change.issued.session == mine.session.model_copy(update={"id": change.issued.session.id}), "no younger"
    assert [await kit.sessions.validate(issued.token) for issued in (mine, other)] == [None, None]
    assert await kit.sessions.validate(change.issued.token) is not None


@pytest.mark.parametrize(("revoke", "left"), [("none", 2), ("others", 0), ("all", 0)])
async def test_which_sessions_a_new_address_ends(kit: KitRocket, engine: Engine, revoke: Any, left: int) -> None:
    user_id = await make_user(engine)
    for _ in range(2):
        await kit.sessions.create(user_id)
    change = await kit.users.change_email(user_id, email="new@example.com", revoke=revoke)
    assert (change.revoked, await count(engine, user_id)) == (2 - left, left)


async def test_the_same_address_changes_nothing(kit: KitRocket, engine: Engine) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    mine = await kit.sessions.create(user_id)
    before = await dump(engine)
    change = await kit.users.change_email(user_id, email="ADA@example.com", keep=mine.token)
    assert (change.user.email_verified, change.issued, change.revoked) == (AT, None, 0)
    assert await dump(engine) == before


async def test_an_address_that_is_taken_or_none_changes_nothing(kit: KitRocket, engine: Engine) -> None:
    user_id = await make_user(engine, email_verified=AT)
    await make_user(engine, email="taken@example.com")
    mine = await kit.sessions.create(user_id)
    before = await dump(engine)
    with pytest.raises(EmailTakenError):
        await kit.users.change_email(user_id, email="Taken@example.com", keep=mine.token)
    with pytest.raises(UserNotFoundError):
        await kit.users.change_email("nobody", email="new@example.com")
    with pytest.raises(InvalidInputError):
        await kit.users.change_email(user_id, email="junk")
    assert await dump(engine) == before


async def test_of_many_who_want_one_address_one_gets_it(kit: KitRocket, engine: Engine) -> None:
    users = [await make_user(engine) for _ in range(8)]
    answers = await together([partial(kit.users.change_email, user_id, email="new@example.com") for user_id in users])
    assert sum(isinstance(answer, CredentialChange) for answer in answers) == 1
    assert sum(isinstance(answer, EmailTakenError) for answer in answers) == 7


# -- link and unlink ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revoke", "left"), [(None, 3), ("none", 3), ("others", 1), ("all", 0)])
async def test_linking_and_unlinking_end_sessions_on_demand(
    kit: KitRocket, engine: Engine, revoke: Any, left: int
) -> None:
    for verb in ("link", "unlink"):
        user_id = await make_user(engine)
        account_id = await make_account(engine, user_id)
        await make_account(engine, user_id)
        mine, *_ = [await kit.sessions.create(user_id) for _ in range(3)]
        options = {} if revoke is None else {"revoke": revoke, "keep": mine.token}
        if verb == "link":
            await kit.accounts.link(user_id, provider="google", provider_account_id=user_id, **options)
        else:
            assert await kit.accounts.unlink(user_id, account_id, **options)
        assert await count(engine, user_id) == left
        assert (await kit.sessions.validate(mine.token) is not None) is (left > 0)


async def test_what_is_not_linked_or_unlinked_ends_no_session(kit: KitRocket, engine: Engine) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    last = await make_account(engine, user_id)
    await make_account(engine, other, provider_account_id="42")
    await kit.sessions.create(user_id)
    before = await dump(engine)
    answers = await together(
        [
            partial(kit.accounts.unlink, user_id, last, revoke="all"),
            partial(kit.accounts.unlink, user_id, "no account", revoke="all"),
            partial(kit.accounts.link, user_id, provider="github", provider_account_id="42", revoke="all"),
        ]
    )
    assert [type(answer).__name__ for answer in answers] == ["LastAccountError", "bool", "AccountTakenError"]
    assert await dump(engine) == before
