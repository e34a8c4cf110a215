"""Signing in at a provider: whose the identity is, and what becomes of one that is nobody's yet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import asyncpg
import pytest
from cryptography.fernet import Fernet
from racing import together, until_someone_waits, warm_up

from factories import AT, make_account, make_session, make_user
from kitrocket import KitRocket, Settings
from kitrocket.accounts import AccountService
from kitrocket.accounts.arrivals import decide
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, LinkRefusedError
from kitrocket.models import Account, ProviderSignIn, User
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

EXPIRES = AT + timedelta(hours=1)
UNIQUE_INDEX = "accounts_provider_provider_account_id_idx"
GITHUB: dict[str, Any] = {"provider": "github", "provider_account_id": "42"}


@pytest.fixture
def accounts(engine: Engine, clock: ManualClock) -> AccountService:
    return AccountService(engine, clock=clock)


async def dump(engine: Engine) -> list[str]:
    rows: list[str] = []
    for table in ("users", "accounts", "sessions"):
        rows += [row[0] for row in await engine.fetch(f"SELECT {table}::text FROM {table} ORDER BY id")]
    return rows


async def counts(engine: Engine) -> tuple[int, ...]:
    found = await engine.fetchrow("SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM accounts)")
    assert found is not None
    return tuple(found)


# -- known and new --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verified", [True, False])
async def test_somebody_new_becomes_a_user(accounts: AccountService, engine: Engine, verified: bool) -> None:
    found = await accounts.sign_in(
        **GITHUB,
        email="Ada@Example.com",
        email_verified=verified,
        name="Ada",
        avatar="https://x/a.png",
        access_token="a",
        refresh_token="r",
        expires_at=EXPIRES,
    )
    assert found == ProviderSignIn(
        outcome="created",
        user=User(
            id=found.user.id,
            email="ada@example.com",
            name="Ada",
            email_verified=AT if verified else None,
            avatar="https://x/a.png",
            created_at=AT,
            updated_at=AT,
        ),
        account=Account(
            id=found.account.id,
            user_id=found.user.id,
            provider="github",
            provider_account_id="42",
            expires_at=EXPIRES,
            has_password=False,
            created_at=AT,
        ),
    )
    row = await engine.fetchrow("SELECT access_token, refresh_token FROM accounts")
    assert row is not None
    assert tuple(row) == ("a", "r")
    assert await counts(engine) == (1, 1)


async def test_without_a_name_the_user_is_called_as_the_address_begins(accounts: AccountService) -> None:
    found = await accounts.sign_in(**GITHUB, email="ada.l@example.com")
    assert found.user.name == "ada.l"
    long = "x" * 240 + "@example.com"
    found = await accounts.sign_in(provider="github", provider_account_id="43", email=long)
    assert found.user.name == "x" * 200


async def test_a_known_identity_signs_in_and_gets_new_tokens(
    accounts: AccountService, engine: Engine, clock: ManualClock
) -> None:
    first = await accounts.sign_in(**GITHUB, email="ada@example.com", name="Ada", access_token="a", refresh_token="r")
    await make_user(engine, email="eve@example.com")
    clock.advance(timedelta(days=1))
    for email in (None, "ada@example.com", "eve@example.com", "new@example.com"):
        again = await accounts.sign_in(**GITHUB, email=email, email_verified=True, name="Eve", access_token="b")
        assert again == first.model_copy(update={"outcome": "signed_in"}), "what the provider says of it now is nothing"
    row = await engine.fetchrow("SELECT access_token, refresh_token FROM accounts")
    assert row is not None
    assert tuple(row) == ("b", "r")


async def test_tokens_are_stored_as_by_link(engine: Engine, clock: ManualClock) -> None:
    accounts = AccountService(engine, clock=clock, token_keys=[Fernet.generate_key().decode()])
    for _ in range(2):
        await accounts.sign_in(**GITHUB, email="ada@example.com", access_token="gho_one", refresh_token="ghr_two")
        text = "".join(await dump(engine))
        assert text.count("f1$") == 2
        assert "gho_one" not in text
        assert "ghr_two" not in text


async def test_without_an_address_nobody_is_made(accounts: AccountService, engine: Engine) -> None:
    with pytest.raises(LinkRefusedError) as caught:
        await accounts.sign_in(**GITHUB, email_verified=True)
    assert caught.value.reason == "no_email"
    assert await dump(engine) == []


# -- the table of decisions -----------------------------------------------------------------------------------------

# provider verified, provider trusted, local verified: what is done by default, and with take_over.
DECISIONS = [
    (False, False, False, "provider_unverified", "provider_unverified"),
    (False, False, True, "provider_unverified", "provider_unverified"),
    (True, False, True, "linked", "linked"),
    (False, True, True, "linked", "linked"),
    (True, True, True, "linked", "linked"),
    (True, False, False, "local_unverified", "taken_over"),
    (False, True, False, "local_unverified", "local_unverified"),
    (True, True, False, "local_unverified", "taken_over"),
]


@pytest.mark.parametrize(("verified", "trusted", "local", "default", "take_over"), DECISIONS)
async def test_a_new_identity_with_the_address_of_a_user(
    engine: Engine, clock: ManualClock, verified: bool, trusted: bool, local: bool, default: str, take_over: str
) -> None:
    for number, (policy, expected) in enumerate((("refuse", default), ("take_over", take_over))):
        service = AccountService(
            engine,
            clock=clock,
            trusted_providers=["github"] if trusted else ["google"],
            on_unverified_local=policy,  # type: ignore[arg-type]  # it is one of them
        )
        email = f"ada{number}@example.com"
        user_id = await make_user(engine, email=email, email_verified=AT - timedelta(days=9) if local else None)
        password = await make_account(engine, user_id, provider="credential", password="hash")
        await make_session(engine, user_id)
        before = await dump(engine)
        sign_in = partial(
            service.sign_in, provider="github", provider_account_id=email, email=email, email_verified=verified
        )
        if expected.endswith("verified"):
            with pytest.raises(LinkRefusedError) as caught:
                await sign_in()
            assert caught.value.reason == expected
            assert await dump(engine) == before
            continue
        found = await sign_in()
        assert (found.outcome, found.user.id, found.account.user_id) == (expected, user_id, user_id)
        kept = [account.id for account in await service.list(user_id)]
        sessions = await engine.fetchval("SELECT count(*)::int FROM sessions WHERE user_id = $1", user_id)
        if expected == "linked":
            assert (set(kept), sessions) == ({password, found.account.id}, 1)
            assert found.user.email_verified == AT - timedelta(days=9)
        else:
            assert (kept, sessions) == ([found.account.id], 0)
            assert (found.user.email_verified, found.user.updated_at) == (AT, AT)
        again = await sign_in()
        assert again == found.model_copy(update={"outcome": "signed_in"})


@pytest.mark.parametrize(("verified", "trusted", "local", "default", "take_over"), DECISIONS)
async def test_the_table_of_decisions(verified: bool, trusted: bool, local: bool, default: str, take_over: str) -> None:
    for policy, expected in ((False, default), (True, take_over)):
        try:
            outcome: str = decide(verified=verified, trusted=trusted, local_verified=local, take_over=policy)
        except LinkRefusedError as error:
            outcome = error.reason
        assert outcome == expected


async def test_the_settings_decide(engine: Engine, clock: ManualClock) -> None:
    settings = Settings(trusted_providers=["github"], on_unverified_local="take_over")
    kit = KitRocket(settings, engine=engine, clock=clock, background=False)
    await make_user(engine, email="ada@example.com", email_verified=AT)
    eve = await make_user(engine, email="eve@example.com")
    assert (await kit.accounts.sign_in(**GITHUB, email="ada@example.com")).outcome == "linked"
    taken = await kit.accounts.sign_in(
        provider="other", provider_account_id="7", email="eve@example.com", email_verified=True
    )
    assert (taken.outcome, taken.user.id) == ("taken_over", eve)


async def test_a_take_over_touches_nobody_else(engine: Engine, clock: ManualClock) -> None:
    service = AccountService(engine, clock=clock, on_unverified_local="take_over")
    other = await make_user(engine)
    await make_account(engine, other)
    await make_session(engine, other)
    before = await dump(engine)
    eve = await make_user(engine, email="ada@example.com")
    for _ in range(3):
        await make_account(engine, eve)
        await make_session(engine, eve)
    await service.sign_in(**GITHUB, email="ada@example.com", email_verified=True)
    await engine.fetch("DELETE FROM users WHERE id = $1", eve)
    assert await dump(engine) == before


async def test_a_fault_in_a_take_over_changes_nothing(engine: Engine, clock: ManualClock) -> None:
    service = AccountService(engine, clock=clock, on_unverified_local="take_over")
    eve = await make_user(engine, email="ada@example.com")
    await make_account(engine, eve)
    await make_session(engine, eve)
    before = await dump(engine)
    await engine.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a fault'; END $$"
    )
    await engine.fetch("CREATE TRIGGER refuse AFTER INSERT ON accounts FOR EACH ROW EXECUTE FUNCTION refuse()")
    for email in ("ada@example.com", "new@example.com"):
        with pytest.raises(asyncpg.RaiseError):
            await service.sign_in(**GITHUB, email=email, email_verified=True)
    assert await dump(engine) == before


# -- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["with its unique index", "without"])
@pytest.mark.parametrize("addresses", [["ada@example.com"], ["ada@example.com", "lovelace@example.com"]], ids=len)
async def test_many_callbacks_of_one_identity_make_one_user(
    accounts: AccountService, engine: Engine, index: str, addresses: list[str]
) -> None:
    if index == "without":
        await engine.fetch(f"DROP INDEX {UNIQUE_INDEX}")
    await warm_up(engine)
    answers = await together(
        [
            partial(accounts.sign_in, **GITHUB, email=addresses[number % len(addresses)], email_verified=True)
            for number in range(20)
        ]
    )
    found = [answer for answer in answers if isinstance(answer, ProviderSignIn)]
    assert len(found) == 20
    assert len({(one.user.id, one.account.id) for one in found}) == 1
    assert sorted(one.outcome for one in found) == ["created"] + ["signed_in"] * 19
    assert await counts(engine) == (1, 1)


async def test_two_providers_with_one_verified_address_make_one_user(accounts: AccountService, engine: Engine) -> None:
    for round_ in range(20):
        email = f"ada{round_}@example.com"
        sign_in = partial(accounts.sign_in, provider_account_id=email, email=email, email_verified=True)
        answers = await together([partial(sign_in, provider=provider) for provider in ("github", "google")])
        found = [answer for answer in answers if isinstance(answer, ProviderSignIn)]
        assert len({one.user.id for one in found}) == 1
        assert sorted(one.outcome for one in found) == ["created", "linked"]
        assert await counts(engine) == (round_ + 1, 2 * (round_ + 1))


async def beside(engine: Engine, call: Callable[[], Awaitable[object]], *statements: tuple[str, str]) -> object:
    """Run a call that waits for another writer's transaction, and return what it answered or raised."""
    answers: list[object] = []

    async def run() -> None:
        answers.extend(await together([call]))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        for sql, argument in statements:
            await other.execute(sql, argument)
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until_someone_waits(engine)
            await transaction.commit()
    return answers[0]


async def test_another_writer_may_be_about_to_make_the_same_user(accounts: AccountService, engine: Engine) -> None:
    found = await beside(
        engine,
        partial(accounts.sign_in, **GITHUB, email="ada@example.com", email_verified=True),
        ("INSERT INTO users (id, email, name) VALUES ('theirs', $1, 'Ada')", "ada@example.com"),
        (
            "INSERT INTO accounts (id, user_id, provider, provider_account_id)"
            " VALUES ('their account', $1, 'github', '42')",
            "theirs",
        ),
    )
    assert isinstance(found, ProviderSignIn)
    assert (found.outcome, found.user.id) == ("signed_in", "theirs")
    assert await counts(engine) == (1, 1)


async def test_another_writer_may_be_about_to_store_the_same_identity(accounts: AccountService, engine: Engine) -> None:
    await make_user(engine, id="theirs", email="their@example.com")
    found = await beside(
        engine,
        partial(accounts.sign_in, **GITHUB, email="ada@example.com", email_verified=True),
        (
            "INSERT INTO accounts (id, user_id, provider, provider_account_id)"
            " VALUES ('their account', $1, 'github', '42')",
            "theirs",
        ),
    )
    assert isinstance(found, ProviderSignIn)
    assert (found.outcome, found.user.id) == ("signed_in", "theirs")
    assert await counts(engine) == (1, 1), "no user is left behind"


async def test_an_address_that_ceases_to_be_proven_is_not_linked(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    found = await beside(
        engine,
        partial(accounts.sign_in, **GITHUB, email="ada@example.com", email_verified=True),
        ("UPDATE users SET email_verified = NULL WHERE id = $1", user_id),
    )
    assert isinstance(found, LinkRefusedError)
    assert found.reason == "local_unverified"


async def test_an_address_that_is_given_up_meanwhile_is_a_new_users(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    found = await beside(
        engine,
        partial(accounts.sign_in, **GITHUB, email="ada@example.com", email_verified=True),
        ("UPDATE users SET email = 'new@example.com' WHERE id = $1", user_id),
    )
    assert isinstance(found, ProviderSignIn)
    assert found.outcome == "created"
    assert found.user.id != user_id


async def test_an_identity_that_is_unlinked_meanwhile_is_looked_at_again(
    accounts: AccountService, engine: Engine
) -> None:
    user_id = await make_user(engine, email="ada@example.com", email_verified=AT)
    await make_account(engine, user_id, **GITHUB)
    found = await beside(
        engine,
        partial(accounts.sign_in, **GITHUB, email="new@example.com", email_verified=True),
        ("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id),
        ("DELETE FROM accounts WHERE user_id = $1", user_id),
    )
    assert isinstance(found, ProviderSignIn)
    assert (found.outcome, found.user.email) == ("created", "new@example.com")


# -- bad input ------------------------------------------------------------------------------------------------------


BAD: dict[str, list[object]] = {
    "provider": [None, 5, "", "GitHub", "credential", "x" * 65],
    "provider_account_id": [None, 42, "", "a\0b", "x" * 256],
    "email": [5, "", "junk", "a b@example.com", "x" * 1_000_000],
    "email_verified": [None, 1, "true"],
    "name": [5, "", "\ud800", "x" * 201],
    "avatar": [5, "", "x" * 2049],
    "access_token": [5, "", "x" * 16_385],
    "refresh_token": [b"x", "a\0b"],
    "expires_at": ["tomorrow", AT.replace(tzinfo=None)],
}


async def test_bad_input_is_one_error_and_changes_nothing(accounts: AccountService, engine: Engine) -> None:
    good: dict[str, Any] = GITHUB | {"email": "ada@example.com", "email_verified": True}
    for field, values in BAD.items():
        for bad in values:
            with pytest.raises(InvalidInputError) as caught:
                await accounts.sign_in(**good | {field: bad})
            assert caught.value.field == field
    assert await dump(engine) == []


async def test_a_policy_or_a_provider_that_is_none_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(InvalidInputError):
        AccountService(engine, on_unverified_local="merge")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InvalidInputError):
        AccountService(engine, trusted_providers=["Git Hub"])
