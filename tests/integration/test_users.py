from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import anyio.lowlevel
import argon2
import asyncpg
import pytest
from racing import together, until_someone_waits, warm_up

from factories import AT, make_account, make_mirror, make_session, make_subscription, make_usage, make_user
from kitrocket.engine import Engine
from kitrocket.errors import EmailTakenError, InvalidInputError, UserNotFoundError
from kitrocket.models import DeletedUser, User
from kitrocket.passwords import hash_password, verify_password
from kitrocket.subscriptions import SubscriptionService
from kitrocket.testing import ManualClock
from kitrocket.users import UserService
from servers import Server

pytestmark = pytest.mark.asyncio

# Better Auth's text for "correct horse".
SCRYPT = (
    "00112233445566778899aabbccddeeff:13af89ff6a88bb0fb3277e79ba724c6c0731b15919ca892969d63abd1534b867"
    "d110179e3bc8af39995ede0f9b2ac14b2b97573df10ba3802c498dbeb61e4f64"
)
# One pass over 1 MiB, of the same password.
OLD_ARGON2 = "$argon2id$v=19$m=1024,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$UDengyDgIHrEpswm+GeJvBdp5V8H6p/bLZoLqHbHq7Y"


@pytest.fixture
def users(engine: Engine, clock: ManualClock) -> UserService:
    return UserService(engine, clock=clock)


@pytest.fixture
def statements_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that goes to PostgreSQL through the engine."""
    seen: list[str] = []
    fetch = Engine.fetch

    async def counted(engine: Engine, sql: str, *arguments: Any, node: str | None = None) -> list[asyncpg.Record]:
        seen.append(sql)
        return await fetch(engine, sql, *arguments, node=node)

    monkeypatch.setattr(Engine, "fetch", counted)
    return seen


async def rows(engine: Engine, table: str) -> int:
    count = await engine.fetchval(f"SELECT count(*) FROM {table}")
    assert isinstance(count, int)
    return count


async def fail_inserts(engine: Engine, table: str) -> None:
    await engine.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a fault'; END $$"
    )
    await engine.fetch(f"CREATE TRIGGER refuse AFTER INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()")


# -- create ---------------------------------------------------------------------------------------------------------


async def test_create_writes_every_column_of_user_and_account(users: UserService, engine: Engine) -> None:
    user = await users.create(email=" Ada@Example.com ", name="Ada", password="correct horse", avatar="https://x/a.png")
    row = await engine.fetchrow("SELECT * FROM users")
    account = await engine.fetchrow("SELECT * FROM accounts")
    assert row is not None
    assert account is not None
    assert dict(row) == {
        "id": user.id,
        "email": "ada@example.com",
        "name": "Ada",
        "email_verified": None,
        "avatar": "https://x/a.png",
        "created_at": datetime(2026, 3, 1, 12),  # noqa: DTZ001 - the column is naive
        "updated_at": datetime(2026, 3, 1, 12),  # noqa: DTZ001 - the same
    }
    assert dict(account) | {"id": "", "password": ""} == {
        "id": "",
        "user_id": user.id,
        "provider": "credential",
        "provider_account_id": user.id,
        "access_token": None,
        "refresh_token": None,
        "expires_at": None,
        "password": "",
        "created_at": datetime(2026, 3, 1, 12),  # noqa: DTZ001 - the same
    }
    assert len(user.id) == len(account["id"]) == 32
    assert verify_password(account["password"], "correct horse", "argon2id")
    assert user == await users.get(user.id)
    assert user.created_at == user.updated_at == AT


async def test_times_are_cut_to_milliseconds(users: UserService, clock: ManualClock) -> None:
    clock.now = AT.replace(microsecond=123_999)
    user = await users.create(email="ada@example.com", name="Ada")
    assert user.created_at == user.updated_at == AT.replace(microsecond=123_000)


async def test_without_a_password_there_is_no_account(users: UserService, engine: Engine) -> None:
    user = await users.create(email="ada@example.com", name="Ada", id="user-1")
    assert user.id == "user-1"
    assert await rows(engine, "accounts") == 0


async def test_the_hash_is_in_the_configured_scheme(engine: Engine, clock: ManualClock) -> None:
    await UserService(engine, clock=clock, password_scheme="better-auth").create(
        email="ada@example.com", name="Ada", password="correct horse"
    )
    stored = await engine.fetchval("SELECT password FROM accounts")
    salt, key = stored.split(":")
    assert hashlib.scrypt(b"correct horse", salt=salt.encode(), n=16384, r=16, p=1, maxmem=2**26).hex() == key


@pytest.mark.parametrize("table", ["users", "accounts"])
async def test_a_fault_at_either_insert_leaves_nothing(users: UserService, engine: Engine, table: str) -> None:
    await fail_inserts(engine, table)
    with pytest.raises(asyncpg.RaiseError):
        await users.create(email="ada@example.com", name="Ada", password="correct horse")
    assert await rows(engine, "users") == await rows(engine, "accounts") == 0


@pytest.mark.usefixtures("cheap_hashes")
async def test_of_many_who_want_one_address_one_gets_it(users: UserService, engine: Engine) -> None:
    spellings = ["ada@example.com", "Ada@Example.com", "ADA@EXAMPLE.COM", "aDA@example.COM"]
    await warm_up(engine)
    answers = await together(
        [partial(users.create, email=email, name="Ada", password="correct horse") for email in spellings * 5]
    )
    assert sum(isinstance(answer, User) for answer in answers) == 1
    assert sum(isinstance(answer, EmailTakenError) for answer in answers) == 19
    assert await rows(engine, "users") == await rows(engine, "accounts") == 1


async def test_an_address_that_another_writer_stored_in_capitals_is_taken(users: UserService, engine: Engine) -> None:
    await make_user(engine, email="Ada@Example.com")
    with pytest.raises(EmailTakenError) as caught:
        await users.create(email="ada@example.com", name="Ada")
    assert "ada@example.com" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.usefixtures("cheap_hashes")
async def test_a_taken_id(users: UserService, engine: Engine) -> None:
    taken = await make_user(engine)
    with pytest.raises(InvalidInputError) as caught:
        await users.create(email="ada@example.com", name="Ada", id=taken, password="correct horse")
    assert caught.value.field == "id"
    assert await rows(engine, "users") == 1


@pytest.mark.usefixtures("cheap_hashes")
async def test_a_taken_address_spoils_no_outer_transaction(users: UserService, engine: Engine) -> None:
    async with engine.transaction():
        await users.create(email="ada@example.com", name="Ada")
        with pytest.raises(EmailTakenError):
            await users.create(email="ADA@example.com", name="Ada", password="correct horse")
        await users.create(email="grace@example.com", name="Grace")
    assert await rows(engine, "users") == 2


# -- reading --------------------------------------------------------------------------------------------------------


async def test_an_address_is_found_in_any_spelling(users: UserService) -> None:
    user = await users.create(email="Zoë@Example.com", name="Zoë")
    for spelling in ("zoë@example.com", "ZOË@EXAMPLE.COM", " Zoe\u0308@example.com\n"):
        assert await users.get_by_email(spelling) == user
    assert await users.get_by_email("zoe@example.com") is None


async def test_of_case_variants_the_normalised_one_is_meant(users: UserService, engine: Engine) -> None:
    await engine.fetch("DROP INDEX users_lower_email_idx")
    await make_user(engine, email="Ada@example.com")
    normalised = await make_user(engine, email="ada@example.com", at=AT + timedelta(days=1))
    found = await users.get_by_email("ADA@example.com")
    assert found is not None
    assert found.id == normalised


async def test_reading_an_unknown_user(users: UserService) -> None:
    assert await users.get("nobody") is None
    assert await users.get_with_subscription("nobody") is None
    assert await users.get_by_email("nobody@example.com") is None


async def test_a_user_without_a_subscription(users: UserService, engine: Engine) -> None:
    both = await users.get_with_subscription(await make_user(engine))
    assert both is not None
    assert both.subscription is None


async def test_a_user_with_a_subscription_is_one_statement(
    users: UserService, engine: Engine, statements_run: list[str]
) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    end = AT + timedelta(days=30)
    await make_subscription(
        engine,
        user_id,
        id="s1",
        status="trialing",
        dodo_customer_id="c1",
        dodo_subscription_id="d1",
        current_period_end=end,
    )
    statements_run.clear()
    both = await users.get_with_subscription(user_id)
    assert len(statements_run) == 1
    assert both is not None
    assert both.user == await users.get(user_id)
    assert both.subscription is not None
    assert both.subscription.model_dump() == {
        "id": "s1",
        "user_id": user_id,
        "plan": "pro",
        "status": "trialing",
        "dodo_customer_id": "c1",
        "dodo_subscription_id": "d1",
        "current_period_end": end,
        "created_at": AT,
        "updated_at": AT,
    }


async def test_the_live_row_counts_then_the_known_one_then_the_newest(users: UserService, engine: Engine) -> None:
    user_id = await make_user(engine)
    subscriptions = SubscriptionService(engine)

    async def chosen() -> str:
        both = await users.get_with_subscription(user_id)
        assert both is not None
        assert both.subscription is not None
        assert both.subscription == await subscriptions.get(user_id)
        return both.subscription.id

    await make_subscription(engine, user_id, id="old", status="cancelled", at=AT - timedelta(days=3))
    await make_subscription(engine, user_id, id="new", status="cancelled", at=AT)
    assert await chosen() == "new"
    await make_mirror(engine, "dodo-1", user_id=user_id)
    await make_subscription(
        engine, user_id, id="known", status="cancelled", dodo_subscription_id="dodo-1", at=AT - timedelta(days=2)
    )
    await make_subscription(engine, user_id, id="unknown", status="cancelled", dodo_subscription_id="dodo-2", at=AT)
    assert await chosen() == "known"
    for status in ("active", "trialing", "past_due"):
        await make_subscription(engine, user_id, id=status, status=status, at=AT - timedelta(days=9))
        assert await chosen() == status
        await engine.fetch("DELETE FROM subscriptions WHERE id = $1", status)


@pytest.mark.parametrize("verb", ["get", "get_by_email", "update", "mark_email_verified"])
async def test_single_verbs_are_one_statement(
    verb: str, users: UserService, engine: Engine, statements_run: list[str]
) -> None:
    user_id = await make_user(engine, email="ada@example.com")
    statements_run.clear()
    await getattr(users, verb)("ada@example.com" if verb == "get_by_email" else user_id)
    assert len(statements_run) == 1


# -- update, mark_email_verified, delete ----------------------------------------------------------------------------


async def test_update_changes_what_is_given(users: UserService, clock: ManualClock) -> None:
    user = await users.create(email="ada@example.com", name="Ada", avatar="a.png")
    later = clock.advance(timedelta(hours=1))
    renamed = await users.update(user.id, name="Ada L.")
    assert renamed == user.model_copy(update={"name": "Ada L.", "updated_at": later})
    assert await users.get(user.id) == renamed
    cleared = await users.update(user.id, avatar=None)
    assert (cleared.name, cleared.avatar) == ("Ada L.", None)


async def test_writing_to_an_unknown_user(users: UserService) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: users.update("nobody", name="x"),
        lambda: users.mark_email_verified("nobody"),
        lambda: users.delete("nobody"),
    ]
    for call in calls:
        with pytest.raises(UserNotFoundError) as caught:
            await call()
        assert caught.value.user_id == "nobody"


async def test_the_first_verification_stays(users: UserService, clock: ManualClock) -> None:
    user = await users.create(email="ada@example.com", name="Ada")
    first = clock.advance(timedelta(hours=1))
    verified = await users.mark_email_verified(user.id)
    assert (verified.email_verified, verified.updated_at) == (first, first)
    clock.advance(timedelta(hours=1))
    assert await users.mark_email_verified(user.id) == verified


async def test_only_the_address_the_user_has_is_verified(users: UserService) -> None:
    user = await users.create(email="ada@example.com", name="Ada")
    assert await users.mark_email_verified(user.id, email="old@example.com") == user
    assert (await users.mark_email_verified(user.id, email="ADA@example.com")).email_verified == AT


async def test_concurrent_verifications_agree_on_the_first(
    users: UserService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    ticks = iter(range(20))
    racing = UserService(engine, clock=lambda: AT + timedelta(seconds=next(ticks)))
    answers = await together([partial(racing.mark_email_verified, user_id)] * 20)
    stored = await users.get(user_id)
    assert stored is not None
    assert {answer.email_verified for answer in answers if isinstance(answer, User)} == {stored.email_verified}


async def test_delete_counts_what_goes_and_leaves_nothing(users: UserService, engine: Engine) -> None:
    user_id, other = await make_user(engine), await make_user(engine)
    for owner in (user_id, other):
        await make_account(engine, owner)
        await make_subscription(engine, owner)
        for _ in range(2):
            await make_session(engine, owner)
        for _ in range(3):
            await make_usage(engine, owner)
    assert await users.delete(user_id) == DeletedUser(user_id=user_id, sessions=2, accounts=1, subscriptions=1, usage=3)
    for table, left in (("sessions", 2), ("accounts", 1), ("subscriptions", 1), ("usage", 3)):
        assert await rows(engine, table) == left
        assert await engine.fetchval(f"SELECT count(*) FROM {table} WHERE user_id = $1", user_id) == 0
    assert await users.get(other) is not None
    with pytest.raises(UserNotFoundError):
        await users.delete(user_id)


async def test_delete_counts_what_is_about_to_be_committed(users: UserService, engine: Engine) -> None:
    user_id = await make_user(engine)
    answers: list[DeletedUser] = []

    async def delete() -> None:
        answers.append(await users.delete(user_id))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("INSERT INTO usage (id, user_id, tokens_used, model) VALUES ('u', $1, 1, 'm')", user_id)
        async with anyio.create_task_group() as group:
            group.start_soon(delete)
            await until_someone_waits(engine)
            await transaction.commit()
    assert answers[0].usage == 1
    assert await rows(engine, "usage") == 0


# -- authenticate ---------------------------------------------------------------------------------------------------


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each hash that the libraries compute."""
    seen: list[str] = []
    argon2_verify, scrypt = argon2.PasswordHasher.verify, hashlib.scrypt

    def verify(hasher: argon2.PasswordHasher, stored: str, password: bytes) -> bool:
        seen.append("argon2id")
        return argon2_verify(hasher, stored, password)

    def counted_scrypt(*arguments: Any, **options: Any) -> bytes:
        seen.append("scrypt")
        return scrypt(*arguments, **options)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", verify)
    monkeypatch.setattr(hashlib, "scrypt", counted_scrypt)
    return seen


async def test_the_right_password_answers_the_user(users: UserService) -> None:
    user = await users.create(email="ada@example.com", name="Ada", password="correct horse")
    assert await users.authenticate(email=" ADA@example.com", password="correct horse") == user
    assert await users.authenticate(email="ada@example.com", password="Correct horse") is None


@pytest.mark.parametrize(("scheme", "dummy"), [("argon2id", "argon2id"), ("better-auth", "scrypt")])
async def test_everyone_costs_one_verification(
    engine: Engine, clock: ManualClock, scheme: Any, dummy: str, verifications: list[str]
) -> None:
    users = UserService(engine, clock=clock, password_scheme=scheme)
    await users.create(email="ada@example.com", name="Ada", password="correct horse")
    no_password = await make_user(engine, email="nopassword@example.com")
    await make_account(engine, no_password, provider="credential", password="")
    await make_user(engine, email="oauth@example.com")
    for email in ("ada@example.com", "nopassword@example.com", "oauth@example.com", "nobody@example.com", "junk", "\0"):
        verifications.clear()
        assert await users.authenticate(email=email, password="wrong horse") is None
        assert verifications == [dummy]


@pytest.mark.usefixtures("cheap_hashes")
@pytest.mark.parametrize("junk", ["", "\0", "\ud800", "x" * 1_000_000, "no-at-sign"], ids=lambda text: ascii(text)[:12])
async def test_a_junk_secret_is_ordinary_absence(users: UserService, junk: str) -> None:
    await users.create(email="ada@example.com", name="Ada", password="correct horse")
    assert await users.authenticate(email=junk, password="correct horse") is None
    assert await users.authenticate(email="ada@example.com", password=junk) is None


@pytest.mark.parametrize("stored", [SCRYPT, OLD_ARGON2], ids=["scrypt", "old parameters"])
async def test_an_old_hash_is_renewed_once(engine: Engine, users: UserService, stored: str) -> None:
    user_id = await make_user(engine, email="ada@example.com")
    await make_account(engine, user_id, provider="credential", password=stored)
    await engine.fetch("CREATE TABLE changes (password text)")
    await engine.fetch(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO changes VALUES (NEW.password); RETURN NULL; END $$"
    )
    await engine.fetch("CREATE TRIGGER note AFTER UPDATE ON accounts FOR EACH ROW EXECUTE FUNCTION note()")
    answers = await together([partial(users.authenticate, email="ada@example.com", password="correct horse")] * 20)
    assert sum(isinstance(answer, User) for answer in answers) == 20
    assert await rows(engine, "changes") == 1
    renewed = await engine.fetchval("SELECT password FROM accounts")
    assert renewed.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert await users.authenticate(email="ada@example.com", password="correct horse") is not None


async def test_a_shared_database_keeps_its_hashes(engine: Engine, clock: ManualClock) -> None:
    users = UserService(engine, clock=clock, password_scheme="better-auth")
    for email, stored in (("ba@example.com", SCRYPT), ("a2@example.com", hash_password("correct horse", "argon2id"))):
        user_id = await make_user(engine, email=email)
        account = await make_account(engine, user_id, provider="credential", password=stored)
        assert await users.authenticate(email=email, password="correct horse") is not None
        assert await engine.fetchval("SELECT password FROM accounts WHERE id = $1", account) == stored


async def test_a_password_changed_during_the_renewal_survives(engine: Engine, clock: ManualClock) -> None:
    limiter = anyio.CapacityLimiter(1)
    users = UserService(engine, clock=clock, limiter=limiter)
    user_id = await make_user(engine, email="ada@example.com")
    account = await make_account(engine, user_id, provider="credential", password=SCRYPT)
    changed = hash_password("another horse", "argon2id")
    answers: list[User | None] = []

    async def authenticate() -> None:
        answers.append(await users.authenticate(email="ada@example.com", password="correct horse"))

    await limiter.acquire()
    async with anyio.create_task_group() as group:
        group.start_soon(authenticate)
        while not limiter.statistics().tasks_waiting:
            await anyio.lowlevel.checkpoint()
        # The old hash has been read and waits for its verification.
        await engine.fetch("UPDATE accounts SET password = $2 WHERE id = $1", account, changed)
        limiter.release()
    assert answers[0] is not None
    assert await engine.fetchval("SELECT password FROM accounts WHERE id = $1", account) == changed


async def test_the_limiter_bounds_how_many_are_hashed_at_once(engine: Engine, clock: ManualClock) -> None:
    limiter = anyio.CapacityLimiter(2)
    users = UserService(engine, clock=clock, limiter=limiter)
    most = 0
    done = anyio.Event()

    async def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, int(limiter.borrowed_tokens))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await together([partial(users.authenticate, email="nobody@example.com", password="correct horse")] * 6)
        done.set()
    assert most == 2
    assert UserService(engine)._passwords._limiter.total_tokens == 4


# -- bad input ------------------------------------------------------------------------------------------------------

TEXT_JUNK = ["", "a\0b", "\ud800", "x" * 1_000_000, 5, b"x", True, 1.5, ["x"]]


@pytest.mark.parametrize("junk", [*TEXT_JUNK, None], ids=lambda junk: ascii(junk)[:12])
async def test_bad_input_is_one_error_and_changes_nothing(users: UserService, engine: Engine, junk: Any) -> None:
    user = await users.create(email="ada@example.com", name="Ada", avatar="a.png")
    good: dict[str, Any] = {"email": "grace@example.com", "name": "Grace"}
    calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        ("email", lambda: users.create(**good | {"email": junk})),
        ("name", lambda: users.create(**good | {"name": junk})),
        ("user_id", lambda: users.get(junk)),
        ("user_id", lambda: users.get_with_subscription(junk)),
        ("email", lambda: users.get_by_email(junk)),
        ("user_id", lambda: users.update(junk, name="x")),
        ("name", lambda: users.update(user.id, name=junk)),
        ("user_id", lambda: users.mark_email_verified(junk)),
        ("user_id", lambda: users.delete(junk)),
    ]
    if junk is not None:
        calls += [
            ("avatar", lambda: users.create(**good, avatar=junk)),
            ("id", lambda: users.create(**good, id=junk)),
            ("password", lambda: users.create(**good, password=junk)),
            ("avatar", lambda: users.update(user.id, name="Grace", avatar=junk)),
            ("email", lambda: users.mark_email_verified(user.id, email=junk)),
        ]
    if not isinstance(junk, str):
        calls += [
            ("email", lambda: users.authenticate(email=junk, password="correct horse")),
            ("password", lambda: users.authenticate(email="ada@example.com", password=junk)),
        ]
    for field, call in calls:
        with pytest.raises(InvalidInputError) as caught:
            await call()
        assert (caught.value.field, isinstance(caught.value, ValueError)) == (field, True)
    assert await users.get(user.id) == user
    assert await rows(engine, "users") == 1
    assert await rows(engine, "accounts") == 0


@pytest.mark.usefixtures("cheap_hashes")
async def test_values_at_their_limits(users: UserService) -> None:
    email = "x" * 242 + "@example.com"
    user = await users.create(email=email, name="n" * 200, avatar="a" * 2048, id="i" * 255, password="p" * 128)
    assert await users.authenticate(email=email, password="p" * 128) == user
    for values in (
        {"email": "x" + email},
        {"name": "n" * 201},
        {"avatar": "a" * 2049},
        {"id": "i" * 256},
        {"password": "p" * 129},
    ):
        with pytest.raises(InvalidInputError):
            await users.create(**{"email": "grace@example.com", "name": "Grace"} | values)


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
            users = UserService(elsewhere, clock=lambda: AT.astimezone(new_york))
            user = await users.create(email="ada@example.com", name="Ada")
            verified = await users.mark_email_verified(user.id)
            renamed = await users.update(user.id, name="Ada L.")
    finally:
        monkeypatch.undo()
        time.tzset()
    stored = await engine.fetchrow("SELECT created_at, updated_at, email_verified FROM users")
    assert stored is not None
    assert set(stored) == {AT.replace(tzinfo=None)}
    assert {user.created_at, verified.email_verified, renamed.updated_at} == {AT}
    assert user.created_at.tzinfo is UTC
