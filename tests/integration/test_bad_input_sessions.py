"""Junk for the public methods of ``SessionService``: a typed error or nothing, and no change."""

from __future__ import annotations

import inspect
from datetime import datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import AT, make_session, make_user
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, KitRocketError
from kitrocket.models import Session
from kitrocket.sessions import SessionService
from kitrocket.testing import ManualClock
from kitrocket.tokens import TokenStorage, digest

pytestmark = pytest.mark.asyncio

SESSION = Session(id="s1", user_id="ada", expires_at=AT, created_at=AT, seen_at=AT, ip_address=None, user_agent=None)
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "a\0b",
            "\ud800",
            "ada\udfff",
            "a" * 255,
            "a" * 256,
            "x" * 1_000_000,
            "k1$" + "0" * 64,
            digest("a" * 32),
            "a" * 32,
            "a" * 31 + "\n",
            "é" * 32,
            "аdа",  # noqa: RUF001 - Cyrillic letters that look like Latin ones
            "ada",  # a user that is there
            "s1",  # a session of hers
            "%",
            "'; DELETE FROM sessions; --",
            "2001:db8::1%" + "z" * 100_000,
            "::ffff:1.2.3.4",
            "1.2.3.4/8",
            "\u202eada",
            "🚀" * 512,
        ]
    ),
    st.text(max_size=40),
    st.text(alphabet=st.characters(categories=["Cs", "Cc", "Lo"]), max_size=40),
)
ANYTHING = st.one_of(
    TEXTS,
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 50, 1000, 10**6, 2**31, 2**63, 10**30]),
    st.sampled_from([0.0, -1.5, float("nan"), float("inf")]),
    st.binary(max_size=40),
    st.sampled_from([timedelta(0), timedelta(days=-1), timedelta(days=1), timedelta.max, timedelta.min]),
    st.sampled_from([AT, AT.replace(tzinfo=None), datetime.max, datetime.min]),  # noqa: DTZ901 - naive on purpose
    st.lists(TEXTS, max_size=4),
    st.sampled_from([object(), int, {}, {"a": 1}, ("ada",), SESSION, SESSION.model_copy(update={"id": "\0"})]),
)
METHODS = [
    name
    for name, _ in inspect.getmembers(SessionService, inspect.isfunction)
    if not name.startswith("_") and name not in ("coalescing", "count_expired", "count_plain")
]
ROWS = "SELECT sessions::text FROM sessions UNION ALL SELECT users::text FROM users ORDER BY 1"


class RolledBackError(Exception):
    """Ends a transaction whose changes were legitimate."""


@st.composite
def arguments_of(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Values for a method: for the needed arguments, and for some of the others."""
    parameters = list(inspect.signature(getattr(SessionService, name)).parameters.values())[1:]
    return {
        parameter.name: draw(ANYTHING)
        for parameter in parameters
        if parameter.default is parameter.empty or draw(st.booleans())
    }


async def rows(engine: Engine) -> list[str]:
    return [row[0] for row in await engine.fetch(ROWS)]


@pytest_asyncio.fixture(autouse=True)
async def _rows(engine: Engine) -> None:
    for user in ("ada", "grace"):
        await make_user(engine, id=user)
    await make_session(engine, "ada", id="s1", token="b" * 32, expires_at=AT + timedelta(days=3))
    await make_session(engine, "ada", id="s2", token=digest("a" * 32))
    await make_session(engine, "ada", id="s3", expires_at=AT - timedelta(days=3))
    await make_session(engine, "grace", id="s4", token=digest("c" * 32))


async def test_every_public_method_is_tried() -> None:
    assert {"create", "validate", "is_fresh", "require_fresh", "list", "revoke", "revoke_others"} < set(METHODS)
    assert {"revoke_all", "revoke_many", "delete_expired", "digest_tokens"} < set(METHODS)


@pytest.mark.parametrize("tokens", ["digest", "digest+plain"])
@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=50)
@given(data=st.data())
async def test_junk_is_a_typed_error_or_nothing_and_changes_nothing(
    engine: Engine, clock: ManualClock, name: str, tokens: TokenStorage, data: st.DataObject
) -> None:
    service = SessionService(engine, clock=clock, tokens=tokens, max_sessions=3)
    arguments = data.draw(arguments_of(name))
    before = await rows(engine)
    error: KitRocketError | None = None
    answer: Any = None
    with pytest.raises(RolledBackError):
        async with engine.transaction():
            try:
                answer = getattr(service, name)(**arguments)
                answer = await answer if inspect.isawaitable(answer) else answer
            except KitRocketError as caught:
                error = caught
            if error is not None or not answer:
                assert await rows(engine) == before
            raise RolledBackError
    if isinstance(error, InvalidInputError):
        assert error.field in arguments
        assert len(str(error)) < 300


@pytest.mark.parametrize("junk", [None, True, 5, b"a", 1.5, ["a"], {}, object()], ids=lambda junk: type(junk).__name__)
async def test_another_type_is_an_error_that_names_the_argument(
    engine: Engine, clock: ManualClock, junk: object
) -> None:
    service: Any = SessionService(engine, clock=clock)
    before = await rows(engine)
    for field, call in {
        "user_id": lambda: service.create(junk),
        "token": lambda: service.validate(junk),
        "session": lambda: service.require_fresh(junk),
        "session_id": lambda: service.revoke(junk, user_id="ada"),
        "keep": lambda: service.revoke_others("ada", keep=junk),
        "batch_size": lambda: service.delete_expired(batch_size="a" if junk == 5 else junk),
        "limit": lambda: service.delete_expired(limit="a" if junk in (5, None) else junk),
        "budget": lambda: service.digest_tokens(budget="a" if junk is None else junk),
        "report": lambda: service.delete_expired(report="a" if junk is None else junk),
        "refresh": lambda: service.validate("a" * 32, refresh=None if junk is True else junk),
        "node": lambda: service.validate("a" * 32, refresh=False, node="" if junk is None else junk),
    }.items():
        with pytest.raises(InvalidInputError) as raised:
            answer = call()
            await answer
        assert raised.value.field == field
    assert await rows(engine) == before
