"""The session cookie, compared with what the npm package wrote (``better_auth_vectors.mjs`` makes the file anew)."""

from __future__ import annotations

import hmac
import json
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

import pytest

from kitrocket import cookies
from kitrocket.cookies import SessionCookie, parse, read_signed, sign
from kitrocket.errors import InvalidInputError
from kitrocket.passwords import hash_password, new_password, verify_password

VECTORS = json.loads((Path(__file__).parent / "better_auth_vectors.json").read_text(encoding="utf-8"))
SIGNED = [(one["token"], one["secret"], one["line"]) for one in VECTORS["cookies"]]
HASHES = [(one["password"], one["hash"]) for one in VECTORS["hashes"]]

TOKEN = "wYtCxyUJt9mFfCUXd3qcfcEPa3xadzrN"
SECRET = "better-auth-secret-12345678901234567890"
BOTH = SessionCookie([SECRET], secure=False)


def text_of(line: str) -> str:
    return line.partition("=")[2].partition(";")[0]


def test_there_are_enough_vectors_and_one_password_is_not_ascii() -> None:
    assert len(SIGNED) + len(HASHES) >= 10
    assert any(not password.isascii() for password, _ in HASHES)


@pytest.mark.parametrize(("token", "secret", "line"), SIGNED)
def test_a_cookie_is_what_better_auth_writes_to_the_letter(token: str, secret: str, line: str) -> None:
    cookie = SessionCookie([secret], secure=line.startswith("__Secure-"))
    if token == "true":
        assert cookie.write(TOKEN, remember=False)[1] == line
    else:
        assert cookie.write(token)[0] == line
        assert cookie.read(line.partition(";")[0]) == token


@pytest.mark.parametrize(("token", "secret", "line"), SIGNED)
def test_a_value_is_read_encoded_and_not(token: str, secret: str, line: str) -> None:
    text = text_of(line)
    assert "%" in text
    assert read_signed(text, [secret]) == token
    assert read_signed(unquote(text), [secret]) == token
    assert unquote(text) == sign(token, secret)
    signature = unquote(text).rpartition(".")[2]
    assert len(signature) == 44
    assert signature.endswith("=")


@pytest.mark.parametrize(("password", "stored"), HASHES)
def test_a_hash_is_better_auths(password: str, stored: str) -> None:
    assert new_password("password", password) == password
    assert verify_password(stored, password, "better-auth")
    assert not verify_password(stored, password + "x", "better-auth")
    assert verify_password(hash_password(password, "better-auth"), password, "better-auth")


GOOD = sign(TOKEN, SECRET)
VALUE, SIGNATURE = GOOD.split(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        VALUE,
        SIGNATURE,
        f"{VALUE}{SIGNATURE}",
        f".{SIGNATURE}",
        f"{VALUE}.",
        f"{VALUE}.{SIGNATURE}=",
        f"{VALUE}.{SIGNATURE[:-1]}",
        f"{VALUE}.{SIGNATURE[:-1]}A",
        f"{VALUE}.{SIGNATURE[1:]}",
        f"{VALUE}.A{SIGNATURE}",
        f"{VALUE}. {SIGNATURE[1:]}",
        f"{VALUE}.{'é' * 43}=",
        f"{VALUE}.{chr(0xD800) * 43}=",
        f"{VALUE}.{'A' * 43}=",
        f"{VALUE}.{SIGNATURE.swapcase()}",
        f"{VALUE[:-1]}M.{SIGNATURE}",
        f"{VALUE}.x.{SIGNATURE}",
        f"{VALUE}\0.{SIGNATURE}",
        f"{GOOD}.{SIGNATURE}",
        "%" * 200,
        "A" * 1_000_000,
    ],
    ids=lambda text: ascii(text)[:70],
)
def test_what_nobody_signed_is_refused(text: str) -> None:
    assert read_signed(text, [SECRET]) is None
    assert BOTH.read(f"better-auth.session_token={text}") is None


def test_the_last_dot_divides() -> None:
    assert read_signed(sign("a.b.c", SECRET), [SECRET]) == "a.b.c"


def test_another_secret_is_refused() -> None:
    for secret in ("", SECRET[:-1], SECRET + "0", SECRET.upper()):
        assert read_signed(GOOD, [secret]) is None
    assert read_signed(GOOD, []) is None


def test_of_several_secrets_the_first_signs_and_all_read() -> None:
    both = SessionCookie(["new", "old"])
    [line, _] = both.write(TOKEN)
    assert read_signed(text_of(line), ["new"]) == TOKEN
    assert read_signed(text_of(line), ["old"]) is None
    for secret in ("new", "old"):
        [line, _] = SessionCookie([secret]).write(TOKEN)
        assert both.read(line.partition(";")[0]) == TOKEN
    [line, _] = SessionCookie(["older"]).write(TOKEN)
    assert both.read(line.partition(";")[0]) is None


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counted(one: bytes, other: bytes) -> bool:
        calls.append(compare(one, other))
        return calls[-1]

    compare = hmac.compare_digest
    monkeypatch.setattr(cookies.hmac, "compare_digest", counted)
    assert read_signed(GOOD, [SECRET, "other", "third"]) == TOKEN
    assert calls == [True, False, False]


def test_a_remembered_cookie_has_better_auths_attributes() -> None:
    [line, other] = SessionCookie([SECRET]).write(TOKEN)
    assert line.startswith(f"__Secure-better-auth.session_token={TOKEN}.")
    assert line.endswith("; Max-Age=604800; Path=/; HttpOnly; Secure; SameSite=Lax")
    assert other == "__Secure-better-auth.dont_remember=; Max-Age=0; Path=/; HttpOnly; Secure; SameSite=Lax"


def test_a_cookie_that_is_not_remembered_says_so_to_better_auth() -> None:
    [line, other] = BOTH.write(TOKEN, remember=False)
    assert "Max-Age" not in line + other
    assert read_signed(text_of(other), [SECRET]) == "true"
    pair = f"{line.partition(';')[0]}; {other.partition(';')[0]}"
    assert BOTH.read(pair) == TOKEN
    assert not BOTH.is_remembered(pair)
    assert BOTH.is_remembered(line.partition(";")[0])
    assert BOTH.is_remembered("better-auth.dont_remember=true")


def test_without_a_secret_the_cookie_is_the_token_alone() -> None:
    own = SessionCookie(max_age=timedelta(hours=1))
    assert own.write(TOKEN) == [
        f"__Secure-kitrocket.session_token={TOKEN}; Max-Age=3600; Path=/; HttpOnly; Secure; SameSite=Lax"
    ]
    assert own.write(TOKEN, remember=False) == [
        f"__Secure-kitrocket.session_token={TOKEN}; Path=/; HttpOnly; Secure; SameSite=Lax"
    ]
    assert own.read(f"a=b; __Secure-kitrocket.session_token={TOKEN}; c=d") == TOKEN
    assert own.is_remembered("")
    # Neither the other side's cookie, nor one that a page of plain http may have planted.
    assert own.read(f"__Secure-better-auth.session_token={GOOD}") is None
    assert own.read(f"kitrocket.session_token={TOKEN}") is None
    for junk in ("", "k1$" + "0" * 64, TOKEN[:-1], TOKEN + "A", TOKEN[:-1] + "é"):
        assert own.read(f"__Secure-kitrocket.session_token={junk}") is None


def test_clearing_takes_away_what_was_written() -> None:
    for cookie, count in ((BOTH, 2), (SessionCookie(), 1)):
        names = {line.partition("=")[0] for line in cookie.write(TOKEN, remember=False)}
        gone = cookie.clear()
        assert {line.partition("=")[0] for line in gone} == names
        assert len(gone) == count
        assert all("=; Max-Age=0; Path=/; HttpOnly" in line for line in gone)


@pytest.mark.parametrize("token", ["", "x", f"{TOKEN}; Domain=evil.example", f"{TOKEN[:-1]}\n", "k1$" + "0" * 64])
def test_only_a_token_is_written(token: str) -> None:
    for cookie in (BOTH, SessionCookie()):
        with pytest.raises(InvalidInputError) as caught:
            cookie.write(token)
        assert caught.value.field == "token"
        assert len(token) < 2 or token not in str(caught.value)


def test_a_cookie_header_is_parsed() -> None:
    assert parse('a=1; b="2"; a=3;c = 4 ;;d;=5; e=') == {"a": "1", "b": "2", "c": "4", "": "5", "e": ""}
    assert parse("") == {}


def test_no_secret_is_in_its_repr() -> None:
    assert SECRET not in repr(BOTH)
