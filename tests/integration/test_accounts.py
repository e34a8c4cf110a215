from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import anyio
import pytest
from cryptography.fernet import Fernet
from racing import together, until_someone_waits

from factories import AT, make_account, make_user
from kitrocket.accounts import AccountService
from kitrocket.encryption import TokenCipher
from kitrocket.engine import Engine
from kitrocket.errors import (
    AccountTakenError,
    ConfigurationError,
    InvalidInputError,
    LastAccountError,
    UserNotFoundError,
)
from kitrocket.models import Account
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

EXPIRES = AT + timedelta(hours=1)
UNIQUE_INDEX = "accounts_provider_provider_account_id_idx"


@pytest.fixture
def accounts(engine: Engine, clock: ManualClock) -> AccountService:
    return AccountService(engine, clock=clock)


async def tokens(engine: Engine, account_id: str) -> tuple[object, ...]:
    row = await engine.fetchrow(
        "SELECT access_token, refresh_token, expires_at FROM accounts WHERE id = $1", account_id
    )
    assert row is not None
    return tuple(row)


# -- link -----------------------------------------------------------------------------------------------------------


async def test_link_writes_every_column(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    account = await accounts.link(
        user_id, provider="github", provider_account_id="42", access_token="a", refresh_token="r", expires_at=EXPIRES
    )
    row = await engine.fetchrow("SELECT * FROM accounts")
    assert row is not None
    assert dict(row) == {
        "id": account.id,
        "user_id": user_id,
        "provider": "github",
        "provider_account_id": "42",
        "access_token": "a",
        "refresh_token": "r",
        "expires_at": EXPIRES.replace(tzinfo=None),
        "password": None,
        "created_at": AT.replace(tzinfo=None),
    }
    assert account == Account(
        id=account.id,
        user_id=user_id,
        provider="github",
        provider_account_id="42",
        expires_at=EXPIRES,
        has_password=False,
        created_at=AT,
    )
    assert len(account.id) == 32


async def test_an_expiry_in_another_zone_is_stored_in_utc(accounts: AccountService, engine: Engine) -> None:
    local = EXPIRES.astimezone(timezone(timedelta(hours=-5)))
    account = await accounts.link(
        await make_user(engine), provider="github", provider_account_id="42", access_token="a", expires_at=local
    )
    assert account.expires_at == EXPIRES
    assert await tokens(engine, account.id) == ("a", None, EXPIRES.replace(tzinfo=None))


async def test_linking_again_brings_new_tokens_and_loses_none(
    accounts: AccountService, engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    first = await accounts.link(
        user_id, provider="github", provider_account_id="42", access_token="a", refresh_token="r", expires_at=EXPIRES
    )
    clock.advance(timedelta(days=1))
    again = await accounts.link(user_id, provider="github", provider_account_id="42", access_token="b")
    assert again == first.model_copy(update={"expires_at": None}), "the expiry went with the old token"
    assert await tokens(engine, first.id) == ("b", "r", None)
    await accounts.link(user_id, provider="github", provider_account_id="42", refresh_token="s")
    await accounts.link(user_id, provider="github", provider_account_id="42")
    assert await tokens(engine, first.id) == ("b", "s", None)
    assert await accounts.list(user_id) == [again]


async def test_an_identity_of_another_user_is_taken(accounts: AccountService, engine: Engine) -> None:
    owner, other = await make_user(engine), await make_user(engine)
    account = await make_account(engine, owner, provider="github", provider_account_id="42", access_token="a")
    with pytest.raises(AccountTakenError):
        await accounts.link(other, provider="github", provider_account_id="42", access_token="b")
    assert await tokens(engine, account) == ("a", None, None)
    assert await accounts.list(other) == []


async def test_the_same_number_at_another_provider_is_another_identity(
    accounts: AccountService, engine: Engine
) -> None:
    one, two = await make_user(engine), await make_user(engine)
    await accounts.link(one, provider="github", provider_account_id="42")
    await accounts.link(one, provider="google", provider_account_id="42")
    await accounts.link(two, provider="github", provider_account_id="43")
    assert [account.provider for account in await accounts.list(one)].count("github") == 1


@pytest.mark.parametrize("index", ["with its unique index", "without"])
async def test_of_many_users_who_link_one_identity_one_gets_it(
    accounts: AccountService, engine: Engine, index: str
) -> None:
    if index == "without":
        await engine.fetch(f"DROP INDEX {UNIQUE_INDEX}")
    users = [await make_user(engine) for _ in range(8)]
    for round_ in range(5):
        identity = {"provider": "github", "provider_account_id": str(round_)}
        answers = await together([partial(accounts.link, user_id, **identity) for user_id in users])
        assert sum(isinstance(answer, Account) for answer in answers) == 1
        assert sum(isinstance(answer, AccountTakenError) for answer in answers) == 7
    assert await engine.fetchval("SELECT count(*) FROM accounts") == 5


@pytest.mark.parametrize("index", ["with its unique index", "without"])
async def test_one_user_linking_twice_at_once_has_one_account(
    accounts: AccountService, engine: Engine, index: str
) -> None:
    if index == "without":
        await engine.fetch(f"DROP INDEX {UNIQUE_INDEX}")
    user_id = await make_user(engine)
    for round_ in range(20):
        link = partial(accounts.link, user_id, provider="github", provider_account_id=str(round_))
        answers = await together([partial(link, access_token=str(number)) for number in range(10)])
        assert sum(isinstance(answer, Account) for answer in answers) == 10
        assert len({answer.id for answer in answers if isinstance(answer, Account)}) == 1
    assert await engine.fetchval("SELECT count(*) FROM accounts") == 20


async def test_another_writer_may_be_about_to_link_the_same(accounts: AccountService, engine: Engine) -> None:
    """The other's transaction is still open when ours inserts: ours waits, and then reads what the other wrote."""
    user_id = await make_user(engine)
    answers: list[Account] = []

    async def link() -> None:
        answers.append(await accounts.link(user_id, provider="github", provider_account_id="42", access_token="b"))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute(
            "INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token)"
            " VALUES ('theirs', $1, 'github', '42', 'a')",
            user_id,
        )
        async with anyio.create_task_group() as group:
            group.start_soon(link)
            await until_someone_waits(engine)
            await transaction.commit()
    assert answers[0].id == "theirs"
    assert (await tokens(engine, "theirs"))[0] == "b"


async def test_unknown_users(accounts: AccountService, engine: Engine) -> None:
    assert await accounts.list("nobody") == []
    with pytest.raises(UserNotFoundError):
        await accounts.link("nobody", provider="github", provider_account_id="42")
    with pytest.raises(UserNotFoundError):
        await accounts.unlink("nobody", "account")
    assert await engine.fetchval("SELECT count(*) FROM accounts") == 0


# -- tokens at rest -------------------------------------------------------------------------------------------------


async def test_with_keys_no_token_is_readable_in_the_table(engine: Engine, clock: ManualClock) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    user_id = await make_user(engine)
    service = AccountService(engine, clock=clock, token_keys=[old])
    account = await service.link(
        user_id, provider="github", provider_account_id="42", access_token="gho_one", refresh_token="ghr_two"
    )
    dump = str(await engine.fetch("SELECT accounts::text FROM accounts"))
    assert "gho_one" not in dump
    assert "ghr_two" not in dump
    assert dump.count("f1$") == 2
    stored = await tokens(engine, account.id)
    rotated = TokenCipher([new, old])
    assert [rotated.decrypt(str(text)) for text in stored[:2]] == ["gho_one", "ghr_two"]
    await AccountService(engine, clock=clock, token_keys=[new, old]).link(
        user_id, provider="github", provider_account_id="42", access_token="gho_three"
    )
    assert TokenCipher([new]).decrypt(str((await tokens(engine, account.id))[0])) == "gho_three"


async def test_an_account_carries_no_token(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    account = await accounts.link(
        user_id, provider="github", provider_account_id="42", access_token="gho_one", refresh_token="ghr_two"
    )
    await make_account(engine, user_id, provider="credential", password="$argon2id$hash")
    for shown in (account, *await accounts.list(user_id)):
        text = f"{shown!r} {shown.model_dump_json()}"
        assert not any(secret in text for secret in ("gho_one", "ghr_two", "argon2id"))


async def test_a_bad_key_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ConfigurationError):
        AccountService(engine, token_keys=["no key"])


# -- list and unlink ------------------------------------------------------------------------------------------------


async def test_list_is_oldest_first_and_knows_passwords(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await make_account(engine, user_id, id="newest", at=AT + timedelta(days=1))
    await make_account(engine, user_id, id="oldest", provider="credential", password="hash", at=AT - timedelta(days=1))
    await make_account(engine, user_id, id="middle", provider="other", password="")
    await make_account(engine, await make_user(engine))
    listed = await accounts.list(user_id)
    assert [(account.id, account.has_password) for account in listed] == [
        ("oldest", True),
        ("middle", False),
        ("newest", False),
    ]


async def test_unlink_takes_one_account(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    one, two = await make_account(engine, user_id), await make_account(engine, user_id)
    assert await accounts.unlink(user_id, one) is True
    assert await accounts.unlink(user_id, one) is False
    assert [account.id for account in await accounts.list(user_id)] == [two]


@pytest.mark.parametrize(
    ("provider", "password"),
    [("github", None), ("github", ""), ("credential", "hash")],
    ids=["oauth", "empty", "password"],
)
async def test_the_last_way_in_stays(
    accounts: AccountService, engine: Engine, provider: str, password: str | None
) -> None:
    user_id = await make_user(engine)
    last = await make_account(engine, user_id, provider=provider, password=password)
    await make_account(engine, user_id, id="no-way-in", provider="credential", provider_account_id="x", password="")
    with pytest.raises(LastAccountError) as caught:
        await accounts.unlink(user_id, last)
    assert (caught.value.user_id, caught.value.account_id) == (user_id, last)
    assert await accounts.unlink(user_id, "no-way-in") is True, "a credential without a password is no way in"
    assert [account.id for account in await accounts.list(user_id)] == [last]


async def test_another_users_account_is_not_taken_away(accounts: AccountService, engine: Engine) -> None:
    owner, other = await make_user(engine), await make_user(engine)
    account = await make_account(engine, owner)
    await make_account(engine, owner)
    await make_account(engine, other)
    assert await accounts.unlink(other, account) is False
    assert len(await accounts.list(owner)) == 2


async def test_two_unlinks_at_once_never_leave_nothing(accounts: AccountService, engine: Engine) -> None:
    for _ in range(200):
        user_id = await make_user(engine)
        pair = [await make_account(engine, user_id), await make_account(engine, user_id)]
        answers = await together([partial(accounts.unlink, user_id, account) for account in pair])
        assert sorted(type(answer).__name__ for answer in answers) == ["LastAccountError", "bool"]
        assert await engine.fetchval("SELECT count(*) FROM accounts WHERE user_id = $1", user_id) == 1


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk", ["", "a\0b", "\ud800", "x" * 1_000_000, 5, b"x", True, ["x"], None], ids=lambda junk: ascii(junk)[:12]
)
async def test_bad_input_is_one_error_and_changes_nothing(accounts: AccountService, engine: Engine, junk: Any) -> None:
    user_id = await make_user(engine)
    account = await make_account(engine, user_id)
    good: dict[str, Any] = {"provider": "github", "provider_account_id": "42"}
    calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        ("user_id", lambda: accounts.link(junk, **good)),
        ("provider", lambda: accounts.link(user_id, **good | {"provider": junk})),
        ("provider_account_id", lambda: accounts.link(user_id, **good | {"provider_account_id": junk})),
        ("user_id", lambda: accounts.list(junk)),
        ("user_id", lambda: accounts.unlink(junk, account)),
        ("account_id", lambda: accounts.unlink(user_id, junk)),
    ]
    if junk is not None:
        calls += [
            ("access_token", lambda: accounts.link(user_id, **good, access_token=junk)),
            ("refresh_token", lambda: accounts.link(user_id, **good, refresh_token=junk)),
            ("expires_at", lambda: accounts.link(user_id, **good, expires_at=junk)),
        ]
    for field, call in calls:
        with pytest.raises(InvalidInputError) as caught:
            await call()
        assert caught.value.field == field
    assert [found.id for found in await accounts.list(user_id)] == [account]


@pytest.mark.parametrize("provider", ["GitHub", "git hub", "git.hub", "x" * 65, "github\n", "credential"])
async def test_names_that_are_no_provider(accounts: AccountService, engine: Engine, provider: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await accounts.link(await make_user(engine), provider=provider, provider_account_id="42")
    assert caught.value.field == "provider"


async def test_values_at_their_limits(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    await accounts.link(user_id, provider="x" * 64, provider_account_id="y" * 255, access_token="t" * 16_384)
    for bad in ({"access_token": "t" * 16_385}, {"refresh_token": "é" * 8_193}, {"expires_at": datetime(2026, 3, 1)}):  # noqa: DTZ001 - naive on purpose
        with pytest.raises(InvalidInputError):
            await accounts.link(user_id, provider="github", provider_account_id="42", **bad)  # type: ignore[arg-type]
