"""Reading of events (M1 to M4) and their order (O1)."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitrocket.dodo.events import (
    STATUS_RANKS,
    DisputeState,
    Event,
    PaymentState,
    RefundState,
    SubscriptionSnapshot,
    Unreadable,
    named_user,
    read_event,
)
from kitrocket.errors import WebhookPayloadError

PAYLOADS = {
    entry.name: entry.read_text(encoding="utf-8")
    for entry in (files("kitrocket.demo") / "payloads").iterdir()
    if entry.name.endswith(".json")
}
AT = datetime(2026, 3, 1, tzinfo=UTC)
SUBSCRIPTION: dict[str, Any] = {
    "subscription_id": "sub_1",
    "status": "active",
    "product_id": "pdt_1",
    "customer": {"customer_id": "cus_1"},
}
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def read(data: dict[str, Any], type: str = "subscription.updated") -> Any:
    return Event(type, AT, data).content


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_every_example_is_read(name: str) -> None:
    event = read_event(PAYLOADS[name])
    family = event.type.partition(".")[0]
    model = {"subscription": SubscriptionSnapshot, "payment": PaymentState, "dispute": DisputeState}.get(family)
    assert event.content is None if model is None else isinstance(event.content, model)


@pytest.mark.parametrize("type", ["subscription.active", "subscription.invented", "subscription"])
def test_the_type_has_no_influence_within_its_family(type: str) -> None:
    assert read(SUBSCRIPTION, type) == read(SUBSCRIPTION)


@pytest.mark.parametrize(
    "type", ["license_key.created", "credit.balance_low", "subscriptions.active", "Payment.x", "."]
)
def test_other_families_carry_nothing_of_interest(type: str) -> None:
    assert read(SUBSCRIPTION, type) is None


def test_null_and_missing_take_the_default() -> None:
    nulls = dict.fromkeys(SubscriptionSnapshot.model_fields) | SUBSCRIPTION
    assert read(nulls) == read(SUBSCRIPTION)
    assert read(SUBSCRIPTION | {"customer": {"customer_id": "cus_1", "metadata": None, "email": None}}) == read(
        SUBSCRIPTION
    )


def test_what_is_not_read_cannot_break_anything() -> None:
    assert read(SUBSCRIPTION | {"credit_entitlement_cart": [{"credits_amount": 1}], "new_in_2027": {}}) == read(
        SUBSCRIPTION
    )


@pytest.mark.parametrize("field", sorted(SUBSCRIPTION))
@pytest.mark.parametrize("value", [None, "", 7, [], "x" * 256, "a\0b", "a\x1fb", "a\x7fb", "a\x85b"])
def test_a_subscription_needs_its_four_fields(field: str, value: object) -> None:
    assert isinstance(read(SUBSCRIPTION | {field: value}), Unreadable)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("next_billing_date", "soon"),
        ("next_billing_date", 1767225600),
        ("next_billing_date", "9999-12-31T23:59:59-01:00"),
        ("trial_period_days", -1),
        ("trial_period_days", 2**31),
        ("cancel_at_next_billing_date", "perhaps"),
        ("metadata", "text"),
    ],
)
def test_an_optional_field_that_cannot_be_read_makes_the_event_unreadable(field: str, value: object) -> None:
    assert read(SUBSCRIPTION | {field: value}) == Unreadable("sub_1", None, "cus_1")


def test_a_time_without_a_zone_means_utc_and_others_are_converted() -> None:
    for text in ("2026-03-02T09:15:06", "2026-03-02T09:15:06Z", "2026-03-02T10:15:06+01:00"):
        expected = datetime(2026, 3, 2, 9, 15, 6, tzinfo=UTC)
        assert read_event(json.dumps({"type": "x", "timestamp": text, "data": {}})).at == expected


@pytest.mark.parametrize(
    ("type", "data", "model"),
    [
        ("payment.succeeded", {"payment_id": "pay_1"}, PaymentState),
        ("refund.succeeded", {"payment_id": "pay_1", "refund_id": "ref_1"}, RefundState),
        ("dispute.opened", {"payment_id": "pay_1", "dispute_id": "dsp_1"}, DisputeState),
    ],
)
def test_payments_refunds_and_disputes_need_their_ids(type: str, data: dict[str, str], model: type) -> None:
    assert isinstance(read(data, type), model)
    for name in data:
        assert isinstance(read({k: v for k, v in data.items() if k != name}, type), Unreadable)


def test_a_payment_names_every_subscription_it_pays_for() -> None:
    payment = read_event(PAYLOADS["06_payment_succeeded_renewal.json"]).content
    assert isinstance(payment, PaymentState)
    assert payment.all_subscription_ids() == {"sub_Gx6hJm9wPz3K"}


def test_the_first_key_of_the_first_map_names_the_user() -> None:
    keys = ("kitrocket_user_id", "user_id")
    assert named_user(keys, {"user_id": "b"}, {"kitrocket_user_id": "c"}) == "b"
    assert named_user(keys, {"user_id": "b", "kitrocket_user_id": "a"}) == "a"
    assert named_user(keys, {"kitrocket_user_id": ""}, {"user_id": 7}) == "7"
    assert named_user(keys, {}, {"userId": "d"}) is None


class TestOrderKey:
    def key(self, at: datetime = AT, **fields: Any) -> str:
        snapshot = read(SUBSCRIPTION | fields)
        assert isinstance(snapshot, SubscriptionSnapshot)
        return snapshot.order_key(at)

    def test_time_comes_first_then_the_billing_dates_then_the_status(self) -> None:
        ordered = [
            self.key(),
            self.key(next_billing_date="2026-03-01T00:00:00Z"),
            self.key(previous_billing_date="2026-02-01T00:00:00Z"),
            self.key(previous_billing_date="2026-02-01T00:00:00Z", next_billing_date="2026-03-01T00:00:00Z"),
            self.key(previous_billing_date="2026-02-01T00:00:00.000001Z"),
            self.key(AT + timedelta(microseconds=1), status="pending"),
        ]
        assert ordered == sorted(ordered)
        assert len(set(map(len, ordered))) == 1
        by_status = [self.key(status=status) for status in STATUS_RANKS]
        assert by_status == sorted(by_status)

    def test_equal_snapshots_have_equal_keys_and_others_differ(self) -> None:
        assert self.key() == self.key(new_in_2027=1)
        assert self.key() != self.key(metadata={"a": "b"})

    @given(at=st.datetimes(timezones=st.just(UTC)), other=st.datetimes(timezones=st.just(UTC)))
    def test_keys_compare_as_their_times_do(self, at: datetime, other: datetime) -> None:
        if at != other:
            assert (self.key(at).encode() < self.key(other).encode()) == (at < other)


@settings(max_examples=1000)
@given(family=st.sampled_from(["subscription", "payment", "refund", "dispute", "x"]), data=st.data())
def test_no_data_raises(family: str, data: st.DataObject) -> None:
    fields = sorted({*SubscriptionSnapshot.model_fields, *PaymentState.model_fields, "refund_id", "dispute_id"})
    payload = data.draw(st.dictionaries(st.sampled_from(fields), _JSON, max_size=8))
    base: dict[str, Any] = {**SUBSCRIPTION, "payment_id": "pay_1", "refund_id": "ref_1", "dispute_id": "dsp_1"}
    content = read(base | payload, f"{family}.fuzzed")
    if isinstance(content, SubscriptionSnapshot) and content.status in STATUS_RANKS:
        assert len(content.order_key(AT)) == 147


@settings(max_examples=300)
@given(envelope=_JSON)
def test_no_envelope_raises_another_error(envelope: Any) -> None:
    with contextlib.suppress(WebhookPayloadError):
        assert isinstance(read_event(json.dumps(envelope)), Event)
