"""The application's side: people sign in, sessions are checked while expired ones are swept, AI calls are counted."""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from time import perf_counter
from typing import TypeVar

import anyio
import asyncpg

from kitrocket import tokens
from kitrocket.clock import to_db
from kitrocket.demo.lifecycles import MAYA, MAYA_EMAIL, STORIES, Person
from kitrocket.kit import KitRocket
from kitrocket.models import IssuedSession, ModelPrice, SweepResult, UsageEntry
from kitrocket.sessions import SessionService

T = TypeVar("T")

EXPIRED_SESSIONS = 10_000
USAGE_ROWS = 20_000
USAGE_CALLERS = 64
USAGE_REPEATED = 2_000
USAGE_WINDOW = timedelta(days=30)

_SESSIONS_EACH = 5
_DUE_EACH = 2
_USAGE_SPAN = timedelta(days=45)
#: No call is dated this close to the window's edge, which moves while the demo runs.
_EDGE = timedelta(hours=1)
_MODELS = {"claude-sonnet-4-20250514": 6, "claude-opus-4-20250514": 2, "gpt-4o-mini": 3, "gemini-2.5-flash": 1}
#: Made-up prices of a million tokens: the first from long ago on, the second for the last days.
_PRICES = {
    "claude-sonnet-4-20250514": ("9.00", "7.50"),
    "claude-opus-4-20250514": ("45.00", "37.50"),
    "gpt-4o-mini": ("0.375", "0.35"),
    "gemini-2.5-flash": ("1.40", "1.25"),
}
_PRICES_CHANGED = timedelta(days=10)


async def each(work: Callable[[T], Awaitable[object]], items: Iterable[T], *, callers: int) -> None:
    """Run ``work`` on every item, ``callers`` at a time."""
    waiting = iter(items)

    async def caller() -> None:
        for item in waiting:
            await work(item)

    async with anyio.create_task_group() as group:
        for _ in range(callers):
            group.start_soon(caller)


# -- people -----------------------------------------------------------------------------------------------------


async def create_people(kit: KitRocket, advance: Callable[[], object]) -> tuple[list[Person], dict[str, str]]:
    """Create a user with a password for each story, and the one of the payloads. Return them and their passwords."""
    people: dict[str, Person] = {}
    passwords: dict[str, str] = {}

    async def create(who: tuple[str, str, str, str | None]) -> None:
        name, email, link, id = who
        passwords[email] = secrets.token_urlsafe(12)
        user = await kit.users.create(email=email, name=name, password=passwords[email], id=id)
        if link == "email":
            await kit.users.mark_email_verified(user.id)
        people[email] = Person(user.id, name, email, link)
        advance()

    wanted: list[tuple[str, str, str, str | None]] = [(story.name, story.email, story.link, None) for story in STORIES]
    wanted.append(("Maya Okafor", MAYA_EMAIL, "subscription", MAYA))
    await each(create, wanted, callers=8)
    return [people[email] for _, email, _, _ in wanted], passwords


@dataclass(frozen=True)
class SignIns:
    """How many right sign-ins were let in, and how many wrong ones were not."""

    welcomed: int
    refused: int


async def sign_in(kit: KitRocket, passwords: dict[str, str]) -> SignIns:
    """Sign four people in with their passwords, and try a wrong one, another's, and an unknown address."""
    known = list(passwords)[:4]
    right = [(email.upper(), passwords[email]) for email in known]
    wrong = [(known[0], "not the password"), (known[1], passwords[known[2]]), ("who@example.com", "whoever it is")]
    found: list[bool] = []

    async def attempt(credentials: tuple[str, str]) -> None:
        email, password = credentials
        user = await kit.users.authenticate(email=email, password=password)
        found.append(((email, password) in right) == (user is not None and user.email == email.lower()))

    await each(attempt, right, callers=4)
    welcomed = sum(found)
    found.clear()
    await each(attempt, wrong, callers=4)
    return SignIns(welcomed, sum(found))


# -- sessions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SessionFigures:
    """What became of sessions. ``during_sweep`` counts validations while the sweep ran, ``lost`` those that failed."""

    live: int
    slid: int
    slid_again: int
    junk_accepted: int
    revoked: int
    swept: SweepResult
    sweep_seconds: float
    during_sweep: int
    lost: int


async def run_sessions(kit: KitRocket, raw: asyncpg.Connection[asyncpg.Record], people: list[Person]) -> SessionFigures:
    """Sign people in on several devices, validate and slide their sessions, and sweep expired ones meanwhile."""
    issued = await _sign_in_devices(kit, people)
    slid = await _validate_all(kit, issued)
    slid_again = await _validate_all(kit, issued)
    stored = tokens.digest(issued[0].token)
    junk = [await kit.sessions.validate(token) for token in ("", "x" * 32, "x" * 100_000, stored)]
    kept = issued.pop()
    revoked = await kit.sessions.revoke_others(kept.session.user_id, keep=kept.token)
    issued = [one for one in issued if one.session.user_id != kept.session.user_id] + [kept]
    await _insert_expired(raw, people, kit.clock())
    began = perf_counter()
    swept, results = await _sweep_while_validating(kit, issued)
    return SessionFigures(
        live=len(issued),
        slid=slid,
        slid_again=slid_again,
        junk_accepted=sum(found is not None for found in junk),
        revoked=revoked,
        swept=swept,
        sweep_seconds=perf_counter() - began,
        during_sweep=len(results),
        lost=results.count(False),
    )


def due_sessions() -> int:
    """Return how many sessions are old enough to slide."""
    return _DUE_EACH * (len(STORIES) + 1)


async def _sign_in_devices(kit: KitRocket, people: list[Person]) -> list[IssuedSession]:
    """Create sessions; some by a service whose clock is two days behind, so that they are due to slide now."""
    now = kit.clock()
    earlier = SessionService(kit.engine, clock=lambda: now - timedelta(days=2))
    wanted = [
        (person, earlier if number < _DUE_EACH else kit.sessions)
        for person in people
        for number in range(_SESSIONS_EACH)
    ]
    issued: list[IssuedSession] = []

    async def create(one: tuple[Person, SessionService]) -> None:
        person, service = one
        issued.append(await service.create(person.id, ip_address="203.0.113.7", user_agent="kitrocket demo"))

    await each(create, wanted, callers=8)
    return issued


async def _insert_expired(raw: asyncpg.Connection[asyncpg.Record], people: list[Person], now: datetime) -> None:
    """Write sessions that expired within the last weeks, as time alone would leave them behind."""
    rows = []
    for number in range(EXPIRED_SESSIONS):
        expired = to_db(now) - timedelta(minutes=1 + number)
        person = people[number % len(people)]
        stored = tokens.digest(tokens.new_token())
        rows.append((f"expired_{number}", person.id, stored, expired, expired - timedelta(days=7)))
    await raw.copy_records_to_table(
        "sessions", records=rows, columns=["id", "user_id", "token", "expires_at", "created_at"]
    )


async def _validate_all(kit: KitRocket, issued: Sequence[IssuedSession]) -> int:
    """Validate every session and return how many slid; one that is not found counts as a million."""
    slid: list[int] = []

    async def validate(one: IssuedSession) -> None:
        found = await kit.sessions.validate(one.token)
        slid.append(1_000_000 if found is None else int(found.refreshed))

    await each(validate, issued, callers=16)
    return sum(slid)


async def _sweep_while_validating(kit: KitRocket, issued: Sequence[IssuedSession]) -> tuple[SweepResult, list[bool]]:
    """Sweep, and validate live sessions for as long as that takes. Return both results."""
    results: list[bool] = []
    done = anyio.Event()

    async def keep_validating(offset: int) -> None:
        number = offset
        while not done.is_set():
            one = issued[number % len(issued)]
            found = await kit.sessions.validate(one.token)
            results.append(found is not None and found.session.id == one.session.id)
            number += 1

    async with anyio.create_task_group() as group:
        for offset in range(4):
            group.start_soon(keep_validating, offset * 7)
        swept = await kit.sessions.delete_expired(batch_size=500)
        done.set()
    return swept, results


# -- usage ------------------------------------------------------------------------------------------------------


def plan_usage(people: Sequence[Person], now: datetime, *, seed: int) -> list[UsageEntry]:
    """Return the AI calls of the last weeks, unevenly spread over people and models. Nobody without access stops."""
    chance = random.Random(seed)  # noqa: S311 - made-up calls
    users = chance.choices(people, [1 / (rank + 2) for rank in range(len(people))], k=USAGE_ROWS)
    models = chance.choices(list(_MODELS), list(_MODELS.values()), k=USAGE_ROWS)
    entries = []
    for number, (user, model) in enumerate(zip(users, models, strict=True)):
        ago = chance.random() * _USAGE_SPAN
        if abs(ago - USAGE_WINDOW) < _EDGE:
            ago += 2 * _EDGE
        spent = int(chance.lognormvariate(6.5, 1)) + 1
        entries.append(UsageEntry(user_id=user.id, tokens=spent, model=model, id=f"call_{number:05}", at=now - ago))
    return entries


@dataclass(frozen=True)
class UsageFigures:
    """What the recording answered; ``repeated`` counts the duplicates found among calls sent again."""

    recorded: int
    seconds: float
    repeated: int
    repeated_in_bulk: int


async def run_usage(kit: KitRocket, entries: Sequence[UsageEntry], advance: Callable[[], object]) -> UsageFigures:
    """Record every call from 64 concurrent callers, then a slice of them again, one by one and in bulk."""
    new = Counter[bool]()

    async def record(entry: UsageEntry) -> None:
        answer = await kit.usage.record(entry.user_id, tokens=entry.tokens, model=entry.model, id=entry.id, at=entry.at)
        new[not answer.duplicate] += 1
        advance()

    began = perf_counter()
    await each(record, entries, callers=USAGE_CALLERS)
    seconds, recorded = perf_counter() - began, new[True]
    again = entries[:USAGE_REPEATED]
    await each(record, again[: USAGE_REPEATED // 2], callers=USAGE_CALLERS)
    bulk = await kit.usage.record_many(again[USAGE_REPEATED // 2 :])
    return UsageFigures(recorded, seconds, new[False], bulk.duplicates)


def prices(now: datetime) -> list[ModelPrice]:
    """Return what the models cost: two prices each, the second since some days ago."""
    changed = (now - _PRICES_CHANGED).date()
    return [
        ModelPrice(model=model, valid_from=day, per_million=Decimal(price))
        for model, both in _PRICES.items()
        for day, price in zip((date(2020, 1, 1), changed), both, strict=True)
    ]


def planned_totals(entries: Sequence[UsageEntry], since: datetime) -> tuple[Counter[str], Counter[str]]:
    """Return what was planned since an instant: tokens by user, and tokens by model."""
    by_user, by_model = Counter[str](), Counter[str]()
    for entry in entries:
        if entry.at is not None and entry.at >= since:
            by_user[entry.user_id] += entry.tokens
            by_model[entry.model] += entry.tokens
    return by_user, by_model
