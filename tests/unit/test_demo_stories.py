"""The demo's stories show what there is to see, and its counting notices what is wrong."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from kitrocket.demo.checks import Checks
from kitrocket.demo.delivery import Answer, tally
from kitrocket.demo.lifecycles import STORIES, Event, Expected, Life, Person, fixtures

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def _told() -> list[tuple[Life, Expected]]:
    lives = [
        Life(Person(f"user_{number}", story.name, story.email, story.link), number, NOW)
        for number, story in enumerate(STORIES)
    ]
    return [(life, story.tell(life)) for story, life in zip(STORIES, lives, strict=True)]


def test_every_status_and_reason_of_the_rules_is_shown() -> None:
    ends = [end for _, end in _told()]

    assert {end.status for end in ends} == {None, "trialing", "active", "past_due", "cancelled"}
    assert {end.reason for end in ends} == {
        *("none", "not_started", "trial", "cancel_scheduled", "active", "renewal_unconfirmed", "renewal_missing"),
        *("grace", "past_due", "on_hold", "paused", "cancelled_paid", "cancelled", "ended", "refunded", "expired"),
    }
    assert all(end.until is None or end.allowed == (end.until > NOW) for end in ends)


def test_ids_are_never_shared() -> None:
    lives = [life for life, _ in _told()]
    ids = [event.webhook_id for life in lives for event in life.events] + [event.webhook_id for event in fixtures()]
    subscriptions = {
        json.loads(event.body)["data"]["subscription_id"]: life.person.id for life in lives for event in life.events
    }

    assert len(ids) == len(set(ids))
    assert all(
        subscriptions[json.loads(event.body)["data"]["subscription_id"]] == life.person.id
        for life in lives
        for event in life.events
    )


def test_no_event_comes_from_the_future() -> None:
    assert all(
        datetime.fromisoformat(json.loads(event.body)["timestamp"]) <= NOW
        for life, _ in _told()
        for event in life.events
    )


def test_a_delivery_that_counts_twice_is_a_surprise() -> None:
    event = Event("msg_1", b"{}", frozenset({"applied", "stale"}))

    def surprises(*outcomes: str) -> list[str]:
        return tally([event], [Answer("msg_1", 200, outcome) for outcome in outcomes]).surprises

    assert surprises("duplicate", "stale") == []
    assert surprises("applied", "applied") == ["msg_1: applied, then applied"]
    assert surprises("duplicate", "parked") == ["msg_1: parked, then duplicate"]


def test_a_refused_delivery_is_a_surprise() -> None:
    event = Event("msg_1", b"{}", frozenset({"applied"}))
    counts = tally([event], [Answer("msg_1", 200, "applied"), Answer("msg_1", 503, None)])

    assert counts.surprises == ["msg_1: applied, then status 503"]
    assert counts.statuses == {200: 1, 503: 1}


def test_a_wrong_figure_is_remembered() -> None:
    checks = Checks()

    assert checks.equal("rows", 3, 3)
    assert not checks.equal("tokens", 4, 5)
    assert (checks.made, checks.failed) == (2, ["tokens: found 4, expected 5"])
