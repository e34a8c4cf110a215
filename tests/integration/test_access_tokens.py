"""Access tokens, refreshed once for all who wait."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from cryptography.fernet import Fernet
from racing import together, until_someone_waits, warm_up

from factories import AT, make_account, make_user
from kitrocket.accounts import AccountService
from kitrocket.encryption import TokenCipher
from kitrocket.engine import Engine
from kitrocket.errors import (
    AccountNotFoundError,
    ConfigurationError,
    InvalidInputError,
    TokenRefreshError,
    TransactionError,
    UserNotFoundError,
)
from kitrocket.models import RefreshedTokens
from kitrocket.testing import ManualClock

pytestmark = pytest.mark.asyncio

SECOND = timedelta(seconds=1)
LATER = AT + timedelta(hours=1)


class Provider:
    """A provider's token endpoint: notes what it is asked with, and answers when the gate is open."""

    def __init__(self, **answer: Any) -> None:
        self.asked: list[str] = []
        self.answer = RefreshedTokens(**{"access_token": "new", "expires_at": LATER} | answer)
        self.gate = anyio.Event()
        self.gate.set()

    async def __call__(self, refresh_token: str) -> RefreshedTokens:
        self.asked.append(refresh_token)
        await self.gate.wait()
        return self.answer


@pytest.fixture
def accounts(engine: Engine, clock: ManualClock) -> AccountService:
    return AccountService(engine, clock=clock)


async def make_linked(engine: Engine, **account: Any) -> str:
    """A user whose access token at GitHub is over, with a refresh token."""
    user_id = await make_user(engine)
    tokens = {"access_token": "old", "refresh_token": "refresh", "expires_at": AT - SECOND}
    await make_account(engine, user_id, **tokens | account)
    return user_id


async def stored(engine: Engine) -> tuple[object, ...]:
    row = await engine.fetchrow("SELECT access_token, refresh_token, expires_at FROM accounts")
    assert row is not None
    return tuple(row)


async def others_wait(accounts: AccountService, number: int) -> None:
    """Return once so many callers wait for the refresh that is under way."""
    (flight,) = accounts._refresher._flights.values()
    while flight.landed.statistics().tasks_waiting < number:
        await anyio.lowlevel.checkpoint()


async def never(refresh_token: str) -> RefreshedTokens:
    raise AssertionError("the provider is not to be asked")


# -- when it is due -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [-1, 0, 1])
@pytest.mark.parametrize("leeway", [0, 60, 300])
async def test_a_token_is_due_as_long_before_its_end_as_the_leeway_says(
    accounts: AccountService, engine: Engine, leeway: int, left: int
) -> None:
    user_id = await make_linked(engine, expires_at=AT + (leeway + left) * SECOND)
    provider = Provider()
    options = {} if leeway == 60 else {"leeway": leeway * SECOND}
    token = await accounts.access_token(user_id, "github", refresh=provider, **options)
    assert (token, provider.asked) == (("old", []) if left > 0 else ("new", ["refresh"]))


async def test_a_token_without_an_end_is_never_due(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine, expires_at=None)
    assert await accounts.access_token(user_id, "github", refresh=never) == "old"


@pytest.mark.parametrize("left", [-1, 0, 1])
async def test_without_a_refresh_token_it_serves_as_long_as_it_lives(
    accounts: AccountService, engine: Engine, left: int
) -> None:
    user_id = await make_linked(engine, refresh_token=None, expires_at=AT + left * SECOND)
    if left > 0:
        assert await accounts.access_token(user_id, "github", refresh=never) == "old"
    else:
        with pytest.raises(TokenRefreshError) as caught:
            await accounts.access_token(user_id, "github", refresh=never)
        assert caught.value.provider == "github"


async def test_a_refresh_token_alone_brings_an_access_token(accounts: AccountService, engine: Engine) -> None:
    for expires_at in (None, LATER):
        user_id = await make_linked(engine, access_token=None, expires_at=expires_at)
        assert await accounts.access_token(user_id, "github", refresh=Provider()) == "new"


@pytest.mark.parametrize("answered", [None, "next"])
async def test_the_answer_is_stored_and_an_old_refresh_token_stays(
    accounts: AccountService, engine: Engine, answered: str | None
) -> None:
    user_id = await make_linked(engine)
    provider = Provider(refresh_token=answered)
    for _ in range(2):
        assert await accounts.access_token(user_id, "github", refresh=provider) == "new"
    assert provider.asked == ["refresh"]
    assert await stored(engine) == ("new", answered or "refresh", LATER.replace(tzinfo=None))


async def test_a_new_token_may_have_no_end(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine)
    await accounts.access_token(user_id, "github", refresh=Provider(expires_at=None))
    assert await stored(engine) == ("new", "refresh", None)


async def test_tokens_are_encrypted_and_readable_after_a_rotation(engine: Engine, clock: ManualClock) -> None:
    keys = [Fernet.generate_key().decode() for _ in range(2)]
    user_id = await make_user(engine)
    await AccountService(engine, clock=clock, token_keys=keys[:1]).link(
        user_id, provider="github", provider_account_id="42", access_token="old", refresh_token="r", expires_at=AT
    )
    provider = Provider(refresh_token="s")
    rotated = AccountService(engine, clock=clock, token_keys=keys[::-1])
    assert await rotated.access_token(user_id, "github", refresh=provider) == "new"
    assert provider.asked == ["r"]
    texts = [str(text) for text in (await stored(engine))[:2]]
    assert all(text.startswith("f1$") for text in texts)
    assert [TokenCipher(keys[1:]).decrypt(text) for text in texts] == ["new", "s"]
    assert await rotated.access_token(user_id, "github", refresh=never) == "new"
    with pytest.raises(ConfigurationError):
        await AccountService(engine, clock=clock).access_token(user_id, "github", refresh=never)


async def test_of_several_accounts_the_oldest_counts(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine, expires_at=None)
    await make_account(engine, user_id, access_token="second", at=AT + SECOND)
    await make_account(engine, user_id, provider="google", access_token="google", at=AT - SECOND)
    assert await accounts.access_token(user_id, "github", refresh=never) == "old"
    assert await accounts.access_token(user_id, "google", refresh=never) == "google"


# -- one for all ----------------------------------------------------------------------------------------------------


async def test_of_many_callers_in_one_process_one_asks(accounts: AccountService, engine: Engine) -> None:
    await warm_up(engine)
    user_id = await make_linked(engine)
    provider = Provider()
    answers = await together([partial(accounts.access_token, user_id, "github", refresh=provider)] * 20)
    assert answers == ["new"] * 20
    assert provider.asked == ["refresh"]


async def test_those_who_wait_hold_no_connection(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine)
    provider = Provider()
    provider.gate = anyio.Event()
    answers: list[object] = []

    async def call() -> None:
        answers.append(await accounts.access_token(user_id, "github", refresh=provider))

    async with anyio.create_task_group() as group:
        for _ in range(40):
            group.start_soon(call)
        while not provider.asked:
            await anyio.lowlevel.checkpoint()
        assert len(await together([partial(engine.fetchval, "SELECT 1")] * 40)) == 40
        provider.gate.set()
    assert answers == ["new"] * 40


async def test_users_do_not_wait_for_each_other(accounts: AccountService, engine: Engine) -> None:
    slow, fast = await make_linked(engine), await make_linked(engine)
    provider = Provider()
    provider.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(accounts.access_token, slow, "github", refresh=provider))
        while not provider.asked:
            await anyio.lowlevel.checkpoint()
        assert await accounts.access_token(fast, "github", refresh=Provider()) == "new"
        provider.gate.set()


OTHER_PROCESS = """
import asyncio, sys
from datetime import datetime
from functools import partial

from kitrocket import AccountService, Engine, RefreshedTokens

url, user_id, asked, now = sys.argv[1:]

async def refresh(refresh_token):
    with open(asked, "a") as file:
        file.write("other\\n")
    return RefreshedTokens(access_token="other")

async def main():
    async with Engine(url) as engine:
        accounts = AccountService(engine, clock=lambda: datetime.fromisoformat(now))
        print("ready", flush=True)
        sys.stdin.readline()
        calls = [accounts.access_token(user_id, "github", refresh=refresh) for _ in range(10)]
        print(" ".join(await asyncio.gather(*calls)), flush=True)

asyncio.run(main())
"""


async def test_of_many_callers_in_two_processes_one_asks(
    engine: Engine, clock: ManualClock, database_url: str, tmp_path: Path
) -> None:
    accounts = AccountService(engine, clock=clock, refresh_limit=timedelta(seconds=60))  # the machine may be busy
    user_id = await make_linked(engine)
    asked = tmp_path / "asked"
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OTHER_PROCESS, database_url, user_id, str(asked), AT.isoformat()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert await other.stdout.readline() == b"ready\n"

        async def refresh(refresh_token: str) -> RefreshedTokens:
            """While the provider is being asked, the other process comes and finds the row locked."""
            with asked.open("a") as file:
                file.write("here\n")
            other.stdin.write(b"go\n")
            await until_someone_waits(engine)
            return RefreshedTokens(access_token="new")

        answers = await together([partial(accounts.access_token, user_id, "github", refresh=refresh)] * 10)
        theirs = (await other.stdout.readline()).split()
    finally:
        if other.returncode is None:
            other.stdin.close()
            await other.wait()
    assert (answers, theirs) == (["new"] * 10, [b"new"] * 10)
    assert asked.read_text() == "here\n"


# -- when it fails --------------------------------------------------------------------------------------------------


async def test_a_failure_is_everybodys_and_changes_nothing(accounts: AccountService, engine: Engine) -> None:
    await warm_up(engine)
    user_id = await make_linked(engine)
    before = await stored(engine)
    asked = 0

    async def refuse(refresh_token: str) -> RefreshedTokens:
        nonlocal asked
        asked += 1
        await others_wait(accounts, 7)
        raise ZeroDivisionError

    answers = await together([partial(accounts.access_token, user_id, "github", refresh=refuse)] * 8)
    assert asked == 1
    for answer in answers:
        assert isinstance(answer, TokenRefreshError)
        assert isinstance(answer.__cause__, ZeroDivisionError)
        assert "refresh" not in f"{answer.args}"
    assert await stored(engine) == before
    assert await accounts.access_token(user_id, "github", refresh=Provider()) == "new", "the next one tries again"


async def test_a_provider_has_so_long_and_no_longer(engine: Engine, clock: ManualClock) -> None:
    accounts = AccountService(engine, clock=clock, refresh_limit=timedelta(milliseconds=20))
    user_id = await make_linked(engine)
    before = await stored(engine)
    provider = Provider()
    provider.gate = anyio.Event()
    with pytest.raises(TokenRefreshError) as caught:
        await accounts.access_token(user_id, "github", refresh=provider)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert await stored(engine) == before
    assert AccountService(engine)._refresher._limit == 10


@pytest.mark.parametrize(
    "answer",
    [None, "new", {"access_token": "new"}, RefreshedTokens(access_token=""), RefreshedTokens(access_token="a\0b")],
    ids=["none", "text", "dict", "empty", "NUL"],
)
async def test_an_answer_that_is_none_changes_nothing(accounts: AccountService, engine: Engine, answer: Any) -> None:
    user_id = await make_linked(engine)
    before = await stored(engine)

    async def refresh(refresh_token: str) -> RefreshedTokens:
        return answer  # type: ignore[no-any-return]  # on purpose

    with pytest.raises(TokenRefreshError) as caught:
        await accounts.access_token(user_id, "github", refresh=refresh)
    assert isinstance(caught.value.__cause__, InvalidInputError)
    assert await stored(engine) == before


async def test_when_the_one_who_asks_is_cancelled_another_asks(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine)
    provider = Provider()
    provider.gate = anyio.Event()
    answers: list[object] = []

    async def wait() -> None:
        answers.append(await accounts.access_token(user_id, "github", refresh=provider))

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as first:
                first.start_soon(wait)
                while not provider.asked:
                    await anyio.lowlevel.checkpoint()
                for _ in range(5):
                    group.start_soon(wait)
                await others_wait(accounts, 5)
                scope.cancel()
        while len(provider.asked) < 2:
            await anyio.lowlevel.checkpoint()
        provider.gate.set()
    assert answers == ["new"] * 5
    assert provider.asked == ["refresh"] * 2
    assert accounts._refresher._flights == {}


async def test_an_account_that_is_unlinked_meanwhile(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine)
    answers: list[object] = []

    async def call() -> None:
        answers.extend(await together([partial(accounts.access_token, user_id, "github", refresh=never)]))

    async with engine.direct() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("DELETE FROM accounts")
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await until_someone_waits(engine)
            await transaction.commit()
    assert isinstance(answers[0], TokenRefreshError)


async def test_inside_a_transaction_nothing_is_refreshed(accounts: AccountService, engine: Engine) -> None:
    due, fresh = await make_linked(engine), await make_linked(engine, expires_at=None)
    async with engine.transaction():
        assert await accounts.access_token(fresh, "github", refresh=never) == "old"
        with pytest.raises(TransactionError):
            await accounts.access_token(due, "github", refresh=never)


async def test_who_has_no_token(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_user(engine)
    with pytest.raises(UserNotFoundError):
        await accounts.access_token("nobody", "github", refresh=never)
    for _ in range(2):
        with pytest.raises(AccountNotFoundError) as caught:
            await accounts.access_token(user_id, "github", refresh=never)
        assert (caught.value.user_id, caught.value.provider) == (user_id, "github")
        await make_account(engine, user_id)


async def test_bad_input_is_one_error(accounts: AccountService, engine: Engine) -> None:
    user_id = await make_linked(engine)
    good: dict[str, Any] = {"user_id": user_id, "provider": "github", "refresh": never, "leeway": SECOND}
    bads: dict[str, list[object]] = {
        "user_id": [None, 5, "", "a\0b", "x" * 256],
        "provider": [None, "", "GitHub", "credential"],
        "refresh": [None, "never", 5],
        "leeway": [None, 60, -SECOND],
    }
    for field, values in bads.items():
        for bad in values:
            call: Callable[[], Awaitable[str]] = partial(accounts.access_token, **good | {field: bad})
            with pytest.raises(InvalidInputError) as caught:
                await call()
            assert caught.value.field == field


async def test_no_token_is_in_a_repr() -> None:
    shown = repr(RefreshedTokens(access_token="gho_one", refresh_token="ghr_two", expires_at=LATER))
    assert "gho_one" not in shown
    assert "ghr_two" not in shown
