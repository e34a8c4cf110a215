"""Verifying an address and setting a new password with a token that was sent by e-mail."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import anyio
import anyio.lowlevel
import argon2
import pytest
from racing import together, warm_up

from factories import AT, make_account, make_session, make_user
from kitrocket import KitRocket, Settings
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError, InvalidTokenError
from kitrocket.models import CredentialChange, User
from kitrocket.testing import ManualClock
from kitrocket.users import UserService

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("cheap_hashes")]

SECRET = "s" * 32
OLD, NEW = "correct horse", "battery staple"
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


@pytest.fixture
def kit(engine: Engine, clock: ManualClock) -> KitRocket:
    return KitRocket(Settings(secret=SECRET), engine=engine, clock=clock, background=False)


@pytest.fixture
def users(kit: KitRocket) -> UserService:
    return kit.users


async def ada(users: UserService) -> User:
    return await users.create(email="ada@example.com", name="Ada", password=OLD)


async def token_to_verify(users: UserService) -> str:
    token = await users.request_verification("Ada@Example.com")
    assert token is not None
    return token


async def token_to_reset(users: UserService) -> str:
    token = await users.request_password_reset("Ada@Example.com")
    assert token is not None
    return token


async def dump(engine: Engine) -> list[str]:
    rows: list[str] = []
    for table in ("users", "accounts", "sessions"):
        rows += [row[0] for row in await engine.fetch(f"SELECT {table}::text FROM {table} ORDER BY id")]
    return rows


# -- verification ---------------------------------------------------------------------------------------------------


async def test_a_token_verifies_the_address_once(users: UserService, clock: ManualClock) -> None:
    user = await ada(users)
    token = await token_to_verify(users)
    later = clock.advance(HOUR - SECOND)
    verified = await users.verify_email(token)
    assert verified == user.model_copy(update={"email_verified": later, "updated_at": later})
    assert await users.get(user.id) == verified
    with pytest.raises(InvalidTokenError):
        await users.verify_email(token)


async def test_of_many_redemptions_of_a_verification_one_succeeds(users: UserService, engine: Engine) -> None:
    await ada(users)
    token = await token_to_verify(users)
    await warm_up(engine)
    answers = await together([partial(users.verify_email, token)] * 10)
    assert sum(isinstance(answer, User) for answer in answers) == 1
    assert sum(isinstance(answer, InvalidTokenError) for answer in answers) == 9


async def test_there_is_nothing_to_verify(users: UserService, engine: Engine) -> None:
    await make_user(engine, email="verified@example.com", email_verified=AT)
    assert await users.request_verification("verified@example.com") is None
    assert await users.request_verification("nobody@example.com") is None
    assert await users.request_password_reset("nobody@example.com") is None


async def test_a_verification_is_over_after_an_hour(users: UserService, clock: ManualClock, engine: Engine) -> None:
    await ada(users)
    token = await token_to_verify(users)
    before = await dump(engine)
    clock.advance(HOUR)
    with pytest.raises(InvalidTokenError):
        await users.verify_email(token)
    assert await dump(engine) == before


async def test_a_verification_is_dead_after_the_address_changed(users: UserService, engine: Engine) -> None:
    user = await ada(users)
    token = await token_to_verify(users)
    await users.change_email(user.id, email="new@example.com")
    with pytest.raises(InvalidTokenError):
        await users.verify_email(token)
    back = await users.change_email(user.id, email="ada@example.com")
    assert back.user.email_verified is None
    assert (await users.verify_email(token)).email == "ada@example.com", "the address it was sent to, unverified"


async def test_a_verification_of_a_deleted_user_is_dead(users: UserService) -> None:
    user = await ada(users)
    tokens = await token_to_verify(users), await token_to_reset(users)
    await users.delete(user.id)
    with pytest.raises(InvalidTokenError):
        await users.verify_email(tokens[0])
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=tokens[1], new=NEW)


# -- reset ----------------------------------------------------------------------------------------------------------


async def test_a_reset_sets_the_password_ends_all_sessions_and_verifies_the_address(
    kit: KitRocket, users: UserService, clock: ManualClock, engine: Engine
) -> None:
    user = await ada(users)
    issued = [await kit.sessions.create(user.id) for _ in range(3)]
    await make_session(engine, user.id, expires_at=AT - SECOND)
    token = await token_to_reset(users)
    later = clock.advance(HOUR - SECOND)
    change = await users.reset_password(token=token, new=NEW)
    assert (change.revoked, change.issued) == (4, None)
    assert change.user.email_verified == later
    assert change.user == await users.get(user.id)
    assert [await kit.sessions.validate(one.token) for one in issued] == [None] * 3
    assert await users.authenticate(email="ada@example.com", password=OLD) is None
    assert await users.authenticate(email="ada@example.com", password=NEW) == change.user
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=token, new="yet another")


async def test_a_reset_keeps_the_time_of_the_first_verification(users: UserService, clock: ManualClock) -> None:
    user = await ada(users)
    await users.mark_email_verified(user.id)
    clock.advance(HOUR)
    change = await users.reset_password(token=await token_to_reset(users), new=NEW)
    assert change.user.email_verified == AT


async def test_a_reset_that_ends_no_session(kit: KitRocket, users: UserService) -> None:
    user = await ada(users)
    issued = await kit.sessions.create(user.id)
    change = await users.reset_password(token=await token_to_reset(users), new=NEW, revoke="none")
    assert change.revoked == 0
    assert await kit.sessions.validate(issued.token) is not None


@pytest.mark.parametrize("account", ["none", "without a password", "empty"])
async def test_a_reset_gives_the_first_password(users: UserService, engine: Engine, account: str) -> None:
    user_id = await make_user(engine, email="ada@example.com")
    await make_account(engine, user_id, provider="github")
    if account != "none":
        await make_account(engine, user_id, provider="credential", password="" if account == "empty" else None)
    change = await users.reset_password(token=await token_to_reset(users), new=NEW)
    assert await users.authenticate(email="ada@example.com", password=NEW) == change.user
    rows = await engine.fetch("SELECT provider, provider_account_id, user_id FROM accounts ORDER BY provider")
    assert [row["provider"] for row in rows] == ["credential", "github"]
    assert (rows[0]["provider_account_id"], rows[0]["user_id"]) == (user_id, user_id)


async def test_of_many_redemptions_of_a_reset_one_succeeds(
    users: UserService, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await warm_up(engine)
    for first in (False, True):
        email = f"ada{first}@example.com"
        if first:
            await make_user(engine, email=email)
        else:
            await users.create(email=email, name="Ada", password=OLD)
        token = await users.request_password_reset(email)
        assert token is not None
        words = [f"{NEW} {number}" for number in range(10)]
        answers = await together([partial(users.reset_password, token=token, new=new) for new in words])
        won = [new for new, answer in zip(words, answers, strict=True) if isinstance(answer, CredentialChange)]
        assert len(won) == 1
        assert sum(isinstance(answer, InvalidTokenError) for answer in answers) == 9
        assert await users.authenticate(email=email, password=won[0]) is not None
    assert await engine.fetchval("SELECT count(*)::int FROM accounts") == 2


async def test_a_reset_is_dead_after_password_or_address_changed(users: UserService, engine: Engine) -> None:
    user = await ada(users)
    token = await token_to_reset(users)
    await users.change_password(user.id, current=OLD, new=NEW)
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=token, new=OLD)
    token = await token_to_reset(users)
    await users.change_email(user.id, email="new@example.com")
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=token, new=OLD)
    assert await users.authenticate(email="new@example.com", password=NEW) is not None


async def test_the_same_password_again_kills_the_token_too(users: UserService) -> None:
    user = await ada(users)
    token = await token_to_reset(users)
    await users.change_password(user.id, current=OLD, new=OLD)
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=token, new=NEW)


@pytest.mark.parametrize("late", [-1, 0, 1])
async def test_a_reset_is_over_after_an_hour(users: UserService, clock: ManualClock, late: int) -> None:
    await ada(users)
    token = await token_to_reset(users)
    clock.advance(HOUR + late * SECOND)
    if late < 0:
        await users.reset_password(token=token, new=NEW)
    else:
        with pytest.raises(InvalidTokenError):
            await users.reset_password(token=token, new=NEW)


async def test_purposes_are_not_interchangeable(users: UserService, engine: Engine) -> None:
    await ada(users)
    to_verify, to_reset = await token_to_verify(users), await token_to_reset(users)
    before = await dump(engine)
    with pytest.raises(InvalidTokenError):
        await users.verify_email(to_reset)
    with pytest.raises(InvalidTokenError):
        await users.reset_password(token=to_verify, new=NEW)
    assert await dump(engine) == before


async def test_junk_costs_no_hash_and_bad_passwords_leave_the_token(
    users: UserService, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await ada(users)
    token = await token_to_reset(users)
    hashes = 0
    hash_ = argon2.PasswordHasher.hash

    def counted(hasher: argon2.PasswordHasher, password: bytes) -> str:
        nonlocal hashes
        hashes += 1
        return hash_(hasher, password)

    monkeypatch.setattr(argon2.PasswordHasher, "hash", counted)
    forged = users._proofs.make("reset", user.id, ("another hash", "ada@example.com"), AT)
    for junk in ("", "junk", "\0", "\ud800", "x" * 1_000_000, token[:-1], forged):
        with pytest.raises(InvalidTokenError):
            await users.reset_password(token=junk, new=NEW)
        with pytest.raises(InvalidTokenError):
            await users.verify_email(junk)
    for field, arguments in (("token", {"token": 5, "new": NEW}), ("new", {"token": token, "new": "short"})):
        with pytest.raises(InvalidInputError) as caught:
            await users.reset_password(**arguments)  # type: ignore[arg-type]  # on purpose
        assert caught.value.field == field
    assert hashes == 0
    await users.reset_password(token=token, new=NEW)


async def test_without_a_secret_there_are_no_tokens(engine: Engine, clock: ManualClock) -> None:
    users = KitRocket(Settings(), engine=engine, clock=clock, background=False).users
    await ada(users)
    for call in (
        partial(users.request_verification, "ada@example.com"),
        partial(users.request_password_reset, "ada@example.com"),
        partial(users.verify_email, "junk"),
        partial(users.reset_password, token="junk", new=NEW),
    ):
        with pytest.raises(ConfigurationError, match="KITROCKET_SECRET"):
            await call()


async def test_a_session_made_with_the_old_password_does_not_outlive_a_reset(
    kit: KitRocket, users: UserService, engine: Engine
) -> None:
    async def later(steps: int, email: str) -> object:
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        return await kit.sign_in(email=email, password=OLD)

    for round_ in range(50):
        email = f"ada{round_}@example.com"
        user = await users.create(email=email, name="Ada", password=OLD)
        token = await users.request_password_reset(email)
        assert token is not None
        reset = partial(users.reset_password, token=token, new=NEW)
        answers = await together([reset, *(partial(later, steps, email) for steps in (0, 3 * round_ % 40))])
        assert isinstance(answers[0], CredentialChange)
        assert await kit.sessions.list(user.id) == []
