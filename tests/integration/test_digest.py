"""The move from plain tokens to digests, while people stay signed in."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest
from racing import together, warm_up

from factories import make_session, make_user
from kitrocket.clock import to_db
from kitrocket.engine import Engine
from kitrocket.errors import ConfigurationError, InvalidInputError
from kitrocket.models import DigestResult
from kitrocket.sessions import SessionService
from kitrocket.testing import ManualClock
from kitrocket.tokens import digest, new_token

pytestmark = pytest.mark.asyncio

DAY = timedelta(days=1)


async def fill(engine: Engine, clock: ManualClock, *, plain: int) -> list[str]:
    """Store sessions as Better Auth does, and return their tokens."""
    user_id = await make_user(engine)
    tokens = [new_token() for _ in range(plain)]
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at, created_at)"
        " SELECT 's' || row_number() OVER (), $1, token, $3::timestamp + interval '7 days', $3"
        " FROM unnest($2::text[]) token",
        user_id,
        tokens,
        to_db(clock.now),
    )
    return tokens


async def stored(engine: Engine) -> set[str]:
    return {row["token"] for row in await engine.fetch("SELECT token FROM sessions")}


async def test_digests_take_the_place_of_plain_tokens_and_everyone_stays_signed_in(
    engine: Engine, clock: ManualClock
) -> None:
    tokens = await fill(engine, clock, plain=2_500)
    sessions = SessionService(engine, clock=clock, tokens="digest+plain")
    issued = await sessions.create(await make_user(engine))
    some = [*tokens[::100], issued.token]
    assert all([await sessions.validate(token) for token in some])
    assert await sessions.count_plain() == 2_500
    reported: list[int] = []
    assert await sessions.digest_tokens(report=reported.append) == DigestResult(digested=2_500, batches=3, more=False)
    assert reported == [1_000, 2_000, 2_500]
    assert await sessions.digest_tokens() == DigestResult(digested=0, batches=0, more=False)
    assert await sessions.count_plain() == 0
    assert await stored(engine) == {digest(token) for token in [*tokens, issued.token]}
    for service in (sessions, SessionService(engine, clock=clock)):
        assert all([await service.validate(token) for token in some])
        assert await service.validate(digest(some[0])) is None


async def test_a_batch_that_ends_with_the_last_row(engine: Engine, clock: ManualClock) -> None:
    await fill(engine, clock, plain=200)
    sessions = SessionService(engine, clock=clock)
    assert await sessions.digest_tokens(batch_size=100) == DigestResult(digested=200, batches=2, more=False)


async def test_a_budget_is_kept_to_one_batch(engine: Engine, clock: ManualClock) -> None:
    await fill(engine, clock, plain=250)
    sessions = SessionService(engine, clock=clock)
    spent = timedelta(0)
    assert await sessions.digest_tokens(batch_size=100, budget=spent) == DigestResult(
        digested=100, batches=1, more=True
    )
    assert await sessions.digest_tokens(batch_size=150, budget=spent) == DigestResult(
        digested=150, batches=1, more=False
    )


async def test_what_was_reported_stays_when_it_is_cancelled(engine: Engine, clock: ManualClock) -> None:
    tokens = await fill(engine, clock, plain=500)
    sessions = SessionService(engine, clock=clock, tokens="digest+plain")
    reported: list[int] = []
    with anyio.CancelScope() as scope:

        def report(count: int) -> None:
            reported.append(count)
            if count == 300:
                scope.cancel()

        await sessions.digest_tokens(batch_size=100, report=report)
    assert scope.cancelled_caught
    assert reported == [100, 200, 300]
    left = await sessions.count_plain()
    assert left in (200, 100)  # the next batch may have come through before the cancellation did
    assert all([await sessions.validate(token) for token in tokens])
    assert await sessions.digest_tokens() == DigestResult(digested=left, batches=1, more=False)


async def test_it_runs_beside_itself_and_beside_everything_else(engine: Engine, clock: ManualClock) -> None:
    tokens = await fill(engine, clock, plain=1_000)
    sessions = SessionService(engine, clock=clock, tokens="digest+plain")
    owner = (await sessions.validate(tokens[0])).user.id  # type: ignore[union-attr]
    clock.advance(2 * DAY)  # so that each check slides its session
    await warm_up(engine)

    async def check() -> int:
        return sum([await sessions.validate(token) is not None for token in tokens[:300]])

    async def revoke() -> int:
        return sum([await sessions.revoke(f"s{number}", user_id=owner) for number in range(801, 1_001)])

    first, second, checked, revoked, again = await together(
        [
            lambda: sessions.digest_tokens(batch_size=50),
            lambda: sessions.digest_tokens(batch_size=30),
            check,
            revoke,
            check,
        ]
    )
    assert (checked, revoked, again) == (300, 200, 300)
    assert isinstance(first, DigestResult)
    assert isinstance(second, DigestResult)
    assert 800 <= first.digested + second.digested <= 1_000
    assert await stored(engine) == {digest(token) for token in tokens[:800]}


async def test_a_service_that_knows_plain_tokens_only_refuses(engine: Engine, clock: ManualClock) -> None:
    tokens = await fill(engine, clock, plain=1)
    sessions = SessionService(engine, clock=clock, tokens="plain")
    with pytest.raises(ConfigurationError, match=r"digest\+plain"):
        await sessions.digest_tokens()
    assert await stored(engine) == set(tokens)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 1.5}),
        ("budget", {"budget": 10}),
        ("budget", {"budget": -DAY}),
    ],
)
async def test_digest_with_bad_input(
    engine: Engine, clock: ManualClock, field: str, arguments: dict[str, object]
) -> None:
    tokens = await fill(engine, clock, plain=1)
    with pytest.raises(InvalidInputError) as raised:
        await SessionService(engine, clock=clock).digest_tokens(**arguments)  # type: ignore[arg-type]
    assert raised.value.field == field
    assert await stored(engine) == set(tokens)


async def test_how_many_there_are_to_sweep(engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    await make_session(engine, user_id, expires_at=clock.now, at=clock.now - DAY)
    await make_session(engine, user_id, expires_at=clock.now + DAY, at=clock.now - 30 * DAY)
    await make_session(engine, user_id)
    assert await SessionService(engine, clock=clock).count_expired() == 1
    shared = SessionService(engine, clock=clock, tokens="digest+plain")
    assert await shared.count_expired() == 2
    assert (await shared.delete_expired()).deleted == 2
    assert await shared.count_expired() == 0
