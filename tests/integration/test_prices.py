"""Prices by day, and what calls cost by them."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import make_usage, make_user
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError, UnpricedModelError, WindowNotExactError
from kitrocket.models import CostLine, CostReport, ModelPrice, PricesSet, UnpricedUsage
from kitrocket.testing import ManualClock
from kitrocket.usage import UsageService
from kitrocket.usage.prices import Prices

pytestmark = pytest.mark.asyncio(loop_scope="session")

MICROSECOND = timedelta(microseconds=1)
DAY = timedelta(days=1)
MARCH, APRIL = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
SONNET, HAIKU, FREE = "claude-sonnet-4", "claude-haiku-3", "local-llama"


@pytest.fixture
def usage(engine: Engine, clock: ManualClock) -> UsageService:
    return UsageService(engine, clock=clock)


async def set_month_of_prices(usage: UsageService) -> None:
    """Three models, one of them free, and two changes within March."""
    await usage.set_price(SONNET, per_million=Decimal("9.00"), valid_from=date(2026, 1, 1))
    await usage.set_price(SONNET, per_million=Decimal("7.5"), valid_from=date(2026, 3, 11))
    await usage.set_price(HAIKU, per_million=Decimal("0.8"), valid_from=date(2026, 3, 1))
    await usage.set_price(HAIKU, per_million=Decimal("1.25"), valid_from=date(2026, 3, 21))
    await usage.set_price(FREE, per_million=Decimal(0), valid_from=date(2026, 3, 1))


async def record_month(engine: Engine) -> None:
    """Each day of March at noon: Ada 100,003 tokens of Sonnet and 5,000,001 free ones, Bob 1,000,007 of Haiku."""
    for user in ("ada", "bob"):
        await make_user(engine, id=user)
    for day in range(31):
        noon = MARCH + day * DAY + timedelta(hours=12)
        await make_usage(engine, "ada", tokens=100_003, model=SONNET, at=noon)
        await make_usage(engine, "ada", tokens=5_000_001, model=FREE, at=noon)
        await make_usage(engine, "bob", tokens=1_000_007, model=HAIKU, at=noon)


async def test_a_month_costs_what_a_hand_reckons(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    await set_month_of_prices(usage)
    await record_month(engine)
    # Sonnet: 10 days at 9 and 21 at 7.5. Haiku: 20 days at 0.8 and 11 at 1.25. In millionths of a dollar:
    #   1,000,030 x 9 = 9,000,270       2,100,063 x 7.5 = 15,750,472.5     together 24.7507425
    #   20,000,140 x 0.8 = 16,000,112   11,000,077 x 1.25 = 13,750,096.25  together 29.75020825
    sonnet, haiku = Decimal("24.7507425"), Decimal("29.75020825")
    for service in (usage, UsageService(engine, clock=clock, rollup=False)):
        report = await service.cost(since=MARCH, until=APRIL)
        assert (report.total, report.exact) == (Decimal("54.50"), sonnet + haiku)
        assert str(report.total) == "54.50"
        assert (report.currency, report.complete, report.unpriced) == ("USD", True, [])
        assert (report.tokens, report.calls) == (31 * (100_003 + 5_000_001 + 1_000_007), 93)
        assert [(line.model, line.cost, line.calls) for line in report.lines] == [
            (HAIKU, haiku, 31),
            (SONNET, sonnet, 31),
            (FREE, Decimal(0), 31),
        ]
        assert {(line.start, line.end, line.user_id, line.day) for line in report.lines} == {(MARCH, APRIL, None, None)}
        by_user = await service.cost(since=MARCH, until=APRIL, by="user")
        assert [(line.user_id, line.model, line.cost) for line in by_user.lines] == [
            ("bob", None, haiku),
            ("ada", None, sonnet),
        ]
        by_day = await service.cost("ada", since=MARCH, until=APRIL, by="day")
        assert [line.day for line in by_day.lines] == [date(2026, 3, day) for day in range(1, 32)]
        assert [line.cost for line in by_day.lines] == [Decimal("0.900027")] * 10 + [Decimal("0.7500225")] * 21
        assert (by_day.lines[-1].start, by_day.lines[-1].end) == (APRIL - DAY, APRIL)
        each = await service.cost(since=MARCH, until=APRIL, by=("model", "user", "day"))
        assert len(each.lines) == 93
        assert {line.model for line in each.lines if line.user_id == "ada"} == {SONNET, FREE}


async def test_a_past_month_is_priced_anew_by_one_call(usage: UsageService, engine: Engine) -> None:
    await set_month_of_prices(usage)
    await record_month(engine)
    before = await usage.cost("bob", since=MARCH, until=APRIL)
    await usage.set_price(HAIKU, per_million=Decimal("2"), valid_from=date(2026, 3, 21))
    after = await usage.cost("bob", since=MARCH, until=APRIL)
    assert after.exact - before.exact == Decimal("11.000077") * Decimal("0.75")
    assert await usage.remove_price(HAIKU, valid_from=date(2026, 3, 21)) is True
    assert await usage.remove_price(HAIKU, valid_from=date(2026, 3, 21)) is False
    assert (await usage.cost("bob", since=MARCH, until=APRIL)).exact == Decimal("31.000217") * Decimal("0.8")


async def test_a_price_changes_at_utc_midnight_to_the_microsecond(
    usage: UsageService, engine: Engine, clock: ManualClock
) -> None:
    """Calls and both edges of the window at -1 µs, 0 and +1 µs around the change, with the rollup and without."""
    change = datetime(2026, 3, 11, tzinfo=UTC)
    edges = [change + offset for offset in (-DAY, -MICROSECOND, timedelta(0), MICROSECOND, DAY, DAY + MICROSECOND)]
    await make_user(engine, id="ada")
    calls = {at: 2**number for number, at in enumerate(edges)}
    for at, tokens in calls.items():
        await make_usage(engine, "ada", tokens=tokens, model=SONNET, at=at)
    await usage.set_price(SONNET, per_million=1_000_000, valid_from=date(2026, 3, 1))
    await usage.set_price(SONNET, per_million=Decimal(100_000_000), valid_from=change.date())
    for service in (usage, UsageService(engine, clock=clock, rollup=False)):
        for since in edges:
            for until in [*(edge for edge in edges if edge >= since), None]:
                inside = {at: tokens for at, tokens in calls.items() if at >= since and (until is None or at < until)}
                report = await service.cost("ada", since=since, until=until)
                assert report.exact == sum(tokens * (1 if at < change else 100) for at, tokens in inside.items())
                assert (report.tokens, report.calls) == (sum(inside.values()), len(inside))


async def test_days_before_the_rollup_are_priced_from_single_calls(usage: UsageService, engine: Engine) -> None:
    await set_month_of_prices(usage)
    await record_month(engine)
    expected = await usage.cost(since=MARCH, until=APRIL, by=("day", "model"))
    await engine.fetch("UPDATE kitrocket.usage_state SET rollup_from = '2026-03-15'")
    await engine.fetch("UPDATE kitrocket.usage_daily SET tokens = 77 WHERE day < '2026-03-15'")
    assert await usage.cost(since=MARCH, until=APRIL, by=("day", "model")) == expected
    await engine.fetch("DELETE FROM kitrocket.usage_state")
    assert await usage.cost(since=MARCH, until=APRIL, by=("day", "model")) == expected


async def test_pruned_days_keep_their_cost(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    await set_month_of_prices(usage)
    await record_month(engine)
    clock.now = APRIL
    expected = await usage.cost(since=MARCH, until=APRIL)
    await usage.prune(datetime(2026, 3, 20, tzinfo=UTC))
    assert await usage.cost(since=MARCH, until=APRIL) == expected
    with pytest.raises(WindowNotExactError):
        await usage.cost(since=MARCH + MICROSECOND, until=APRIL)
    with pytest.raises(WindowNotExactError):
        await usage.cost(since=MARCH, until=APRIL, by="day", tz="Europe/Berlin")


async def test_days_of_another_zone_still_have_the_prices_of_utc_days(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    change = datetime(2026, 3, 11, tzinfo=UTC)
    await usage.set_price(SONNET, per_million=Decimal(1_000_000), valid_from=date(2026, 3, 1))
    await usage.set_price(SONNET, per_million=Decimal(2_000_000), valid_from=date(2026, 3, 11))
    for hours in (-2, -1, 0, 22, 23):
        await make_usage(engine, "ada", tokens=1, model=SONNET, at=change + timedelta(hours=hours))
    report = await usage.cost("ada", since=MARCH, until=APRIL, by="day", tz="Europe/Berlin")
    assert [(line.day, line.tokens, line.cost) for line in report.lines] == [
        (date(2026, 3, 10), 1, Decimal(1)),
        (date(2026, 3, 11), 3, Decimal(5)),
        (date(2026, 3, 12), 1, Decimal(2)),
    ]
    months = await usage.cost("ada", since=MARCH, until=None, by="month")
    assert [(line.start, line.end, line.day, line.cost) for line in months.lines] == [(MARCH, None, None, Decimal(8))]
    hours = await usage.cost("ada", since=MARCH, until=APRIL, by=("hour", "user"))
    assert [(line.start, line.user_id, line.cost) for line in hours.lines][:2] == [
        (change - timedelta(hours=2), "ada", Decimal(1)),
        (change - timedelta(hours=1), "ada", Decimal(1)),
    ]


async def test_a_model_without_a_price_is_an_error_or_is_listed(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    await usage.set_price(SONNET, per_million=Decimal(3), valid_from=date(2026, 3, 11))
    await usage.set_price(HAIKU, per_million=Decimal(1), valid_from=date(2026, 3, 1), currency="EUR")
    await make_usage(engine, "ada", tokens=5, model=SONNET, at=datetime(2026, 3, 10, 23, 59, tzinfo=UTC))
    await make_usage(engine, "ada", tokens=1_000_000, model=SONNET, at=datetime(2026, 3, 11, tzinfo=UTC))
    await make_usage(engine, "ada", tokens=7, model=HAIKU, at=datetime(2026, 3, 12, tzinfo=UTC))
    with pytest.raises(UnpricedModelError) as caught:
        await usage.cost("ada", since=MARCH, until=APRIL)
    assert (set(caught.value.models), caught.value.tokens) == ({SONNET, HAIKU}, 12)
    report = await usage.cost("ada", since=MARCH, until=APRIL, allow_unpriced=True)
    assert (report.total, report.complete, report.tokens) == (Decimal(3), False, 1_000_012)
    assert sorted(report.unpriced, key=lambda one: one.model) == [
        UnpricedUsage(model=HAIKU, tokens=7, calls=1),
        UnpricedUsage(model=SONNET, tokens=5, calls=1),
    ]
    assert [(line.model, line.tokens, line.unpriced, line.cost) for line in report.lines] == [
        (SONNET, 1_000_005, 5, Decimal(3)),
        (HAIKU, 7, 7, Decimal(0)),
    ]
    assert (
        await usage.cost("ada", since=datetime(2026, 3, 11, tzinfo=UTC), until=datetime(2026, 3, 12, tzinfo=UTC))
    ).complete
    euros = await usage.cost("ada", since=datetime(2026, 3, 12, tzinfo=UTC), until=APRIL, currency="EUR", places=10)
    assert (euros.total, euros.currency) == (Decimal("0.000007"), "EUR")


async def test_nobody_and_an_empty_window_cost_nothing(usage: UsageService, engine: Engine, clock: ManualClock) -> None:
    for service in (usage, UsageService(engine, clock=clock, rollup=False)):
        for by in ("model", "user", "day", ("day", "model", "user")):
            for since, until in ((MARCH, APRIL), (MARCH, MARCH), (None, None)):
                report = await service.cost("nobody", since=since, until=until, by=by)
                assert (report.total, report.exact, report.lines, report.complete) == (Decimal(0), Decimal(0), [], True)


async def test_the_total_is_rounded_once_half_to_even_whatever_its_size(usage: UsageService, engine: Engine) -> None:
    await make_user(engine, id="ada")
    # Two lines of half a cent each are a cent; a half cent alone goes to the even side.
    await usage.set_price("a", per_million=Decimal(5_000), valid_from=date(2026, 1, 1))
    await usage.set_price("b", per_million=Decimal(5_000), valid_from=date(2026, 1, 1))
    await make_usage(engine, "ada", tokens=1, model="a", at=MARCH)
    assert (await usage.cost("ada", since=MARCH)).total == Decimal("0.00")
    await make_usage(engine, "ada", tokens=1, model="b", at=MARCH)
    report = await usage.cost("ada", since=MARCH)
    assert (report.total, [line.cost for line in report.lines]) == (Decimal("0.01"), [Decimal("0.005")] * 2)
    await make_usage(engine, "ada", tokens=1, model="a", at=MARCH)
    assert (await usage.cost("ada", since=MARCH)).total == Decimal("0.02")
    assert (await usage.cost("ada", since=MARCH, places=0)).total == Decimal(0)
    # 33 digits, more than Python's own context keeps.
    dearest = Decimal("9999999999.9999999999")
    await usage.set_price("big", per_million=dearest, valid_from=date(2026, 1, 1))
    for _ in range(9):
        await make_usage(engine, "ada", tokens=2_147_483_647, model="big", at=MARCH + DAY)
    wide = await usage.cost("ada", since=MARCH + DAY, places=10)
    expected = Fraction(dearest) * 9 * 2_147_483_647 / 1_000_000
    assert Fraction(wide.exact) == expected
    assert wide.total == wide.exact.quantize(Decimal("1E-10"), context=Context(prec=99, rounding=ROUND_HALF_EVEN))


# -- parts and the whole ------------------------------------------------------------------------------------------

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["ada", "bob"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 2_147_483_647),
        st.integers(0, 6 * 24),
    ),
    max_size=20,
)
PRICES = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 6)),
    st.decimals(0, 10**9, places=10, allow_nan=False, allow_infinity=False),
    max_size=10,
)


@settings(max_examples=15)
@given(calls=CALLS, prices=PRICES, cut=st.integers(0, 6 * 24 * 3600))
async def test_the_parts_add_up_to_the_whole(
    usage: UsageService, engine: Engine, calls: list[Any], prices: dict[Any, Decimal], cut: int
) -> None:
    await engine.fetch("DELETE FROM users")
    await engine.fetch("DELETE FROM kitrocket.model_prices")
    for user in ("ada", "bob"):
        await make_user(engine, id=user)
    await usage.record_many(
        {"user_id": user, "model": model, "tokens": tokens, "at": MARCH - 6 * DAY + timedelta(hours=hours)}
        for user, model, tokens, hours in calls
    )
    await usage.set_prices(
        {"model": model, "per_million": price, "valid_from": (MARCH - 6 * DAY).date() + number * DAY}
        for (model, number), price in prices.items()
    )
    expected = defaultdict[str, Fraction](Fraction)
    for user, model, tokens, hours in calls:
        known = [number for name, number in prices if name == model and number <= hours // 24]
        if known:
            expected[user] += Fraction(prices[model, max(known)]) * tokens / 1_000_000
    since, middle, until = MARCH - 6 * DAY, MARCH - 6 * DAY + timedelta(seconds=cut), MARCH + DAY

    async def exact(user: str | None = None, *, by: Any = "model", since: datetime = since, until: datetime = until):
        report = await usage.cost(user, since=since, until=until, by=by, allow_unpriced=True)
        assert sum((Fraction(line.cost) for line in report.lines), Fraction()) == Fraction(report.exact)
        return Fraction(report.exact)

    whole = sum(expected.values(), Fraction())
    assert await exact() == whole
    for by in ("user", "day", "hour", "month", ("user", "model", "day")):
        assert await exact(by=by) == whole
    assert [await exact(user) for user in ("ada", "bob")] == [expected["ada"], expected["bob"]]
    assert await exact(until=middle) + await exact(since=middle) == whole


# -- setting prices -----------------------------------------------------------------------------------------------


async def test_prices_are_kept_listed_and_replaced(usage: UsageService) -> None:
    first = await usage.set_price(SONNET, per_million=Decimal("9.00"), valid_from=date(2026, 1, 1))
    assert first == ModelPrice(model=SONNET, currency="USD", valid_from=date(2026, 1, 1), per_million=Decimal(9))
    finest = await usage.set_price(HAIKU, per_million=Decimal("0.0000000001"), valid_from=date(1, 1, 1))
    assert finest.per_million == Decimal("1E-10")
    done = await usage.set_prices(
        [
            first,
            {"model": SONNET, "per_million": Decimal("1E+2"), "valid_from": date(2026, 1, 1), "currency": "EUR"},
            {"model": HAIKU, "per_million": 0, "valid_from": date(1, 1, 1)},
        ]
    )
    assert done == PricesSet(added=1, changed=1, unchanged=1)
    assert [(one.model, one.currency, str(one.per_million)) for one in await usage.prices()] == [
        (HAIKU, "USD", "0"),
        (SONNET, "EUR", "100"),
        (SONNET, "USD", "9"),
    ]
    assert [one.currency for one in await usage.prices(SONNET)] == ["EUR", "USD"]
    assert await usage.prices(currency="EUR") == [(await usage.prices())[1]]
    assert await usage.set_prices([]) == PricesSet(added=0, changed=0, unchanged=0)


BAD_PRICES: list[tuple[dict[str, object], str]] = [
    ({"per_million": 9.0}, "per_million"),
    ({"per_million": "9"}, "per_million"),
    ({"per_million": True}, "per_million"),
    ({"per_million": Decimal(-1)}, "per_million"),
    ({"per_million": Decimal("NaN")}, "per_million"),
    ({"per_million": Decimal("Infinity")}, "per_million"),
    ({"per_million": Decimal(10**10)}, "per_million"),
    ({"per_million": Decimal("1E-11")}, "per_million"),
    ({"per_million": Decimal("1E-999999")}, "per_million"),
    ({"valid_from": datetime(2026, 1, 1, tzinfo=UTC)}, "valid_from"),
    ({"valid_from": "2026-01-01"}, "valid_from"),
    ({"valid_from": None}, "valid_from"),
    ({"currency": "usd"}, "currency"),
    ({"currency": "US"}, "currency"),
    ({"currency": 5}, "currency"),
    ({"currency": "USD\n"}, "currency"),
    ({"model": ""}, "model"),
    ({"model": " "}, "model"),
    ({"model": "x" * 256}, "model"),
    ({"model": "a\0"}, "model"),
    ({"model": None}, "model"),
]
GOOD: dict[str, object] = {"model": SONNET, "per_million": Decimal(1), "valid_from": date(2026, 1, 1)}


async def test_bad_prices_are_refused_and_change_nothing(usage: UsageService) -> None:
    for values, field in BAD_PRICES:
        arguments: Any = {**GOOD, **values}
        with pytest.raises(InvalidInputError) as caught:
            await usage.set_price(arguments.pop("model"), **arguments)
        assert caught.value.field == field, values
        with pytest.raises(InvalidInputError) as caught:
            await usage.set_prices([GOOD, {**GOOD, "currency": "EUR", **values}])
        assert caught.value.field == f"prices[1].{field}", values
    entries: list[tuple[Any, str]] = [
        (5, "prices"),
        ([5], "prices[0]"),
        ([{**GOOD, "price": 1}], "prices[0]"),
        ([{"model": SONNET}], "prices[0].per_million"),
        ([GOOD, GOOD], "prices[1]"),
    ]
    for bad, field in entries:
        with pytest.raises(InvalidInputError) as caught:
            await usage.set_prices(bad)
        assert caught.value.field == field
    assert await usage.prices() == []


async def test_bad_questions_are_refused(usage: UsageService) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"user_id": ""}, "user_id"),
        ({"user_id": 5}, "user_id"),
        ({"currency": "dollar"}, "currency"),
        ({"by": "week"}, "by"),
        ({"by": ()}, "by"),
        ({"by": 5}, "by"),
        ({"by": ("day", "hour")}, "by"),
        ({"by": ("day", "day")}, "by"),
        ({"by": [["day"]]}, "by"),
        ({"tz": "Nowhere"}, "tz"),
        ({"places": 11}, "places"),
        ({"places": 2.0}, "places"),
        ({"allow_unpriced": 1}, "allow_unpriced"),
        ({"since": datetime(2026, 1, 1)}, "since"),  # noqa: DTZ001
        ({"since": APRIL, "until": MARCH}, "since"),
        ({"since": datetime(2000, 1, 1, tzinfo=UTC), "by": "hour"}, "since"),
    ]
    for arguments, field in bad:
        with pytest.raises(InvalidInputError) as caught:
            await usage.cost(**arguments)
        assert caught.value.field == field, arguments
    for work, field in (
        (usage.prices(""), "model"),
        (usage.prices(currency="x"), "currency"),
        (usage.remove_price("", valid_from=date(2026, 1, 1)), "model"),
        (usage.remove_price("m", valid_from=APRIL), "valid_from"),
        (usage.remove_price("m", valid_from=date(2026, 1, 1), currency="x"), "currency"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            await work
        assert caught.value.field == field


async def test_too_many_lines_are_refused(usage: UsageService, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitrocket.usage.prices.MAX_LINES", 2)
    await make_user(engine, id="ada")
    for model in ("a", "b"):
        await make_usage(engine, "ada", tokens=5, model=model, at=MARCH)
    assert len((await usage.cost(since=MARCH, allow_unpriced=True)).lines) == 2
    await make_usage(engine, "ada", tokens=5, model="c", at=MARCH)
    with pytest.raises(InvalidInputError) as caught:
        await usage.cost(since=MARCH, allow_unpriced=True)
    assert caught.value.field == "by"


async def test_the_table_itself_refuses_what_is_no_price(engine: Engine) -> None:
    for value in ("-0.1", "NaN", "Infinity"):
        with pytest.raises((asyncpg.CheckViolationError, InvalidInputError)):
            await engine.fetch(f"INSERT INTO kitrocket.model_prices VALUES ('m', 'USD', '2026-01-01', '{value}')")


# -- files --------------------------------------------------------------------------------------------------------

FILE = """
[[prices]]
model = "claude-sonnet-4"
per_million = 0.1
valid_from = 2026-01-01

[[prices]]
model = "claude-sonnet-4"
per_million = 3
valid_from = 2026-03-11
currency = "EUR"
"""


async def test_a_file_is_loaded_without_a_float(usage: UsageService, tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(FILE)
    assert await usage.load_prices(path) == PricesSet(added=2, changed=0, unchanged=0)
    assert await usage.load_prices(str(path)) == PricesSet(added=0, changed=0, unchanged=2)
    path.write_text(FILE.replace("0.1", "0.1234567891"))
    assert await usage.load_prices(path) == PricesSet(added=0, changed=1, unchanged=1)
    assert [str(one.per_million) for one in await usage.prices(currency="USD")] == ["0.1234567891"]


async def test_a_bad_file_is_named_with_its_line_or_entry_and_changes_nothing(
    usage: UsageService, tmp_path: Path
) -> None:
    path = tmp_path / "prices.toml"
    bad: list[tuple[bytes, str, str]] = [
        (b"[[prices]]\nmodel =\n", "path", "line 2"),
        (b"\xff", "path", "UTF-8"),
        (b"", "path", "[[prices]]"),
        (b"prices = 5", "path", "[[prices]]"),
        (FILE.encode() + b"[other]\n", "path", "[[prices]]"),
        (FILE.replace("per_million = 3", 'per_million = "3"').encode(), "prices[1].per_million", "str"),
        (FILE.replace("per_million = 3", "per_million = nan").encode(), "prices[1].per_million", "range"),
        (FILE.replace("per_million = 3", "per_million = 1e999999999").encode(), "prices[1].per_million", "range"),
        (FILE.replace("2026-03-11", "2026-03-11T00:00:00").encode(), "prices[1].valid_from", "datetime"),
        (FILE.replace("valid_from = 2026-03-11", "").encode(), "prices[1].valid_from", "missing"),
        (FILE.replace('currency = "EUR"', 'curency = "EUR"').encode(), "prices[1]", "name"),
        ((FILE + FILE).encode(), "prices[2]", "prices[0]"),
        (b"x = " + b"[" * 5_000, "path", "TOML"),
        (b" " * 10_000_001, "path", "too large"),
    ]
    for content, field, word in bad:
        path.write_bytes(content)
        with pytest.raises(InvalidInputError) as caught:
            await usage.load_prices(path)
        assert caught.value.field == field, content[:80]
        assert word in str(caught.value)
    for missing in (tmp_path / "none.toml", tmp_path, "a\0b", 5):
        with pytest.raises(InvalidInputError) as caught:
            await usage.load_prices(missing)
        assert caught.value.field == "path"
    assert await usage.prices() == []


async def test_one_bad_price_of_many_leaves_none(usage: UsageService, engine: Engine) -> None:
    """All or none also when it is PostgreSQL that refuses."""
    await engine.fetch("ALTER TABLE kitrocket.model_prices ADD CONSTRAINT dear CHECK (per_million < 5)")
    prices = [
        ModelPrice(model=model, valid_from=date(2026, 1, 1), per_million=Decimal(p))
        for model, p in [("a", 1), ("b", 9)]
    ]
    with pytest.raises(asyncpg.CheckViolationError):
        await Prices(engine, rollup=True).set(prices)
    assert await usage.prices() == []


async def test_a_report_is_json_without_a_float() -> None:
    line = CostLine(
        start=MARCH, end=None, day=None, user_id=None, model="m", tokens=1, calls=1, unpriced=0, cost=Decimal("0.1")
    )
    report = CostReport(
        since=MARCH, until=None, currency="USD", total=Decimal("0.10"), exact=Decimal("0.1"), tokens=1, calls=1,
        lines=[line], unpriced=[], complete=True,
    )  # fmt: skip
    assert json.loads(report.model_dump_json())["lines"][0]["cost"] == "0.1"
