"""The projection: each line of its table at its boundaries, and what payments say (P1 to P7, A1)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitrocket.dodo.events import (
    STATUS_RANKS,
    DisputeState,
    PaymentState,
    RefundState,
    SubscriptionSnapshot,
    read_event,
)
from kitrocket.dodo.payments import Facts, Payment, facts_of
from kitrocket.dodo.projection import LIVE, Policy, Snapshot, access, project, row_access, view

DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
PREVIOUS = datetime(2026, 3, 1, tzinfo=UTC)
EVENT = datetime(2026, 3, 1, 0, 1, tzinfo=UTC)
NEXT = datetime(2026, 4, 1, tzinfo=UTC)
POLICY = Policy()
BASE = Snapshot(
    subscription_id="sub_1",
    customer_id="cus_1",
    plan="pro",
    status="active",
    event_at=EVENT,
    created_at=CREATED,
    previous_billing_date=PREVIOUS,
    next_billing_date=NEXT,
    started=True,
)
TRIAL = replace(
    BASE,
    created_at=PREVIOUS,
    next_billing_date=PREVIOUS + 14 * DAY,
    trial_period_days=14,
)
SUSPEND = Policy(dispute_policy="suspend")


def seen(snapshot: Snapshot, now: datetime, policy: Policy = POLICY) -> tuple[Any, ...] | None:
    found = view(snapshot, now, policy)
    return found and (found.status, found.period_end, found.allowed, found.until, found.reason)


def test_what_never_started_has_no_row() -> None:
    for snapshot in (
        replace(BASE, status="pending"),
        replace(BASE, status="pending", started=False),
        replace(BASE, status="failed", started=False),
    ):
        assert project([snapshot], EVENT, POLICY) is None
        assert access([snapshot], EVENT, POLICY).reason == "not_started"
    assert access([], EVENT, POLICY).reason == "none"


def test_a_revocation_cancels_whatever_the_provider_says() -> None:
    at = EVENT + DAY
    for status in ("active", "past_due", "on_hold", "cancelled"):
        snapshot = replace(BASE, status=status, facts=Facts(revoked_at=at, revoked_reason="refunded"))
        assert seen(snapshot, at) == ("cancelled", at, False, None, "refunded")
        row = project([snapshot], at, POLICY)
        assert row is not None
        assert row.updated_at == at


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (-SECOND, ("active", NEXT, True, NEXT, "cancel_scheduled")),
        (0 * SECOND, ("cancelled", NEXT, False, NEXT, "ended")),
        (SECOND, ("cancelled", NEXT, False, NEXT, "ended")),
    ],
)
def test_a_scheduled_cancel_ends_at_the_billing_date(offset: timedelta, expected: tuple[Any, ...]) -> None:
    snapshot = replace(BASE, cancel_at_next_billing_date=True)
    assert seen(snapshot, NEXT + offset) == expected
    row = project([snapshot], NEXT + offset, POLICY)
    assert row is not None
    assert row.updated_at == (EVENT if offset < 0 * SECOND else NEXT)


def test_an_end_known_after_the_fact_keeps_the_events_time() -> None:
    snapshot = replace(BASE, cancel_at_next_billing_date=True, event_at=NEXT + DAY)
    row = project([snapshot], NEXT + 2 * DAY, POLICY)
    assert row is not None
    assert row.updated_at == NEXT + DAY


@pytest.mark.parametrize("status", ["active", "past_due"])
def test_an_open_dispute_suspends_only_when_asked(status: str) -> None:
    snapshot = replace(BASE, status=status, facts=Facts(dispute_open=True))
    assert seen(snapshot, EVENT, SUSPEND) == ("past_due", NEXT, False, None, "dispute_open")
    assert seen(snapshot, EVENT) == seen(replace(snapshot, facts=Facts()), EVENT)


def test_an_open_dispute_does_not_outlive_a_scheduled_cancel() -> None:
    snapshot = replace(BASE, cancel_at_next_billing_date=True, facts=Facts(dispute_open=True))
    assert seen(snapshot, NEXT, SUSPEND) == ("cancelled", NEXT, False, NEXT, "ended")


class TestTrial:
    end = PREVIOUS + 14 * DAY

    def test_it_lasts_until_the_first_charge_is_due(self) -> None:
        assert seen(TRIAL, self.end - SECOND) == ("trialing", self.end, True, self.end, "trial")
        late = ("active", self.end, True, self.end + 3 * DAY, "renewal_unconfirmed")
        assert seen(TRIAL, self.end) == late
        assert seen(TRIAL, self.end + SECOND) == late

    def test_its_end_is_the_fact_that_the_row_shows(self) -> None:
        for now, expected in ((self.end - SECOND, EVENT), (self.end, self.end), (self.end + DAY, self.end)):
            row = project([TRIAL], now, POLICY)
            assert row is not None
            assert row.updated_at == expected

    def test_a_scheduled_cancel_shows_in_the_reason(self) -> None:
        snapshot = replace(TRIAL, cancel_at_next_billing_date=True)
        assert seen(snapshot, EVENT) == ("trialing", self.end, True, self.end, "cancel_scheduled")
        assert seen(snapshot, self.end) == ("cancelled", self.end, False, self.end, "ended")

    def test_a_charge_ends_it(self) -> None:
        assert seen(replace(TRIAL, facts=Facts(charged=True)), EVENT) == ("active", self.end, True, self.end, "active")

    @pytest.mark.parametrize(
        ("change", "in_trial"),
        [
            ({"previous_billing_date": PREVIOUS + 14 * DAY - SECOND, "next_billing_date": NEXT - 3 * DAY}, True),
            ({"previous_billing_date": PREVIOUS + 14 * DAY, "next_billing_date": NEXT - 3 * DAY}, False),
            ({"next_billing_date": PREVIOUS + 16 * DAY}, True),
            ({"next_billing_date": PREVIOUS + 16 * DAY + SECOND}, False),
            ({"trial_period_days": 0}, False),
            ({"trial_period_days": 2**31 - 1}, True),
            ({"created_at": None}, False),
            ({"previous_billing_date": None}, False),
            ({"next_billing_date": None}, False),
            ({"status": "past_due"}, False),
        ],
    )
    def test_its_conditions(self, change: dict[str, Any], in_trial: bool) -> None:
        found = view(replace(TRIAL, **change), EVENT, POLICY)
        assert found is not None
        assert (found.status == "trialing") == in_trial


def test_a_renewal_has_a_leeway_to_be_confirmed() -> None:
    end = NEXT + timedelta(hours=72)
    assert seen(BASE, NEXT - SECOND) == ("active", NEXT, True, NEXT, "active")
    for now in (NEXT, NEXT + SECOND, end - SECOND):
        assert seen(BASE, now) == ("active", NEXT, True, end, "renewal_unconfirmed")
    for now in (end, end + SECOND):
        assert seen(BASE, now) == ("active", NEXT, False, end, "renewal_missing")


@pytest.mark.parametrize("flag", [False, True])
def test_no_billing_date_means_no_end(flag: bool) -> None:
    snapshot = replace(BASE, next_billing_date=None, cancel_at_next_billing_date=flag)
    assert seen(snapshot, NEXT + 900 * DAY) == ("active", None, True, None, "cancel_scheduled" if flag else "active")
    past_due = replace(BASE, status="past_due", next_billing_date=None)
    assert seen(past_due, NEXT) == ("past_due", None, True, None, "grace")


@pytest.mark.parametrize(("deadline", "end"), [(None, NEXT + 3 * DAY), (NEXT + 7 * DAY, NEXT + 7 * DAY)])
def test_past_due_has_a_grace(deadline: datetime | None, end: datetime) -> None:
    snapshot = replace(BASE, status="past_due", past_due_ends_at=deadline)
    assert seen(snapshot, end - SECOND) == ("past_due", NEXT, True, end, "grace")
    for now in (end, end + SECOND):
        assert seen(snapshot, now) == ("past_due", NEXT, False, end, "past_due")


def test_on_hold_and_paused_are_denied() -> None:
    paused_at = EVENT - DAY
    assert seen(replace(BASE, status="on_hold"), EVENT) == ("past_due", NEXT, False, None, "on_hold")
    paused = replace(BASE, status="paused", paused_at=paused_at)
    assert seen(paused, EVENT) == ("past_due", paused_at, False, None, "paused")
    assert seen(replace(paused, paused_at=None), EVENT) == ("past_due", EVENT, False, None, "paused")


class TestCancelled:
    snapshot = replace(BASE, status="cancelled", cancelled_at=EVENT)

    def test_paid_time_is_kept(self) -> None:
        assert seen(self.snapshot, NEXT - SECOND) == ("cancelled", NEXT, True, NEXT, "cancelled_paid")
        for now in (NEXT, NEXT + SECOND):
            assert seen(self.snapshot, now) == ("cancelled", NEXT, False, NEXT, "ended")

    @pytest.mark.parametrize(
        ("change", "policy", "end"),
        [
            ({}, Policy(honour_paid_period=False), EVENT),
            ({"cancelled_at": NEXT}, POLICY, NEXT),
            ({"cancelled_at": NEXT + SECOND}, POLICY, NEXT),
            ({"cancelled_at": None, "event_at": NEXT}, POLICY, NEXT),
            ({"paused_at": EVENT}, POLICY, EVENT),
            ({"facts": Facts(charge_failed=True)}, POLICY, EVENT),
            ({"next_billing_date": None}, POLICY, EVENT),
        ],
    )
    def test_time_that_was_not_paid_is_not(self, change: dict[str, Any], policy: Policy, end: datetime) -> None:
        snapshot = replace(self.snapshot, **change)
        assert seen(snapshot, EVENT, policy) == ("cancelled", end, False, None, "cancelled")

    def test_one_second_of_paid_time_counts(self) -> None:
        assert seen(replace(self.snapshot, cancelled_at=NEXT - SECOND), EVENT) == (
            ("cancelled", NEXT, True, NEXT, "cancelled_paid")
        )


@pytest.mark.parametrize("status", ["expired", "failed"])
def test_expired_and_failed_are_over(status: str) -> None:
    snapshot = replace(BASE, status=status)
    assert seen(snapshot, EVENT) == ("cancelled", EVENT, False, None, status)
    assert seen(replace(snapshot, expires_at=CREATED), EVENT) == ("cancelled", CREATED, False, None, status)
    assert seen(replace(snapshot, event_at=NEXT + DAY), EVENT) == ("cancelled", NEXT, False, None, status)


class TestSeveral:
    """P5: the choice between a user's subscriptions."""

    def shown(self, *snapshots: Snapshot, now: datetime = EVENT) -> str:
        rows = {project(order, now, POLICY) for order in permutations(snapshots)}
        assert len(rows) == 1
        row = rows.pop()
        assert row is not None
        assert access(snapshots, now, POLICY).plan == row.plan
        return row.dodo_subscription_id

    def test_the_order_of_preference(self) -> None:
        ended = replace(BASE, subscription_id="z", status="expired", created_at=NEXT)
        on_hold = replace(BASE, subscription_id="y", status="on_hold")
        starter = replace(BASE, subscription_id="x", plan="starter")
        pro = replace(BASE, subscription_id="b")
        newer = replace(BASE, subscription_id="a", created_at=CREATED + DAY)
        assert self.shown(ended, on_hold) == "y"
        assert self.shown(ended, on_hold, starter) == "x"
        assert self.shown(starter, pro) == "b"
        assert self.shown(pro, newer, starter) == "a"
        assert self.shown(pro, replace(pro, subscription_id="c")) == "c"
        assert self.shown(ended, replace(BASE, status="pending", subscription_id="zz")) == "z"

    def test_paid_time_left_comes_before_a_live_one_that_is_denied(self) -> None:
        paid = replace(BASE, subscription_id="a", status="cancelled", cancelled_at=EVENT)
        on_hold = replace(BASE, subscription_id="b", status="on_hold")
        assert self.shown(paid, on_hold) == "a"
        assert self.shown(paid, on_hold, now=NEXT) == "b"


_INSTANTS = st.datetimes(datetime(2026, 1, 1), datetime(2026, 5, 1), timezones=st.just(UTC)).map(  # noqa: DTZ001
    lambda instant: instant.replace(microsecond=0)
)
_FACTS = st.builds(
    Facts,
    revoked_at=st.none() | st.none() | _INSTANTS,
    revoked_reason=st.just("refunded"),
    dispute_open=st.booleans(),
    charged=st.booleans(),
    charge_failed=st.booleans(),
)
_SNAPSHOTS = st.builds(
    Snapshot,
    subscription_id=st.sampled_from("abc"),
    customer_id=st.just("cus"),
    plan=st.sampled_from(["starter", "pro", "gone"]),
    status=st.sampled_from(STATUS_RANKS),
    event_at=_INSTANTS | st.just(datetime.max.replace(tzinfo=UTC)),
    created_at=st.none() | _INSTANTS,
    previous_billing_date=st.none() | _INSTANTS,
    next_billing_date=st.none() | _INSTANTS | st.just(datetime.max.replace(tzinfo=UTC)),
    cancel_at_next_billing_date=st.booleans(),
    cancelled_at=st.none() | _INSTANTS,
    expires_at=st.none() | _INSTANTS,
    paused_at=st.none() | _INSTANTS,
    past_due_ends_at=st.none() | _INSTANTS,
    trial_period_days=st.sampled_from([0, 14, 2**31 - 1]),
    started=st.booleans(),
    facts=_FACTS,
)


@settings(max_examples=600)
@given(snapshot=_SNAPSHOTS, now=_INSTANTS, policy=st.sampled_from([POLICY, SUSPEND, Policy(honour_paid_period=False)]))
def test_what_holds_for_every_snapshot(snapshot: Snapshot, now: datetime, policy: Policy) -> None:
    found = view(snapshot, now, policy)
    if found is None:
        return
    assert not found.allowed or found.until is None or now < found.until
    assert found.status in LIVE or found.status == "cancelled"
    if found.turns_at is not None:
        assert found.turns_at > now
        before, after = (view(snapshot, found.turns_at + offset, policy) for offset in (-timedelta.resolution, 0 * DAY))
        assert before == found
        assert after != found
    else:
        assert view(snapshot, now + 400 * DAY, policy) == found


@settings(max_examples=300)
@given(snapshots=st.lists(_SNAPSHOTS, max_size=3), now=_INSTANTS)
def test_row_and_access_agree_in_any_order(snapshots: list[Snapshot], now: datetime) -> None:
    unique = list({item.subscription_id: item for item in snapshots}.values())
    row, granted = project(unique, now, POLICY), access(unique, now, POLICY)
    assert (row and (row.plan, row.status)) == (granted.status and (granted.plan, granted.status))
    assert {project(order, now, POLICY) for order in permutations(unique)} == {row}


PAYLOADS = files("kitrocket.demo") / "payloads"
PLANS = {"pdt_starter_m_4Vb7": "starter", "pdt_pro_m_8Kd2": "pro"}


def snapshot_of(number: str) -> Snapshot:
    (file,) = (entry for entry in PAYLOADS.iterdir() if entry.name.startswith(f"{number}_"))
    event = read_event(file.read_text(encoding="utf-8"))
    state = event.content
    assert isinstance(state, SubscriptionSnapshot)
    fields = {name: getattr(state, name) for name in Snapshot.__dataclass_fields__ if hasattr(state, name)}
    return Snapshot(
        **fields,
        customer_id=state.customer.customer_id,
        plan=PLANS[state.product_id],
        event_at=event.at,
        started=state.status not in ("pending", "failed"),
    )


@pytest.mark.parametrize(
    ("number", "plan", "status", "end", "until", "reason"),
    [
        ("01", "starter", "trialing", "2026-03-16", "2026-03-16", "trial"),
        ("02", "starter", "active", "2026-04-16", "2026-04-16", "active"),
        ("04", "pro", "past_due", "2026-05-29", "2026-06-05", "grace"),
        ("05", "pro", "cancelled", "2026-07-29", "2026-07-29", "cancelled_paid"),
        ("14", "pro", "active", "2026-06-29", "2026-06-29", "cancel_scheduled"),
        ("15", "pro", "past_due", "2026-05-29", None, "on_hold"),
        ("16", "pro", "past_due", "2026-06-15", None, "paused"),
        ("17", "pro", "past_due", "2026-05-29", "2026-06-05", "grace"),
        ("x1", "starter", "active", "2026-04-16", "2026-04-16", "active"),
    ],
)
def test_every_example_means_what_it_says(
    number: str, plan: str, status: str, end: str, until: str | None, reason: str
) -> None:
    snapshot = snapshot_of(number)
    row, granted = project([snapshot], snapshot.event_at, POLICY), access([snapshot], snapshot.event_at, POLICY)
    assert row is not None
    assert row.current_period_end is not None
    assert (row.plan, row.status, row.current_period_end.date().isoformat()) == (plan, status, end)
    assert (granted.allowed, granted.reason) == (until is not None, reason)
    assert (granted.until and granted.until.date().isoformat()) == until


class TestPayments:
    def payment(self, payment_id: str = "pay_1", at: datetime = EVENT, **fields: Any) -> Payment:
        state = {
            "payment_id": payment_id,
            "status": "succeeded",
            "subscription_id": "sub_1",
            "charge_type": "renewal",
            "total_amount": 1000,
            "created_at": at,
        }
        return Payment(payment_id).with_state(PaymentState.model_validate(state | fields), at)

    def refund(self, refund_id: str, amount: int | None, status: str = "succeeded", **fields: Any) -> RefundState:
        return RefundState(refund_id=refund_id, payment_id="pay_1", status=status, amount=amount, **fields)

    def dispute(self, status: str) -> DisputeState:
        return DisputeState(dispute_id="dsp_1", payment_id="pay_1", dispute_status=f"dispute_{status}")

    def facts(self, *payments: Payment, previous: datetime | None = PREVIOUS) -> Facts:
        return facts_of("sub_1", previous, payments)

    def test_halves_of_a_refund_revoke_when_they_reach_the_total(self) -> None:
        half = self.payment().with_refund(self.refund("ref_1", 500), EVENT + DAY)
        assert self.facts(half).revoked_at is None
        assert self.facts(half.with_refund(self.refund("ref_2", 499), EVENT + 2 * DAY)).revoked_at is None
        for refund in (self.refund("ref_2", 500), self.refund("ref_2", None)):
            facts = self.facts(half.with_refund(refund, EVENT + 2 * DAY))
            assert (facts.revoked_at, facts.revoked_reason) == (EVENT + 2 * DAY, "refunded")

    @pytest.mark.parametrize(("status", "revoked"), [("succeeded", True), ("pending", False), ("failed", False)])
    def test_only_a_refund_that_succeeded_counts(self, status: str, revoked: bool) -> None:
        payment = self.payment().with_refund(self.refund("ref_1", 1000, status), EVENT)
        assert (self.facts(payment).revoked_at is not None) == revoked
        assert (
            self.facts(payment.with_refund(self.refund("ref_1", None, is_partial=True), EVENT + DAY)).revoked_at is None
        )

    def test_every_charge_of_the_period_must_be_refunded(self) -> None:
        refunded = self.payment(refund_status="full")
        assert self.facts(refunded).revoked_reason == "refunded"
        assert self.facts(refunded, self.payment("pay_2")).revoked_at is None
        assert self.facts(refunded, self.payment("pay_2", total_amount=0)).revoked_at is not None
        assert self.facts(refunded, self.payment("pay_2", status="failed")).revoked_at is not None

    def test_a_late_refund_of_an_older_period_revokes_nothing(self) -> None:
        period = {"subscription_id": "sub_1", "starts_at": CREATED, "ends_at": PREVIOUS}
        old = self.payment(at=PREVIOUS - 31 * DAY, service_periods=[period], refund_status="full")
        assert self.facts(old).revoked_at is None
        assert self.facts(old, previous=PREVIOUS - SECOND).revoked_at is not None
        for offset, revoked in ((-SECOND, False), (0 * SECOND, False), (SECOND, True)):
            bare = self.payment(at=PREVIOUS - 2 * DAY + offset, refund_status="full")
            assert (self.facts(bare).revoked_at is not None) == revoked

    @pytest.mark.parametrize(
        ("status", "is_open", "revoked"),
        [
            ("opened", True, False),
            ("challenged", True, False),
            ("won", False, False),
            ("cancelled", False, False),
            ("lost", False, True),
            ("accepted", False, True),
            ("expired", False, True),
        ],
    )
    def test_disputes(self, status: str, is_open: bool, revoked: bool) -> None:
        payment = self.payment().with_dispute(self.dispute(status), EVENT + DAY)
        facts = self.facts(payment, self.payment("pay_2"))
        assert facts.dispute_open == is_open
        assert (facts.revoked_at, facts.revoked_reason) == ((EVENT + DAY, "dispute_lost") if revoked else (None, None))

    def test_a_dispute_won_after_it_was_lost_restores(self) -> None:
        lost = self.payment().with_dispute(self.dispute("lost"), EVENT + DAY)
        assert self.facts(lost.with_dispute(self.dispute("won"), EVENT + 2 * DAY)).revoked_at is None

    def test_a_charge_since_the_period_began_ends_a_trial(self) -> None:
        for at, charged in ((PREVIOUS - SECOND, False), (PREVIOUS, True), (PREVIOUS + SECOND, True)):
            assert self.facts(self.payment(at=at)).charged == charged
        for change in ({"charge_type": "new"}, {"total_amount": 0}, {"status": "failed"}, {"subscription_id": "sub_2"}):
            assert not self.facts(self.payment(**change)).charged
        assert self.facts(self.payment(charge_type="plan_change")).charged

    def test_the_newest_charge_says_whether_time_was_paid(self) -> None:
        failed = self.payment("pay_1", EVENT, status="failed")
        assert self.facts(failed).charge_failed
        assert not self.facts(failed, self.payment("pay_2", EVENT + DAY)).charge_failed
        assert not self.facts(self.payment("pay_1", PREVIOUS - DAY, status="failed")).charge_failed

    def test_facts_about_a_payment_merge_in_any_order(self) -> None:
        def paid(at: datetime, **fields: Any) -> Any:
            state = {"payment_id": "pay_1", "subscription_id": "sub_1", "created_at": EVENT, "total_amount": 1000}
            return lambda payment: payment.with_state(PaymentState.model_validate(state | fields), at)

        steps = [
            paid(EVENT, status="processing"),
            paid(EVENT, status="succeeded"),
            paid(EVENT + DAY, status="succeeded", refund_status="full", subscription_ids=["sub_2"]),
            lambda payment: payment.with_refund(self.refund("ref_1", 400), EVENT + DAY),
            lambda payment: payment.with_dispute(self.dispute("won"), EVENT + DAY),
            lambda payment: payment.with_dispute(self.dispute("opened"), EVENT + DAY),
        ]
        results = []
        for order in permutations(steps):
            payment = Payment("pay_1")
            for step in order:
                payment = step(payment)
            results.append(payment)
        assert all(result == results[0] for result in results)
        assert results[0].disputes["dsp_1"].status == "won"

    def test_only_refunds_and_disputes_known_say_nothing(self) -> None:
        orphan = Payment("pay_1").with_dispute(self.dispute("lost"), EVENT)
        assert self.facts(orphan) == Facts()


@pytest.mark.parametrize(
    ("status", "end", "offset", "allowed"),
    [
        ("active", NEXT, 3 * DAY - SECOND, True),
        ("active", NEXT, 3 * DAY, False),
        ("trialing", NEXT, 3 * DAY + SECOND, False),
        ("active", None, 900 * DAY, True),
        ("cancelled", NEXT, -SECOND, True),
        ("cancelled", NEXT, 0 * DAY, False),
        ("cancelled", None, 0 * DAY, False),
        ("past_due", NEXT, -DAY, False),
        ("incomplete", NEXT, -DAY, False),
    ],
)
def test_a_row_without_snapshots_is_read_by_itself(
    status: str, end: datetime | None, offset: timedelta, allowed: bool
) -> None:
    granted = row_access("pro", status, end, NEXT + offset, POLICY)
    assert (granted.allowed, granted.reason) == (allowed, "row_only")
    assert not granted.allowed or granted.until is None or NEXT + offset < granted.until
