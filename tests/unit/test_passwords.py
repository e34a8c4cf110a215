from __future__ import annotations

import hashlib

import anyio
import argon2
import pytest

from kitrocket import passwords
from kitrocket.errors import ConfigurationError, InvalidInputError
from kitrocket.passwords import Passwords, PasswordScheme, hash_password, new_password, verify_password

AWKWARD = "p\u00e4ssw\u00f6rd \ufb01 \u212b \U0001f511"

# Made by Node's crypto.scryptSync(password.normalize("NFKC"), saltText, 64, {N: 16384, r: 16, p: 1}) and by hashlib.
SCRYPT = [
    (
        "correct horse",
        "00112233445566778899aabbccddeeff:13af89ff6a88bb0fb3277e79ba724c6c0731b15919ca892969d63abd1534b867"
        "d110179e3bc8af39995ede0f9b2ac14b2b97573df10ba3802c498dbeb61e4f64",
    ),
    (
        AWKWARD,
        "ffffffffffffffffffffffffffffffff:bf837d78e26fc56db39c7cfc941c04733fc474ce243e2b6174c44a96ac862f77"
        "64ae3f3f048a6e7e638a88323863c8be255fa3746feba2e3175e807e7ace4355",
    ),
    (
        "x" * 128,
        "0123456789abcdef0123456789abcdef:2dc8626a2b3c12e2bddebf8f9f1265438eced3f3a817eedb53163e794e3a3fa5"
        "208e64dc10626c7d468c7921316066821065a3c5792374030264074cfd7a2361",
    ),
    (
        "12345678",
        "a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5:ed115e89badd379c238c2415f45b2bcc2bd9736737ee61c48c83c16025860257"
        "5019c652a1e3e975259c9d1828a2907a3f4d065ac50a251fc4e8abb1752f6d84",
    ),
]
# Made by libargon2 with a fixed salt; the last with parameters of another day.
ARGON2 = [
    (
        "correct horse",
        "$argon2id$v=19$m=65536,t=3,p=4$MDEyMzQ1Njc4OWFiY2RlZg$L1b1NjppUoj/KIEORq1pof4waLxklM0mqKZzt9nCsKI",
    ),
    (AWKWARD, "$argon2id$v=19$m=65536,t=3,p=4$ZmVkY2JhOTg3NjU0MzIxMA$Eamm1MpNNa4JSeI59cTwMj3X7vr4Uo7IDTrKiey5eZ8"),
    (
        "correct horse",
        "$argon2id$v=19$m=1024,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$UDengyDgIHrEpswm+GeJvBdp5V8H6p/bLZoLqHbHq7Y",
    ),
]

NOT_HASHES = [
    *(None, "", "plain", "$argon2id$", "$argon2id$v=19$m=65536,t=3,p=4$AAAA", "$argon2id$\u00fc"),
    *("$argon2i$v=19$m=8,t=1,p=1$", "$2b$12$abcdefghijklmnopqrstuv", "0" * 32 + ":" + "0" * 127),
    *("0" * 32 + ":" + "0" * 129, "A" * 32 + ":" + "0" * 128, "0" * 32 + ":" + "0" * 128 + "\n"),
]

BAD_PASSWORDS = [
    *("", "x" * 7, "x" * 129, "\U0001f511" * 3 + "x", "\U0001f511" * 64 + "x", "\ud800" * 8, "pass\0word"),
    *("x" * 1_000_000, None, 12345678, b"12345678"),
]

OLD_ARGON2 = argon2.PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1)


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the library's function for each hash that is computed to verify something."""
    seen: list[str] = []
    argon2_verify, scrypt = argon2.PasswordHasher.verify, hashlib.scrypt

    def verify(hasher: argon2.PasswordHasher, stored: str, password: bytes) -> bool:
        seen.append("argon2id")
        return argon2_verify(hasher, stored, password)

    def counted_scrypt(*arguments: object, **options: object) -> bytes:
        seen.append("scrypt")
        return scrypt(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(argon2.PasswordHasher, "verify", verify)
    monkeypatch.setattr(hashlib, "scrypt", counted_scrypt)
    return seen


@pytest.mark.parametrize(("password", "stored"), SCRYPT + ARGON2)
@pytest.mark.parametrize("scheme", ["argon2id", "better-auth"])
def test_fixed_texts_verify_under_both_schemes(password: str, stored: str, scheme: PasswordScheme) -> None:
    assert verify_password(stored, password, scheme)
    assert not verify_password(stored, password[:-1] + "?", scheme)


@pytest.mark.parametrize("scheme", ["argon2id", "better-auth"])
def test_what_is_hashed_verifies_and_nothing_else_does(scheme: PasswordScheme) -> None:
    stored = hash_password(AWKWARD, scheme)
    assert verify_password(stored, AWKWARD, scheme)
    assert not verify_password(stored, AWKWARD + " ", scheme)
    assert stored != hash_password(AWKWARD, scheme), "the salt is fresh"


def test_the_texts_that_are_stored() -> None:
    assert hash_password("correct horse", "argon2id").startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    salt, _, key = hash_password("correct horse", "better-auth").partition(":")
    assert (len(bytes.fromhex(salt)), len(bytes.fromhex(key))) == (16, 64)


@pytest.mark.parametrize("scheme", ["argon2id", "better-auth"])
def test_composed_and_compatible_forms_are_one_password(scheme: PasswordScheme) -> None:
    stored = hash_password("cafe\u0301 \ufb01\uff11\uff12", scheme)
    assert verify_password(stored, "caf\u00e9 fi12", scheme)


@pytest.mark.parametrize("stored", NOT_HASHES)
@pytest.mark.parametrize(("scheme", "dummy"), [("argon2id", "argon2id"), ("better-auth", "scrypt")])
def test_where_nothing_can_verify_a_dummy_is(
    stored: str | None, scheme: PasswordScheme, dummy: str, verifications: list[str]
) -> None:
    assert not verify_password(stored, "correct horse", scheme)
    assert verifications[-1] == dummy


@pytest.mark.parametrize(
    "junk", ["", "\ud800", "\0", "x" * 1025, "\ufdfa" * 1_000_000], ids=lambda text: ascii(text)[:12]
)
@pytest.mark.parametrize("scheme", ["argon2id", "better-auth"])
def test_a_junk_password_is_wrong_and_costs_a_verification(
    junk: str, scheme: PasswordScheme, verifications: list[str]
) -> None:
    stored = SCRYPT[0][1] if scheme == "better-auth" else hash_password("correct horse", scheme)
    assert not verify_password(stored, junk, scheme)
    assert len(verifications) == 1


def test_the_dummy_costs_what_a_new_hash_costs() -> None:
    dummy = argon2.extract_parameters(passwords._DUMMY)
    assert dummy == argon2.extract_parameters(hash_password("correct horse", "argon2id"))


@pytest.mark.parametrize("good", ["x" * 8, "x" * 128, "\U0001f511" * 4, "\U0001f511" * 64, "pass word", "        "])
def test_a_password_that_may_be_set(good: str) -> None:
    assert new_password("password", good) == good


@pytest.mark.parametrize("bad", BAD_PASSWORDS, ids=lambda bad: ascii(bad)[:12])
def test_a_password_that_may_not_be_set(bad: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        new_password("password", bad)
    assert caught.value.field == "password"


def test_what_should_be_hashed_anew() -> None:
    current = hash_password("correct horse", "argon2id")
    old = OLD_ARGON2.hash("correct horse")
    modern, shared = Passwords("argon2id"), Passwords("better-auth")
    assert not modern.is_outdated(current)
    assert modern.is_outdated(old)
    assert modern.is_outdated(SCRYPT[0][1])
    assert not any(shared.is_outdated(stored) for stored in (current, old, SCRYPT[0][1]))


def test_an_unknown_scheme() -> None:
    with pytest.raises(ConfigurationError, match="password_scheme"):
        Passwords("md5")  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_hashing_leaves_the_event_loop_free_and_keeps_to_its_limiter() -> None:
    limiter = anyio.CapacityLimiter(1)
    hasher = Passwords("better-auth", limiter)
    most, turns = 0, 0
    done = anyio.Event()

    async def watch() -> None:
        nonlocal most, turns
        while not done.is_set():
            most = max(most, int(limiter.borrowed_tokens))
            turns += 1
            await anyio.lowlevel.checkpoint()

    async def verify() -> None:
        assert await hasher.verify(SCRYPT[0][1], "correct horse")

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        async with anyio.create_task_group() as verifying:
            for _ in range(3):
                verifying.start_soon(verify)
        done.set()
    assert most == 1
    assert turns > 100
