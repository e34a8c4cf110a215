"""Twenty subscriptions told from the payloads, with ids and dates of their own, and where each must end.

The expectation of each story is written down beside it, in words of the billing rules; nothing here computes it. Times
are days from now, negative in the past.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import Any

#: Product id → plan.
PRODUCTS = {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}
_PRODUCT_OF = {plan: product for product, plan in PRODUCTS.items()}

#: The user that the payloads themselves are about.
MAYA = "usr_01JH8Z6Q4M"
MAYA_EMAIL = "maya.okafor@example.com"

_TRIAL = "01_subscription_active_trial"
_RENEWED = "02_subscription_renewed_first_charge"
_GRACE = "04_subscription_past_due_grace"
_CANCELLED = "05_subscription_cancelled_with_paid_period_left"
_CHARGE = "06_payment_succeeded_renewal"
_FAILED_CHARGE = "07_payment_failed_retry1"
_SCHEDULED = "14_subscription_cancelled_scheduled_still_active"
_ON_HOLD = "15_subscription_on_hold"
_PAUSED = "16_subscription_paused"


@dataclass(frozen=True)
class Event:
    """A webhook body. ``first`` are the outcomes that its first delivery may have, whatever order they arrive in."""

    webhook_id: str
    body: bytes
    first: frozenset[str]


@dataclass(frozen=True)
class Person:
    """A user of the demo. ``link`` is where the provider's payloads name the user."""

    id: str
    name: str
    email: str
    link: str = "subscription"


@dataclass(frozen=True)
class Expected:
    """What a user's subscription and access must be once every event has arrived."""

    status: str | None
    plan: str | None
    period_end: datetime | None
    allowed: bool
    until: datetime | None
    reason: str


class Life:
    """The life of one user's subscriptions, collected as the events that the provider would send."""

    def __init__(self, person: Person, number: int, now: datetime) -> None:
        self.person = person
        self.events: list[Event] = []
        self._number = number
        self._now = now
        self._subscription: dict[str, object] = {}
        self._newest: tuple[datetime, int] | None = None
        self._subscriptions = 0

    def at(self, days: float) -> datetime:
        """Return the instant that many days from now."""
        return self._now + timedelta(days=days)

    def begin(self, days: float, *, plan: str = "pro", trial: int = 0) -> None:
        """Begin a subscription: what follows is about it."""
        self._subscriptions += 1
        self._newest = None
        self._subscription = {
            "subscription_id": f"sub_demo_{self._number:02}_{self._subscriptions}",
            "created_at": self.at(days),
            "product_id": _PRODUCT_OF[plan],
            "trial_period_days": trial,
        }

    def says(self, payload: str, days: float, period: tuple[float, float], **changes: object) -> None:
        """Tell the subscription's state at that time, in the period between two billing dates."""
        dates = {"previous_billing_date": self.at(period[0]), "next_billing_date": self.at(period[1])}
        at = self.at(days)
        self._supersede(at)
        self._append(payload, at, self._subscription | dates | changes, frozenset({"applied"}))

    def charges(self, payload: str, days: float, period: tuple[float, float], **changes: object) -> None:
        """Tell of a payment, made or failed, for that period."""
        subscription = self._subscription["subscription_id"]
        covered = {"subscription_id": subscription, "starts_at": self.at(period[0]), "ends_at": self.at(period[1])}
        facts: dict[str, object] = {
            "payment_id": f"pay_demo_{self._number:02}_{len(self.events)}",
            "subscription_id": subscription,
            "subscription_ids": [subscription],
            "service_periods": [covered],
            "created_at": self.at(days),
        }
        self._append(payload, self.at(days), facts | changes, frozenset({"applied"}))

    def puzzles(self, days: float, period: tuple[float, float], **changes: object) -> None:
        """Tell something that cannot be understood yet: it must be parked and change nothing."""
        dates = {"previous_billing_date": self.at(period[0]), "next_billing_date": self.at(period[1])}
        self._append(_RENEWED, self.at(days), self._subscription | dates | changes, frozenset({"parked"}))

    def renews(self, *starts: float) -> None:
        """Tell of a month's renewal with its charge, at each of these days."""
        for start in starts:
            period = (start, start + 30)
            self.says(_RENEWED, start, period)
            self.charges(_CHARGE, start, period)

    def expect(
        self, status: str, plan: str, end: float, *, until: float | None, reason: str, denied: bool = False
    ) -> Expected:
        """Write down where this life must end; ``end`` is the row's period end, ``until`` the end of access."""
        allowed = not denied
        return Expected(status, plan, self.at(end), allowed, None if until is None else self.at(until), reason)

    def _supersede(self, at: datetime) -> None:
        """Of a subscription's events only the newest is sure to be applied; an older one may come too late."""
        if self._newest is not None and self._newest[0] < at:
            number = self._newest[1]
            older = self.events[number]
            self.events[number] = Event(older.webhook_id, older.body, frozenset({"applied", "stale"}))
        self._newest = (at, len(self.events))

    def _append(self, payload: str, at: datetime, changes: dict[str, object], first: frozenset[str]) -> None:
        event = template(payload)
        event["timestamp"] = at
        event["data"] |= changes
        self._name_the_user(event["data"])
        body = json.dumps(event, default=_iso).encode()
        self.events.append(Event(f"msg_demo_{self._number:02}_{len(self.events):02}", body, first))

    def _name_the_user(self, data: dict[str, Any]) -> None:
        named = {"kitrocket_user_id": self.person.id}
        data["metadata"] = named if self.person.link == "subscription" else {}
        data["customer"] = {
            "customer_id": f"cus_demo_{self._number:02}",
            "email": self.person.email,
            "name": self.person.name,
            "phone_number": None,
            "metadata": named if self.person.link == "customer" else {},
        }


@dataclass(frozen=True)
class Story:
    """A line of the summary: who, what happened, and the function that tells it."""

    title: str
    name: str
    tell: Callable[[Life], Expected]
    link: str = "subscription"

    @property
    def email(self) -> str:
        """An address made from the name."""
        return f"{self.name.lower().replace(' ', '.')}@example.com"


def template(payload: str) -> dict[str, Any]:
    """Return a payload, to be changed."""
    return deepcopy(_parsed(payload))


def fixtures() -> list[Event]:
    """Return the payloads as they are, byte for byte."""
    return [Event(f"msg_{name.partition('_')[0]}", _bytes(name), _first_of(name)) for name in _names()]


def fixtures_end(now: datetime) -> Expected:
    """Where the payloads themselves end: cancelled on 10 July, paid until 29 July 2026."""
    end = datetime(2026, 7, 29, 18, 2, 30, 551420, UTC)
    return Expected("cancelled", "pro", end, now < end, end, "cancelled_paid" if now < end else "ended")


def orphan(now: datetime) -> Event:
    """Return a subscription of somebody who is no user: it must be parked."""
    life = Life(Person("usr_not_here", "Nobody Here", "nobody.here@example.com"), 0, now)
    life.begin(-1)
    life.puzzles(-1, (-1, 29))
    return life.events[0]


def _first_of(name: str) -> frozenset[str]:
    if name.startswith(("12_", "13_")):
        return frozenset({"ignored"})
    if name.startswith("09_"):
        return frozenset({"parked"})
    newest = name.startswith(("05_", "06_", "07_"))
    return frozenset({"applied"} if newest else {"applied", "stale"})


def _names() -> list[str]:
    folder = files(__package__) / "payloads"
    return sorted(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))


@cache
def _bytes(name: str) -> bytes:
    return (files(__package__) / "payloads" / f"{name}.json").read_bytes()


@cache
def _parsed(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(_bytes(name))
    return parsed


def _iso(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    raise TypeError(type(value).__name__)


# -- the stories ------------------------------------------------------------------------------------------------


def _in_trial(life: Life) -> Expected:
    life.begin(-5, plan="starter", trial=14)
    life.says(_TRIAL, -5, (-5, 9))
    return life.expect("trialing", "starter", 9, until=9, reason="trial")


def _leaves_in_trial(life: Life) -> Expected:
    life.begin(-10, plan="starter", trial=14)
    life.says(_TRIAL, -10, (-10, 4))
    life.says(_SCHEDULED, -2, (-10, 4))
    return life.expect("trialing", "starter", 4, until=4, reason="cancel_scheduled")


def _renews(life: Life) -> Expected:
    life.begin(-75, plan="starter", trial=14)
    life.says(_TRIAL, -75, (-75, -61))
    life.renews(-61, -31, -1)
    life.puzzles(-0.5, (-1, 29), product_id="pdt_nobody_mapped")
    return life.expect("active", "starter", 29, until=29, reason="active")


def _upgrades(life: Life) -> Expected:
    life.begin(-50, plan="starter")
    life.renews(-50, -20)
    life.says(_RENEWED, -3, (-20, 10), product_id=_PRODUCT_OF["pro"])
    return life.expect("active", "pro", 10, until=10, reason="active")


def _will_leave(life: Life) -> Expected:
    life.begin(-48)
    life.renews(-48, -18)
    life.says(_SCHEDULED, -4, (-18, 12))
    life.puzzles(-2, (-18, 12), status="hibernating")
    return life.expect("active", "pro", 12, until=12, reason="cancel_scheduled")


def _has_left(life: Life) -> Expected:
    life.begin(-63)
    life.renews(-63, -33)
    life.says(_SCHEDULED, -9, (-33, -3))
    return life.expect("cancelled", "pro", -3, until=-3, reason="ended", denied=True)


def _renewal_is_late(life: Life) -> Expected:
    life.begin(-60.5)
    life.renews(-60.5, -30.5)
    return life.expect("active", "pro", -0.5, until=2.5, reason="renewal_unconfirmed")


def _renewal_is_missing(life: Life) -> Expected:
    life.begin(-65)
    life.renews(-65, -35)
    return life.expect("active", "pro", -5, until=-2, reason="renewal_missing", denied=True)


def _in_grace(life: Life) -> Expected:
    life.begin(-62)
    life.renews(-62, -32)
    life.says(_GRACE, -2, (-32, -2), past_due_ends_at=life.at(5))
    life.charges(_FAILED_CHARGE, -2, (-2, 28))
    return life.expect("past_due", "pro", -2, until=5, reason="grace")


def _grace_is_over(life: Life) -> Expected:
    life.begin(-70)
    life.renews(-70, -40)
    life.says(_GRACE, -10, (-40, -10), past_due_ends_at=life.at(-3))
    life.charges(_FAILED_CHARGE, -10, (-10, 20))
    return life.expect("past_due", "pro", -10, until=-3, reason="past_due", denied=True)


def _recovers(life: Life) -> Expected:
    life.begin(-66, plan="starter")
    life.renews(-66, -36)
    life.says(_GRACE, -6, (-36, -6), past_due_ends_at=life.at(1))
    life.charges(_FAILED_CHARGE, -6, (-6, 24))
    life.says(_RENEWED, -4, (-6, 24))
    life.charges(_CHARGE, -4, (-6, 24))
    return life.expect("active", "starter", 24, until=24, reason="active")


def _on_hold(life: Life) -> Expected:
    life.begin(-72)
    life.renews(-72, -42)
    life.says(_GRACE, -12, (-42, -12), past_due_ends_at=life.at(-5))
    life.says(_ON_HOLD, -5, (-42, -12))
    return life.expect("past_due", "pro", -12, until=None, reason="on_hold", denied=True)


def _pauses(life: Life) -> Expected:
    life.begin(-41)
    life.renews(-41, -11)
    life.says(_PAUSED, -1, (-11, 19), paused_at=life.at(-1))
    return life.expect("past_due", "pro", -1, until=None, reason="paused", denied=True)


def _leaves_at_once(life: Life) -> Expected:
    life.begin(-46)
    life.renews(-46, -16)
    life.says(_CANCELLED, -6, (-16, 14), cancelled_at=life.at(-6))
    return life.expect("cancelled", "pro", 14, until=14, reason="cancelled_paid")


def _leaves_unpaid(life: Life) -> Expected:
    life.begin(-33)
    life.renews(-33)
    life.says(_GRACE, -3, (-3, 27), past_due_ends_at=life.at(4))
    life.charges(_FAILED_CHARGE, -3, (-3, 27))
    life.says(_CANCELLED, -1, (-3, 27), cancelled_at=life.at(-1))
    return life.expect("cancelled", "pro", -1, until=None, reason="cancelled", denied=True)


def _is_refunded(life: Life) -> Expected:
    life.begin(-9)
    life.says(_RENEWED, -9, (-9, 21))
    payment = {"payment_id": "pay_demo_refunded", "created_at": life.at(-9)}
    refund = {
        "refund_id": "ref_demo_1",
        "payment_id": "pay_demo_refunded",
        "status": "succeeded",
        "amount": template(_CHARGE)["data"]["total_amount"],
        "currency": "USD",
        "is_partial": False,
        "created_at": life.at(-2),
        "reason": None,
    }
    life.charges(_CHARGE, -9, (-9, 21), **payment)
    life.charges(_CHARGE, -2, (-9, 21), **payment, refund_status="full", refunds=[refund])
    return life.expect("cancelled", "pro", -2, until=None, reason="refunded", denied=True)


def _expires(life: Life) -> Expected:
    life.begin(-32, plan="starter")
    life.renews(-32)
    life.says(_CANCELLED, -2, (-32, -2), status="expired", cancelled_at=None, expires_at=life.at(-2))
    return life.expect("cancelled", "starter", -2, until=None, reason="expired", denied=True)


def _never_starts(life: Life) -> Expected:
    life.begin(-3)
    life.says(_TRIAL, -3, (-3, 27), status="failed")
    return Expected(None, None, None, False, None, "not_started")


def _never_buys(life: Life) -> Expected:
    return Expected(None, None, None, False, None, "none")


def _comes_back(life: Life) -> Expected:
    life.begin(-90, plan="starter")
    life.renews(-90)
    life.says(_CANCELLED, -60, (-90, -60), cancelled_at=life.at(-60))
    life.begin(-8)
    life.renews(-8)
    return life.expect("active", "pro", 22, until=22, reason="active")


STORIES = (
    Story("trial", "Amara Diallo", _in_trial),
    Story("trial, leaving", "Bruno Keller", _leaves_in_trial),
    Story("3 renewals", "Chiara Rossi", _renews),
    Story("upgraded", "Dmitri Volkov", _upgrades, link="email"),
    Story("leaving", "Elif Demir", _will_leave),
    Story("left", "Farid Haddad", _has_left),
    Story("renewal late", "Grace Mwangi", _renewal_is_late),
    Story("renewal missed", "Hugo Lindqvist", _renewal_is_missing),
    Story("in grace", "Ines Carvalho", _in_grace),
    Story("grace over", "Jonas Weber", _grace_is_over),
    Story("paid late", "Keiko Tanaka", _recovers, link="customer"),
    Story("on hold", "Liam Byrne", _on_hold),
    Story("paused", "Mira Patel", _pauses, link="customer"),
    Story("left, paid", "Nora Jensen", _leaves_at_once),
    Story("left, unpaid", "Omar Farouk", _leaves_unpaid),
    Story("refunded", "Petra Novak", _is_refunded),
    Story("expired", "Quinn Moreau", _expires),
    Story("charge failed", "Rosa Delgado", _never_starts),
    Story("never bought", "Sven Olsen", _never_buys),
    Story("came back", "Tala Reyes", _comes_back),
)
