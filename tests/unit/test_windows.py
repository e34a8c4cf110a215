from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitrocket.errors import InvalidInputError
from kitrocket.windows import MAX_BUCKETS, Grain, Window, bucket_starts, dimension, time_zone, whole_days, window

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_001, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
GRAINS: tuple[Grain, ...] = ("hour", "day", "month")
ZONES = [
    *("UTC", "Europe/Berlin", "Europe/London", "America/New_York", "America/St_Johns", "America/Sao_Paulo"),
    *("America/Havana", "America/Caracas", "Asia/Kathmandu", "Asia/Kolkata", "Asia/Tehran", "Asia/Beirut"),
    *("Asia/Pyongyang", "Australia/Eucla", "Australia/Lord_Howe", "Pacific/Chatham", "Pacific/Apia"),
    *("Pacific/Kiritimati", "Pacific/Marquesas", "Antarctica/Troll", "Africa/Casablanca"),
]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def starts(zone: str, since: str, until: str, by: Grain = "day") -> list[datetime]:
    return bucket_starts(Window(at(since), at(until)), by=by, zone=ZoneInfo(zone), now=NOW)


def test_a_window_without_edges_is_the_last_30_times_24_hours_and_open() -> None:
    assert window(since=None, until=None, now=NOW) == Window(NOW - timedelta(days=30), None)


def test_without_since_it_is_30_times_24_hours_before_until() -> None:
    until = datetime(2026, 4, 5, 3, tzinfo=ZoneInfo("Europe/Berlin"))
    assert window(since=None, until=until, now=NOW) == Window(at("2026-03-06T01:00Z"), at("2026-04-05T01:00Z"))


@pytest.mark.parametrize("offset", [-MICROSECOND, timedelta(0)])
def test_since_may_reach_until(offset: timedelta) -> None:
    assert window(since=NOW + offset, until=NOW, now=NOW) == Window(NOW + offset, NOW)


@pytest.mark.parametrize(
    ("since", "until", "field"),
    [
        (NOW + MICROSECOND, NOW, "since"),
        (datetime(2026, 1, 1), None, "since"),  # noqa: DTZ001 - a naive datetime is what is refused
        (None, datetime(2026, 1, 1), "until"),  # noqa: DTZ001 - as above
        ("2026-01-01", None, "since"),
        (None, 5, "until"),
        (None, datetime.min.replace(tzinfo=UTC), "until"),
    ],
)
def test_a_bad_window_is_refused(since: datetime | None, until: datetime | None, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        window(since=since, until=until, now=NOW)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "bad", ["", "Europe/Atlantis", "Europe", "../etc/passwd", "/etc/localtime", "a\0b", "x" * 100_000, None, 1, UTC]
)
def test_a_bad_zone_is_refused(bad: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        time_zone("tz", bad)
    assert caught.value.field == "tz"


@pytest.mark.parametrize("bad", ["week", "", "Day", None, 1, ["day"]])
def test_a_bad_dimension_is_refused(bad: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        dimension("by", bad)
    assert "hour, day, month, model" in caught.value.expected


def test_days_at_a_quarter_past() -> None:
    assert starts("Asia/Kathmandu", "2026-05-01T00:00Z", "2026-05-03T00:00Z") == [
        at("2026-05-01T00:00Z"),
        at("2026-05-01T18:15Z"),
        at("2026-05-02T18:15Z"),
    ]


def test_hours_at_a_quarter_past() -> None:
    assert starts("Asia/Kathmandu", "2026-05-01T00:00Z", "2026-05-01T02:00Z", "hour") == [
        at("2026-05-01T00:00Z"),
        at("2026-05-01T00:15Z"),
        at("2026-05-01T01:15Z"),
    ]


def test_days_where_summer_time_is_13_45() -> None:
    assert starts("Pacific/Chatham", "2026-04-04T00:00+13:45", "2026-04-07T00:00+12:45") == [
        at("2026-04-04T00:00+13:45"),
        at("2026-04-05T00:00+13:45"),
        at("2026-04-06T00:00+12:45"),
    ]


def test_half_an_hour_of_summer_time() -> None:
    autumn = starts("Australia/Lord_Howe", "2026-04-05T00:00+11:00", "2026-04-07T00:00+10:30")
    assert autumn == [at("2026-04-05T00:00+11:00"), at("2026-04-06T00:00+10:30")]
    assert autumn[1] - autumn[0] == timedelta(hours=24, minutes=30)
    # 01:59:59 is followed by 01:30, so that hour lasts an hour and a half.
    assert starts("Australia/Lord_Howe", "2026-04-05T00:30+11:00", "2026-04-05T02:30+10:30", "hour") == [
        at("2026-04-05T00:30+11:00"),
        at("2026-04-05T01:00+11:00"),
        at("2026-04-05T02:00+10:30"),
    ]
    # 01:59:59 is followed by 02:30.
    assert starts("Australia/Lord_Howe", "2026-10-04T01:00+10:30", "2026-10-04T04:00+11:00", "hour") == [
        at("2026-10-04T01:00+10:30"),
        at("2026-10-04T02:30+11:00"),
        at("2026-10-04T03:00+11:00"),
    ]


def test_a_day_that_the_calendar_skipped_has_no_bucket() -> None:
    assert starts("Pacific/Apia", "2011-12-29T00:00-10:00", "2012-01-01T00:00+14:00") == [
        at("2011-12-29T00:00-10:00"),
        at("2011-12-31T00:00+14:00"),
    ]


def test_a_skipped_midnight_is_the_first_instant_after_it() -> None:
    assert starts("America/Sao_Paulo", "2018-11-03T00:00-03:00", "2018-11-05T00:00-02:00") == [
        at("2018-11-03T00:00-03:00"),
        at("2018-11-04T01:00-02:00"),
    ]


def test_a_midnight_inside_a_gap_is_the_end_of_the_gap() -> None:
    # 23:30 was followed by 00:30.
    assert starts("America/Toronto", "1919-03-30T00:00-05:00", "1919-04-01T00:00-04:00") == [
        at("1919-03-30T00:00-05:00"),
        at("1919-03-31T00:30-04:00"),
    ]


def test_of_a_midnight_shown_twice_the_first_counts() -> None:
    assert starts("America/Havana", "2025-11-01T00:00-04:00", "2025-11-04T00:00-05:00") == [
        at("2025-11-01T00:00-04:00"),
        at("2025-11-02T00:00-04:00"),
        at("2025-11-03T00:00-05:00"),
    ]


@pytest.mark.parametrize(
    ("since", "until", "hours"),
    [
        ("2026-03-29T00:00+01:00", "2026-03-30T00:00+02:00", 23),
        ("2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00", 25),
    ],
)
def test_an_hour_is_an_hour_where_the_clocks_change(since: str, until: str, hours: int) -> None:
    found = starts("Europe/Berlin", since, until, "hour")
    assert found == [at(since) + timedelta(hours=number) for number in range(hours)]


def test_two_hours_shown_twice() -> None:
    """Troll goes from +02:00 to +00:00."""
    found = starts("Antarctica/Troll", "2025-10-26T00:00+02:00", "2025-10-26T04:00+00:00", "hour")
    assert found == [at("2025-10-25T22:00Z") + timedelta(hours=number) for number in range(6)]


def test_months_begin_in_the_zone() -> None:
    assert starts("America/New_York", "2026-01-31T12:00-05:00", "2026-04-01T00:00-04:00", "month") == [
        at("2026-01-31T12:00-05:00"),
        at("2026-02-01T00:00-05:00"),
        at("2026-03-01T00:00-05:00"),
    ]


def test_an_empty_window_has_no_bucket() -> None:
    assert starts("UTC", "2026-05-01T00:00Z", "2026-05-01T00:00Z") == []


@pytest.mark.parametrize(("offset", "buckets"), [(-MICROSECOND, 1), (timedelta(0), 2), (MICROSECOND, 2)])
def test_an_open_window_is_cut_up_to_now(offset: timedelta, buckets: int) -> None:
    midnight = at("2026-03-01T00:00Z")
    open_window = Window(at("2026-02-28T00:00Z"), None)
    assert len(bucket_starts(open_window, by="day", zone=UTC, now=midnight + offset)) == buckets


def test_an_open_window_from_the_future_is_one_bucket() -> None:
    since = NOW + timedelta(days=40)
    assert bucket_starts(Window(since, None), by="day", zone=UTC, now=NOW) == [since]


@pytest.mark.parametrize(("offset", "is_refused"), [(-MICROSECOND, False), (timedelta(0), False), (MICROSECOND, True)])
def test_more_than_ten_thousand_buckets_are_refused(offset: timedelta, is_refused: bool) -> None:
    since = at("2026-01-01T00:00Z")
    long = Window(since, since + timedelta(hours=MAX_BUCKETS) + offset)
    if is_refused:
        with pytest.raises(InvalidInputError):
            bucket_starts(long, by="hour", zone=UTC, now=NOW)
    else:
        assert len(bucket_starts(long, by="hour", zone=UTC, now=NOW)) == MAX_BUCKETS


@pytest.mark.parametrize("by", GRAINS)
@pytest.mark.parametrize(
    ("zone", "since"),
    [("Asia/Kathmandu", datetime.max.replace(tzinfo=UTC)), ("America/New_York", datetime.min.replace(tzinfo=UTC))],
)
def test_the_ends_of_the_calendar_are_refused(by: Grain, zone: str, since: datetime) -> None:
    with pytest.raises(InvalidInputError) as caught:
        bucket_starts(Window(since, None), by=by, zone=ZoneInfo(zone), now=NOW)
    assert caught.value.field == "since"


def by_walking(since: datetime, until: datetime, by: Grain, zone: ZoneInfo) -> list[datetime]:
    """The same answer from the definition: walk, in quarters of an hour, and watch the clock on the wall."""
    # Until 2011 this one changed its clocks at a minute past midnight.
    stride = 1 if zone.key == "America/St_Johns" else 15
    found = [since]
    before = since.astimezone(zone)
    step = since.replace(minute=since.minute // stride * stride, second=0, microsecond=0) + timedelta(minutes=stride)
    while step < until:
        local = step.astimezone(zone)
        if by == "hour":
            begins = local.minute == 0 or local.hour != before.hour
        elif by == "day":
            begins = local.date() > before.date()
        else:
            begins = local.date().replace(day=1) > before.date().replace(day=1)
        if begins:
            found.append(step)
        # A day that begins again, because its midnight is shown twice, has begun already.
        before = local if by == "hour" else max(before, local, key=lambda shown: shown.date())
        step += timedelta(minutes=stride)
    return found


INSTANTS = st.datetimes(datetime(2004, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - bounds are naive


@settings(max_examples=150)
@given(
    zone=st.sampled_from(ZONES),
    since=INSTANTS,
    length=st.timedeltas(MICROSECOND, timedelta(days=8)),
    by=st.sampled_from(GRAINS),
)
def test_the_buckets_are_those_of_the_clock_on_the_wall(
    zone: str, since: datetime, length: timedelta, by: Grain
) -> None:
    chosen = Window(since, since + length)
    found = bucket_starts(chosen, by=by, zone=ZoneInfo(zone), now=NOW)
    assert found == by_walking(since, since + length, by, ZoneInfo(zone))


@settings(max_examples=100)
@given(
    zone=st.sampled_from(ZONES),
    since=INSTANTS,
    length=st.timedeltas(MICROSECOND, timedelta(days=400)),
    by=st.sampled_from(GRAINS),
)
def test_the_buckets_add_up_to_the_range(zone: str, since: datetime, length: timedelta, by: Grain) -> None:
    found = bucket_starts(Window(since, since + length), by=by, zone=ZoneInfo(zone), now=NOW)
    lengths = [end - start for start, end in pairwise([*found, since + length])]
    assert found[0] == since
    assert all(one > timedelta(0) for one in lengths)
    assert sum(lengths, timedelta(0)) == length


@pytest.mark.parametrize("zone", ZONES)
def test_each_change_of_the_clocks_in_twenty_years(zone: str) -> None:
    """Around each change of the offset the buckets are those of the clock on the wall."""
    place, day = ZoneInfo(zone), at("2005-01-01T00:00Z")
    while day < at("2027-01-01T00:00Z"):
        following = day + timedelta(days=1)
        if day.astimezone(place).utcoffset() != following.astimezone(place).utcoffset():
            since, until = day - timedelta(days=1, hours=3), following + timedelta(days=1, hours=3)
            for by in GRAINS:
                found = bucket_starts(Window(since, until), by=by, zone=place, now=NOW)
                assert found == by_walking(since, until, by, place), (by, since)
        day = following


def test_an_instant_of_another_zone_is_answered_in_utc() -> None:
    since = datetime(2026, 5, 1, tzinfo=timezone(timedelta(hours=5)))
    assert window(since=since, until=None, now=NOW).since.tzinfo is UTC


@pytest.mark.parametrize(
    ("since", "until", "complete_from", "first", "last"),
    [
        ("2026-02-01T00:00Z", None, date.min, "2026-02-01T00:00Z", None),
        ("2026-02-01T11:59:59.999999Z", None, date.min, "2026-02-01T00:00Z", None),
        ("2026-02-01T12:00Z", None, date.min, "2026-02-02T00:00Z", None),
        ("2026-01-31T23:59:59.999999Z", None, date.min, "2026-02-01T00:00Z", None),
        ("2026-02-01T01:00Z", None, date(2026, 2, 1), "2026-02-01T00:00Z", None),
        ("2026-02-01T01:00Z", None, date(2026, 2, 2), "2026-02-02T00:00Z", None),
        ("2026-02-01T01:00Z", None, date(2026, 3, 1), "2026-03-01T00:00Z", None),
        ("2026-02-01T01:00Z", None, date.max, None, None),
        ("2026-02-01T01:00Z", "2026-02-05T12:00Z", date.min, "2026-02-01T00:00Z", "2026-02-05T00:00Z"),
        ("2026-02-01T01:00Z", "2026-02-05T12:00:00.000001Z", date.min, "2026-02-01T00:00Z", "2026-02-06T00:00Z"),
        # A day of which half an hour at each end is too much, and one of which the larger part is.
        ("2026-02-01T00:30Z", "2026-02-01T23:30Z", date.min, "2026-02-01T00:00Z", "2026-02-02T00:00Z"),
        ("2026-02-01T06:00Z", "2026-02-01T18:00Z", date.min, None, None),
        ("2026-02-01T05:59Z", "2026-02-01T18:00Z", date.min, "2026-02-01T00:00Z", "2026-02-02T00:00Z"),
        ("2026-02-01T00:00Z", "2026-02-01T00:00Z", date.min, None, None),
        ("9999-12-31T01:00Z", "9999-12-31T23:00Z", date.min, None, None),
        ("9999-12-31T13:00Z", None, date.min, None, None),
    ],
)
def test_whole_days_begin_and_end_at_the_nearest_midnight(
    since: str, until: str | None, complete_from: date, first: str | None, last: str | None
) -> None:
    end = None if until is None else at(until)
    found = whole_days(Window(at(since), end), complete_from=complete_from)
    assert found == ((at(first), last and at(last)) if first is not None else (end, end))


INSTANTS = st.integers(0, 6 * 24 * 60 * 60).map(lambda seconds: at("2026-02-01T00:00Z") + timedelta(seconds=seconds))


@settings(max_examples=200)
@given(
    ends=st.tuples(INSTANTS, INSTANTS).map(sorted),
    calls=st.lists(INSTANTS, max_size=30),
    complete_after=st.integers(-1, 7),
)
def test_whole_days_and_what_is_added_and_subtracted_are_the_window(
    ends: list[datetime], calls: list[datetime], complete_after: int
) -> None:
    since, until = ends
    complete_from = date(2026, 2, 1) + timedelta(days=complete_after)
    first, last = whole_days(Window(since, until), complete_from=complete_from)
    assert first is not None
    assert last is not None

    def between(begin: datetime, end: datetime) -> int:
        return sum(begin <= call < end for call in calls) if begin <= end else -between(end, begin)

    counted = between(since, first) + between(first, last) + between(last, until)
    assert counted == sum(since <= call < until for call in calls)
    if first < last:
        assert first.date() >= complete_from
        assert first.time() == last.time() == datetime.min.time()
        if complete_after <= 0:
            assert max(abs(since - first), abs(until - last)) <= timedelta(hours=12)
    assert abs(since - first) + abs(until - last) <= until - since
