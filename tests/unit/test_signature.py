"""Verification of webhook deliveries (V1 to V6): every bad input is one family of error."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from kitrocket.dodo.signature import Verifier, sign
from kitrocket.errors import (
    ConfigurationError,
    WebhookError,
    WebhookNotConfiguredError,
    WebhookPayloadError,
    WebhookTooLargeError,
    WebhookVerificationError,
)

KEY = "whsec_" + base64.b64encode(b"k" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 24).decode()
NOW = datetime(2026, 3, 2, 9, 15, 6, tzinfo=UTC)
BODY = json.dumps({"type": "license_key.created", "timestamp": "2026-03-02T09:15:06Z", "data": {"é": 1}}).encode()
VERIFIER = Verifier([KEY], max_bytes=2_097_152)


def signed(body: bytes = BODY, *, key: str = KEY, webhook_id: str = "msg_1", at: datetime = NOW) -> dict[str, str]:
    return sign(body, key=key, webhook_id=webhook_id, at=at)


def refused(body: Any, headers: Any, verifier: Verifier = VERIFIER, now: datetime = NOW) -> WebhookError:
    with pytest.raises(WebhookError) as caught:
        verifier.verify(body, headers, now=now)
    assert caught.value.__cause__ is None
    return caught.value


def test_a_delivery_is_returned_with_its_exact_text() -> None:
    delivery = VERIFIER.verify(BODY, signed(), now=NOW)
    assert (delivery.webhook_id, delivery.text.encode()) == ("msg_1", BODY)
    assert delivery.event.type == "license_key.created"


@pytest.mark.parametrize("seconds", [-300, -299, 0, 299, 300])
def test_a_time_within_the_tolerance_is_accepted(seconds: int) -> None:
    VERIFIER.verify(BODY, signed(at=NOW + timedelta(seconds=seconds)), now=NOW)


@pytest.mark.parametrize("seconds", [-301, 301])
def test_a_time_out_of_tolerance_is_refused(seconds: int) -> None:
    error = refused(BODY, signed(at=NOW + timedelta(seconds=seconds)))
    assert isinstance(error, WebhookVerificationError)
    assert error.reason == "time_out_of_tolerance"


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
@pytest.mark.parametrize("value", [None, "", "\0", "é", "a\nb"])
def test_each_header_must_be_there_and_printable(name: str, value: str | None) -> None:
    headers = signed()
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    assert isinstance(refused(BODY, headers), WebhookVerificationError)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_each_header_must_be_there_once(name: str) -> None:
    headers = signed()
    headers[name.title()] = headers[name]
    assert refused(BODY, headers).reason == "doubled_header"


def test_names_of_headers_have_no_letter_case() -> None:
    VERIFIER.verify(BODY, {name.upper(): value for name, value in signed().items()}, now=NOW)


@pytest.mark.parametrize("headers", [None, [], "webhook-id", {b"webhook-id": b"x"}, {"webhook-id": 1}, {1: "x"}])
def test_headers_of_another_type_are_refused(headers: object) -> None:
    assert isinstance(refused(BODY, headers), WebhookVerificationError)


def test_an_id_is_at_most_255_characters() -> None:
    VERIFIER.verify(BODY, signed(webhook_id="i" * 255), now=NOW)
    assert refused(BODY, signed(webhook_id="i" * 256)).reason == "bad_id"


@pytest.mark.parametrize(
    "timestamp", ["nan", "1e400", "1.5", "-1", "+1", " 1", "1_000", "yesterday", "٣", "1" * 12, "inf", "0x10"]
)
def test_a_timestamp_is_1_to_11_ascii_digits(timestamp: str) -> None:
    assert refused(BODY, signed() | {"webhook-timestamp": timestamp}).reason == "bad_timestamp"


def test_a_timestamp_spelled_otherwise_was_not_signed() -> None:
    headers = signed()
    headers["webhook-timestamp"] = "0" + headers["webhook-timestamp"]
    assert refused(BODY, headers).reason == "bad_signature"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace(",", ""),
        lambda s: s + ",x",
        lambda s: s.replace("v1,", "v1,,"),
        lambda s: "v1,!!!!" + s[7:],
        lambda s: s[:-1],
        lambda s: s.replace("v1", "v2"),
        lambda s: s.replace("v1", "v1a"),
        lambda s: s.upper(),
        lambda s: s.replace(" ", "\t") + "\t" + s,
        lambda s: " ".join(["v1," + "A" * 43 + "="] * 10_000),
        lambda s: " ".join(["v1," + "A" * 43 + "="] * 10_000 + [s]),
    ],
)
def test_a_malformed_signature_is_refused(change: Any) -> None:
    headers = signed()
    headers["webhook-signature"] = change(headers["webhook-signature"])
    assert refused(BODY, headers).reason == "bad_signature"


def test_an_unknown_key_is_refused() -> None:
    assert refused(BODY, signed(key=OTHER)).reason == "bad_signature"


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
def test_what_was_changed_after_signing_is_refused(name: str) -> None:
    headers = signed() | {name: signed(webhook_id="msg_2", at=NOW + timedelta(seconds=1))[name]}
    assert refused(BODY, headers).reason == "bad_signature"


@pytest.mark.parametrize(
    "body", [BODY + b" ", BODY.replace(b"1", b"2"), json.dumps(json.loads(BODY), indent=1).encode()]
)
def test_a_body_changed_after_signing_is_refused(body: bytes) -> None:
    assert refused(body, signed()).reason == "bad_signature"


def test_two_signatures_match_in_either_order_and_unknown_versions_are_skipped() -> None:
    ours, theirs = signed()["webhook-signature"], signed(key=OTHER)["webhook-signature"]
    for signature in (f"{ours} {theirs}", f"{theirs} {ours}", f"v1a,{'A' * 88} {ours}", f"junk {ours}"):
        VERIFIER.verify(BODY, signed() | {"webhook-signature": signature}, now=NOW)


def test_any_of_the_keys_may_match() -> None:
    rotating = Verifier([SecretStr(OTHER), KEY.removeprefix("whsec_")], max_bytes=1000)
    for key in (KEY, OTHER):
        rotating.verify(BODY, signed(key=key), now=NOW)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_json"),
        (b"\xff\xfe", "not_utf8"),
        (b"not json", "not_json"),
        (b"NaN", "not_json"),
        (b"[]", "not_an_object"),
        (b"[" * 100_000, "not_json"),
        (b'{"type":"x.y","timestamp":"2026-01-01T00:00:00Z","data":{"n":' + b"1" * 5000 + b"}}", "not_json"),
        (b'{"type":"x.y","timestamp":"2026-01-01T00:00:00Z","data":{"n":"\\ud800"}}', "not_json"),
        (b'{"type":"x.y","timestamp":"2026-01-01T00:00:00Z"}', "bad_data"),
        (b'{"type":"x.y","timestamp":"2026-01-01T00:00:00Z","data":[]}', "bad_data"),
        (b'{"type":"x.y","timestamp":1767225600,"data":{}}', "bad_event_time"),
        (b'{"type":"x.y","timestamp":"1767225600","data":{}}', "bad_event_time"),
        (b'{"type":"x.y","timestamp":"0001-01-01T00:00:00+01:00","data":{}}', "bad_event_time"),
        (b'{"type":"x.y","data":{}}', "bad_event_time"),
        (b'{"type":"","timestamp":"2026-01-01T00:00:00Z","data":{}}', "bad_type"),
        (b'{"type":"a\\u0000","timestamp":"2026-01-01T00:00:00Z","data":{}}', "bad_type"),
        (b'{"type":7,"timestamp":"2026-01-01T00:00:00Z","data":{}}', "bad_type"),
        (b'{"timestamp":"2026-01-01T00:00:00Z","data":{}}', "bad_type"),
    ],
)
def test_a_body_that_is_no_event_is_refused(body: bytes, reason: str) -> None:
    try:
        headers = signed(body)
    except UnicodeDecodeError:
        headers = signed()
    error = refused(body, headers)
    assert isinstance(error, WebhookPayloadError)
    assert error.reason == reason


@pytest.mark.parametrize("body", ["text", None, 1, {}])
def test_a_body_that_is_not_bytes_is_refused(body: object) -> None:
    assert refused(body, signed()).reason == "body_not_bytes"


def _padded(size: int) -> bytes:
    frame = json.dumps({"type": "x.y", "timestamp": "2026-01-01T00:00:00", "data": {"pad": ""}}).encode()
    return frame.replace(b'"pad": ""', b'"pad": "' + b"p" * (size - len(frame)) + b'"')


def test_the_size_limit_is_inclusive_and_comes_first() -> None:
    for size in (1_049_600, 2_097_152):
        body = _padded(size)
        VERIFIER.verify(body, signed(body), now=NOW)
    assert isinstance(refused(_padded(2_097_153), {}), WebhookTooLargeError)


def test_an_escaped_nul_in_a_string_is_text_like_any_other() -> None:
    body = b'{"type":"x.y","timestamp":"2026-01-01T00:00:00Z","data":{"n":"\\u0000"}}'
    assert VERIFIER.verify(body, signed(body), now=NOW).event.data == {"n": "\0"}


def test_without_a_key_nothing_can_be_verified() -> None:
    assert isinstance(refused(BODY, signed(), Verifier([], max_bytes=10)), WebhookNotConfiguredError)


@pytest.mark.parametrize(
    "key", ["", "whsec_", "whsec_short", "whsec_" + "A" * 43, base64.b64encode(b"k" * 15).decode(),
            base64.b64encode(b"k" * 65).decode(), "whsec_" + "é" * 44, "A" * 43 + "=\n", " " + KEY]
)  # fmt: skip
def test_a_key_that_cannot_be_one_is_named_by_its_setting_only(key: str) -> None:
    with pytest.raises(ConfigurationError, match="dodo_payments_webhook_key") as caught:
        Verifier([key], max_bytes=10)
    assert len(key) < 8 or key not in repr(caught.value)


@pytest.mark.parametrize("size", [16, 64])
def test_a_key_has_16_to_64_bytes(size: int) -> None:
    Verifier([base64.b64encode(b"k" * size).decode()], max_bytes=10)


def test_no_error_keeps_a_header_a_key_or_the_body() -> None:
    body = b"secret-body"
    for error in (refused(body, signed(body)), refused(body, signed() | {"webhook-id": "secret-id"})):
        assert "secret" not in f"{error!r} {error} {error.__dict__}"
