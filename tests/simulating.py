"""A provider made up from a seed: whole lives of subscriptions, told as the webhooks that it would send.

Nothing here knows kitrocket's rules but :func:`expected_rows`, which tells the events in order.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from kitrocket.clock import to_db
from kitrocket.dodo.events import (
    DisputeState,
    Event,
    PaymentState,
    RefundState,
    SubscriptionSnapshot,
    named_user,
    read_event,
)
from kitrocket.dodo.payments import Payment, facts_of
from kitrocket.dodo.projection import Policy, Snapshot, project

PRODUCTS = {"pdt_starter": "starter", "pdt_pro": "pro"}
USER_KEYS = ("kitrocket_user_id", "user_id", "userId")
BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
#: When every life has been told. Some periods are over by then, others are not.
NOW = datetime(2026, 9, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Told:
    """An event, with the body of its first delivery and of its second, which may carry a newer state."""

    webhook_id: str
    at: datetime
    subscription_id: str
    body: bytes
    body_again: bytes


@dataclass
class World:
    """Users, some of whom sign up only when everything was told, and every event about them in order."""

    users: list[str]
    late_users: list[str]
    events: list[Told]
    deliveries: list[tuple[str, bytes]] = field(default_factory=list)

    def tied(self) -> float:
        """Return the share of events whose subscription has another event of the same instant."""
        seen: dict[tuple[str, datetime], int] = {}
        for event in self.events:
            seen[event.subscription_id, event.at] = seen.get((event.subscription_id, event.at), 0) + 1
        return sum(count for count in seen.values() if count > 1) / len(self.events)


def simulate(seed: int, *, subscriptions: int, events: int, payloads: Literal["frozen", "latest"] = "frozen") -> World:
    """Return a world of exactly so many subscriptions and events, its deliveries (each event twice) shuffled.

    ``payloads="latest"``: the data of an event is the state at delivery, which may be newer than the event.
    """
    rng = random.Random(seed)
    lives: list[_Life] = []
    while len(lives) < subscriptions:
        person = _Person(rng, f"usr_{seed}_{len(lives)}")
        for _ in range(min(rng.choice((1, 1, 1, 2, 3)), subscriptions - len(lives))):
            lives.append(_Life(rng, f"sub_{seed}_{len(lives)}", person))
    most = [events // subscriptions + (number < events % subscriptions) for number in range(subscriptions)]
    told = [event for life, count in zip(lives, most, strict=True) for event in life.tell(count, payloads)]
    users = sorted({user_id for life in lives for user_id in (life.person.user_id, life.heir)})
    late = [user for user in users if rng.random() < 0.05]
    world = World([user for user in users if user not in late], late, sorted(told, key=lambda event: event.at))
    world.deliveries = [(event.webhook_id, event.body) for event in told]
    world.deliveries += [(event.webhook_id, event.body_again) for event in told]
    rng.shuffle(world.deliveries)
    return world


class _Person:
    def __init__(self, rng: random.Random, user_id: str) -> None:
        self.user_id = user_id
        self.customer_id = f"cus_{user_id}"
        self.since = BEGINNING + rng.random() * 180 * DAY
        self.named_by_customer = rng.random() < 0.2


class _Life:
    """One subscription: its present state, and what was told of it."""

    def __init__(self, rng: random.Random, id: str, person: _Person) -> None:
        self.rng = rng
        self.id = id
        self.person = person
        self.now = person.since + rng.random() * 60 * DAY
        self.told: list[tuple[str, datetime, dict[str, Any]]] = []
        self.payments: list[dict[str, Any]] = []
        self.heir = f"{person.user_id}_heir"
        name = {rng.choice(USER_KEYS): person.user_id}
        self.state: dict[str, Any] = {
            "subscription_id": id,
            "status": "pending",
            "product_id": rng.choice(list(PRODUCTS)),
            "customer": {
                "customer_id": person.customer_id,
                "email": f"{person.user_id}@example.com",
                "metadata": name if person.named_by_customer else {},
            },
            "metadata": {} if person.named_by_customer else name,
            "created_at": self.now,
            "previous_billing_date": self.now,
            "next_billing_date": self.now + 30 * DAY,
            "cancel_at_next_billing_date": False,
            "trial_period_days": 0,
        }

    def tell(self, count: int, payloads: str) -> list[Told]:
        self.begins()
        while len(self.told) < count:
            self.now += self.rng.random() * 9 * DAY
            self.rng.choice(self.possible())()
        return self.as_deliveries(self.told[:count], payloads)

    def as_deliveries(self, told: list[tuple[str, datetime, dict[str, Any]]], payloads: str) -> list[Told]:
        events = []
        last = told[-1][1]
        states = [(number, data) for number, (type, _, data) in enumerate(told) if type.startswith("subscription.")]
        for number, (type, at, data) in enumerate(told):
            bodies = [data, data]
            if payloads == "latest" and type.startswith("subscription."):
                # Only the beginning names its user for certain, so each event keeps the name it has.
                name = {"metadata": data["metadata"], "customer": data["customer"]}
                newer = [state | name for later, state in states if later >= number]
                bodies = [self.rng.choice(newer)] * 2
                # What decides is the same in both deliveries: the first to arrive is the one that counts.
                if at < last:
                    bodies[1] = self.rng.choice(newer)
            first, again = (
                json.dumps({"type": type, "timestamp": at, "data": body}, default=_iso).encode() for body in bodies
            )
            events.append(Told(f"msg_{self.id}_{number}", at, self.id, first, again))
        return events

    # -- what may happen ----------------------------------------------------------------------------------------

    def begins(self) -> None:
        chance = self.rng.random()
        self.says("subscription.updated")
        if chance < 0.07:
            self.becomes("failed")
        elif chance < 0.4:
            days = self.rng.choice((7, 14))
            self.becomes("active", trial_period_days=days, next_billing_date=self.state["created_at"] + days * DAY)
        else:
            self.pays("subscription")
            self.becomes("active")
            self.says("subscription.updated")

    def possible(self) -> Sequence[Callable[[], None]]:
        status = self.state["status"]
        if status == "active":
            usual = [self.renews, self.renews, self.renews, self.upgrades, self.schedules, self.flags, self.unflags]
            rare = [self.falls_behind, self.pauses, self.cancels, self.gives_back, self.disputes, self.moves]
            return [*usual, *rare, self.chatters]
        if status == "past_due":
            return [self.recovers, self.recovers, self.goes_on_hold, self.cancels, self.chatters]
        if status == "on_hold":
            return [self.recovers, self.expires, self.cancels]
        if status == "paused":
            return [self.resumes, self.cancels, self.chatters]
        return [self.chatters, self.gives_back, self.disputes]

    def renews(self) -> None:
        start = self.state["next_billing_date"]
        if start > NOW - DAY:
            self.chatters()
            return
        self.now = max(self.now, start)
        self.advance(start)
        self.pays("renewal")
        self.becomes("active", "subscription.renewed")
        self.says("subscription.updated")

    def upgrades(self) -> None:
        self.state["product_id"] = "pdt_pro"
        self.pays("plan_change")
        self.says("subscription.plan_changed")
        self.says("subscription.updated")

    def schedules(self) -> None:
        change = {"product_id": "pdt_starter", "effective_at": self.state["next_billing_date"]}
        self.becomes("active", "subscription.updated", scheduled_change=change)

    def flags(self) -> None:
        self.becomes("active", "subscription.cancelled", cancel_at_next_billing_date=True, cancelled_at=self.now)
        self.says("subscription.updated")

    def unflags(self) -> None:
        self.becomes("active", "subscription.updated", cancel_at_next_billing_date=False, cancelled_at=None)

    def falls_behind(self) -> None:
        self.pays("renewal", status="failed")
        self.becomes("past_due", "subscription.updated", past_due_ends_at=self.now + 7 * DAY)

    def recovers(self) -> None:
        self.advance(self.now)
        self.pays("renewal")
        self.becomes("active", past_due_ends_at=None)
        self.says("subscription.renewed")

    def goes_on_hold(self) -> None:
        self.becomes("on_hold")
        self.says("subscription.updated")

    def pauses(self) -> None:
        self.becomes("paused", paused_at=self.now)

    def resumes(self) -> None:
        self.advance(self.now)
        self.becomes("active", "subscription.unpaused", paused_at=None)

    def cancels(self) -> None:
        self.becomes("cancelled", cancelled_at=self.now)
        self.says("subscription.updated")

    def expires(self) -> None:
        self.becomes("expired", expires_at=self.now)

    def moves(self) -> None:
        """Belong to somebody else from now on."""
        self.becomes("active", "subscription.updated", metadata={USER_KEYS[0]: self.heir})

    def chatters(self) -> None:
        """Tell the state again, or tell of something else."""
        type = self.rng.choice(("subscription.updated", "license_key.created", "subscription.invented"))
        self.says(type)

    def gives_back(self) -> None:
        payment = self.paid()
        if payment is None:
            self.chatters()
            return
        share = self.rng.choice((1.0, 0.5, 0.5))
        data = {
            "refund_id": f"ref_{payment['payment_id']}_{len(self.told)}",
            "payment_id": payment["payment_id"],
            "status": self.rng.choice(("succeeded", "succeeded", "failed")),
            "amount": int(payment["total_amount"] * share),
            "is_partial": share < 1,
        }
        if data["status"] == "succeeded":
            self.tells("refund.pending", data | {"status": "pending"})
        self.tells(f"refund.{data['status']}", data)

    def disputes(self) -> None:
        payment = self.paid()
        if payment is None:
            self.chatters()
            return
        id = f"dsp_{payment['payment_id']}"
        for status in ("opened", self.rng.choice(("won", "lost", "challenged", "cancelled"))):
            data = {"dispute_id": id, "payment_id": payment["payment_id"], "amount": "18.66"}
            self.tells(f"dispute.{status}", data | {"dispute_status": f"dispute_{status}"})

    # -- telling it -----------------------------------------------------------------------------------------------

    def advance(self, start: datetime) -> None:
        self.state |= {"previous_billing_date": start, "next_billing_date": start + 30 * DAY}
        if self.state.get("scheduled_change"):
            self.state |= {"product_id": "pdt_starter", "scheduled_change": None}

    def pays(self, charge_type: str, *, status: str = "succeeded") -> None:
        start, end = self.state["previous_billing_date"], self.state["next_billing_date"]
        period = {"subscription_id": self.id, "starts_at": start, "ends_at": end}
        payment = {
            "payment_id": f"pay_{self.id}_{len(self.payments)}",
            "status": "processing",
            "charge_type": charge_type,
            "total_amount": 1866,
            "currency": "USD",
            "customer": self.state["customer"],
            "subscription_id": self.id,
            "service_periods": [period] if self.rng.random() < 0.8 else [],
            "created_at": self.now,
        }
        if self.rng.random() < 0.3:
            self.tells("payment.processing", payment)
        payment = payment | {"status": status}
        self.payments.append(payment)
        self.tells(f"payment.{status}", payment)

    def paid(self) -> dict[str, Any] | None:
        return self.rng.choice([payment for payment in self.payments if payment["status"] == "succeeded"] or [None])

    def becomes(self, status: str, type: str | None = None, **changes: Any) -> None:
        self.state |= {"status": status, **changes}
        self.says(type or f"subscription.{status}")

    def says(self, type: str) -> None:
        """Tell the present state, now and then without the user."""
        data = deepcopy(self.state)
        if self.told and self.rng.random() < 0.15:
            data |= {"metadata": {}, "customer": data["customer"] | {"metadata": {}}}
        self.tells(type, data)

    def tells(self, type: str, data: dict[str, Any]) -> None:
        self.told.append((type, self.now, deepcopy(data)))
        # What one step of a life causes has one instant more often than not.
        if self.rng.random() < 0.3:
            self.now += timedelta(milliseconds=self.rng.randrange(1, 2000))


def _iso(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()


# -- the oracle ---------------------------------------------------------------------------------------------------


def expected_rows(world: World, now: datetime = NOW, policy: Policy | None = None) -> list[dict[str, Any]]:
    """Return the rows of ``subscriptions``, without their ids, that the events make when they are told in order."""
    policy = policy or Policy()
    events = [read_event(told.body.decode()) for told in world.events]
    payments = _payments(events)
    by_user: dict[str, list[Snapshot]] = {}
    for user_id, snapshot in _snapshots(events):
        facts = facts_of(snapshot.subscription_id, snapshot.previous_billing_date, payments.values())
        by_user.setdefault(user_id, []).append(replace(snapshot, facts=facts))
    rows = []
    for user_id, snapshots in by_user.items():
        projection = project(snapshots, now, policy)
        if projection is not None:
            row = {"user_id": user_id} | projection._asdict()
            rows.append({name: to_db(value) if isinstance(value, datetime) else value for name, value in row.items()})
    return sorted(rows, key=lambda row: row["user_id"])


def _snapshots(events: Iterable[Event]) -> Iterable[tuple[str, Snapshot]]:
    told: dict[str, list[tuple[str, Event, SubscriptionSnapshot]]] = {}
    for event in events:
        state = event.content
        if isinstance(state, SubscriptionSnapshot):
            told.setdefault(state.subscription_id, []).append((state.order_key(event.at), event, state))
    for history in told.values():
        history.sort(key=lambda entry: entry[0])
        users = [named_user(USER_KEYS, state.metadata, state.customer.metadata) for _, _, state in history]
        named = [user for user in users if user is not None]
        if not named:
            continue
        _, event, state = history[-1]
        yield (
            named[-1],
            Snapshot(
                customer_id=state.customer.customer_id,
                plan=PRODUCTS[state.product_id],
                event_at=event.at,
                started=any(entry.status not in ("pending", "failed") for _, _, entry in history),
                **state.model_dump(exclude={"customer", "metadata", "product_id", "scheduled_change"}),
            ),
        )


def _payments(events: Iterable[Event]) -> dict[str, Payment]:
    payments: dict[str, Payment] = {}
    for event in sorted(events, key=lambda event: event.at):
        state = event.content
        if not isinstance(state, PaymentState | RefundState | DisputeState):
            continue
        known = payments.get(state.payment_id) or Payment(state.payment_id)
        if isinstance(state, PaymentState):
            payments[state.payment_id] = known.with_state(state, event.at)
        elif isinstance(state, RefundState):
            payments[state.payment_id] = known.with_refund(state, event.at)
        else:
            payments[state.payment_id] = known.with_dispute(state, event.at)
    return payments
