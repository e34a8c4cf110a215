"""The Studio over HTTP: who gets in, what is shown, what a form may change."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import anyio
import httpx
import pytest

import factories
from delivering import PAYLOADS, PRODUCTS, SUBSCRIPTION, USER, Desk, with_user
from dodo_server import DodoServer
from kitrocket.admin import create_staff, has_staff
from kitrocket.engine import Engine
from kitrocket.errors import InvalidInputError
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.tables import OWN_TABLES, SEED_TABLES, Users
from kitrocket.testing import ManualClock
from proxying import Proxy
from servers import Server
from serving import PASSWORD, STAFF, logged_in, served

pytestmark = [
    pytest.mark.asyncio,
    # Piccolo says so at each login over http.
    pytest.mark.filterwarnings("ignore:If running sessions in production"),
]

TABLES = [table._meta.tablename for table in (*SEED_TABLES, *OWN_TABLES)]
READ_ONLY = sorted(set(TABLES) - {"users", "subscriptions"})
#: With a fraction that no form shows.
AT = datetime(2026, 2, 3, 4, 5, 6, 789123, tzinfo=UTC)
SECRETS = [
    "the-session-token",
    "the-access-token",
    "the-refresh-token",
    "the-password-hash",
    "the-payload",
    "pat@secret",
]

HIDDEN = [
    ("sessions", "token"),
    ("accounts", "access_token"),
    ("accounts", "refresh_token"),
    ("accounts", "password"),
    ("webhook_events", "payload"),
    ("webhook_events", "customer_email"),
]
#: Enough for each of the seed's tables to be a whole row.
SOMETHING = {
    "email": "x@example.com",
    "name": "x",
    "user_id": "u1",
    "plan": "pro",
    "status": "active",
    "provider": "p",
    "provider_account_id": "1",
    "model": "m",
    "tokens_used": 1,
    "expires_at": "2026-01-01T00:00:00",
    "created_at": "2026-01-01T00:00:00",
    "updated_at": "2026-01-01T00:00:00",
}


def shown_secrets(answer: httpx.Response) -> list[str]:
    return [secret for secret in SECRETS if secret in answer.text]


def make_kit(engine: Engine, clock: ManualClock, **settings: object) -> KitRocket:
    return KitRocket(Settings(**settings), engine=engine, clock=clock, background=False)  # type: ignore[arg-type]  # checked by pydantic


async def fill(engine: Engine) -> None:
    """One row of each table, with every secret in it."""
    await factories.make_user(engine, id="u1", email="ada@example.com", at=AT)
    naive = AT.replace(tzinfo=None)
    await engine.fetch(
        "INSERT INTO sessions (id, user_id, token, expires_at, created_at) VALUES ('s1', 'u1', $1, $2, $2)",
        SECRETS[0],
        naive,
    )
    await engine.fetch(
        "INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token, refresh_token, password,"
        " expires_at, created_at) VALUES ('a1', 'u1', 'github', '42', $1, $2, $3, $4, $4)",
        *SECRETS[1:4],
        naive,
    )
    await engine.fetch(
        "INSERT INTO subscriptions (id, user_id, plan, status, current_period_end, created_at, updated_at)"
        " VALUES ('b1', 'u1', 'pro', 'active', $1, $1, $1)",
        naive,
    )
    await engine.fetch(
        "INSERT INTO usage (id, user_id, tokens_used, model, created_at) VALUES ('g1', 'u1', 7, 'm', $1)", naive
    )
    await engine.fetch(
        "INSERT INTO kitrocket.webhook_events (webhook_id, type, received_at, body_sha256, payload, customer_email,"
        " state, attempts, deliveries, hook_state, hook_attempts)"
        " VALUES ('w1', 'subscription.active', $1, 'ab', $2, $3, 'applied', 0, 1, 'none', 0)",
        naive,
        f'{{"x": "{SECRETS[4]}"}}',
        SECRETS[5],
    )


async def test_the_login_page_is_there_and_nothing_else_without_a_login(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock)
    async with served(kit, studio=True) as address, httpx.AsyncClient(base_url=address, trust_env=False) as client:
        page = await client.get("/admin", follow_redirects=True)
        assert page.status_code == 200
        assert str(page.url).endswith("/admin/")
        assert "<html" in page.text.lower()
        assert (await client.get("/admin/api/tables/users/")).status_code == 401
        for cookie in ("x", "x" * 3000, "a=b; c", "\x7f", "é"):
            headers = {"cookie": f"id={cookie}".encode()}
            assert (await client.get("/admin/api/tables/users/", headers=headers)).status_code == 401


async def test_a_wrong_password_and_a_customer_stay_outside(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock)
    async with served(kit, studio=True) as address:
        await create_staff(engine, STAFF, PASSWORD)
        await kit.users.create(email="ada@example.com", name="Ada", password="correct horse")
        async with httpx.AsyncClient(base_url=f"{address}/admin", trust_env=False) as client:
            await client.get("/")
            headers = {"X-CSRFToken": client.cookies["csrftoken"]}
            for name, password in [
                (STAFF, "wrong"),
                ("ada@example.com", "correct horse"),
                ("nobody", "x"),
                ("\0", "\0"),
            ]:
                answer = await client.post(
                    "/public/login/", json={"username": name, "password": password}, headers=headers
                )
                assert 400 <= answer.status_code < 500
            assert (await client.get("/api/tables/users/")).status_code == 401


async def test_the_cookie_of_a_login_is_stored_as_a_digest(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        stored = await engine.fetchval("SELECT token FROM kitrocket.studio_sessions")
        assert client.cookies["id"] != stored
        assert (await client.get("/api/user/")).status_code == 200
        client.cookies.clear()
        assert (await client.get("/api/user/", headers={"cookie": f"id={stored}"})).status_code == 401
        assert await engine.fetchval("SELECT count(*) FROM sessions") == 0


async def test_logging_out_ends_the_login(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        token = client.cookies["id"]
        assert (await client.post("/public/logout/")).status_code == 200
        client.cookies.clear()
        assert (await client.get("/api/user/", headers={"cookie": f"id={token}"})).status_code == 401


async def test_the_tables_stand_in_groups_and_the_login_tables_are_not_among_them(
    engine: Engine, clock: ManualClock
) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        grouped = (await client.get("/api/tables/grouped/")).json()
    assert grouped == {
        "grouped": {
            "People": ["accounts", "sessions", "users"],
            "Billing": ["billing_incidents", "dodo_payments", "dodo_subscriptions", "subscriptions", "webhook_events"],
            "Usage": ["usage", "usage_reservations"],
        },
        "ungrouped": [],
    }


async def test_each_table_is_shown_newest_first_without_its_secrets(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        for table in TABLES:
            schema = (await client.get(f"/api/tables/{table}/schema/")).json()
            [order] = schema["extra"]["order_by"]
            assert order["ascending"] is False
            assert order["column"] in ("created_at", "received_at", "opened_at")
            in_order = f"?__readable=true&__order=-{order['column']}"
            places = ("", in_order, "schema/", "ids/", "count/", "new/", "references/")
            answers = [await client.get(f"/api/tables/{table}/{place}") for place in places]
            key = schema["extra"]["primary_key_name"]
            rows = answers[0].json()["rows"]
            answers += [await client.get(f"/api/tables/{table}/{row[key]}/?__readable=true") for row in rows]
            for answer in answers:
                assert answer.status_code == 200, answer.text
                assert not shown_secrets(answer)


async def test_a_secret_cannot_be_ordered_by_filtered_by_or_selected(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        for table, secret in HIDDEN:
            for query in (
                f"__order={secret}",
                f"__order=-{secret}",
                f"__order=created_at,{secret}",
                f"__order=created_at&__order={secret}",
                f"__order[]={secret}",
                f"__visible_fields={secret}",
                f"{secret}=the",
                f"{secret}__operator=is_null",
                f"{secret}__match=starts&{secret}=the",
            ):
                for place in ("", "count/"):
                    answer = await client.get(f"/api/tables/{table}/{place}?{query}")
                    assert answer.status_code in (400, 422), f"{place} {query} {answer.text}"
                    assert not shown_secrets(answer)


async def test_saving_a_whole_form_writes_what_was_changed_and_nothing_else(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock, studio_allow_writes=True)) as client:
        await fill(engine)
        for table, key, change in (
            ("accounts", "a1", {"provider": "google"}),
            ("sessions", "s1", {"user_agent": "changed"}),
            ("users", "u1", {"name": "Ada L."}),
            ("subscriptions", "b1", {"plan": "starter"}),
        ):
            before = dict(await engine.fetchrow(f"SELECT * FROM {table} WHERE id = $1", key) or {})
            form = (await client.get(f"/api/tables/{table}/{key}/")).json()
            # What the form sends: secrets empty, times to the second, NULL as empty text or null.
            sent = {
                name: "" if name in ("token", "password", "access_token", "refresh_token") else value
                for name, value in form.items()
            }
            sent = {
                name: value[:19] if isinstance(value, str) and name.endswith(("_at", "_end")) else value
                for name, value in sent.items()
            }
            answer = await client.patch(f"/api/tables/{table}/{key}/", json=sent | change)
            assert answer.status_code == 200, answer.text
            assert not shown_secrets(answer)
            after = dict(await engine.fetchrow(f"SELECT * FROM {table} WHERE id = $1", key) or {})
            expected = before | change
            if "updated_at" in before:
                expected["updated_at"] = clock.now.replace(tzinfo=None)
            assert after == expected


async def test_saving_an_unchanged_form_changes_nothing(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        before = await engine.fetchrow("SELECT * FROM users")
        form = (await client.get("/api/tables/users/u1/")).json()
        assert (await client.patch("/api/tables/users/u1/", json=form)).status_code == 200
        assert await engine.fetchrow("SELECT * FROM users") == before


async def test_a_time_with_a_zone_is_stored_as_its_instant(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        answer = await client.patch("/api/tables/users/u1/", json={"email_verified": "2026-03-01T12:00:00+02:00"})
        assert answer.status_code == 200
        assert await engine.fetchval("SELECT email_verified FROM users") == datetime(
            2026, 3, 1, 10, tzinfo=UTC
        ).replace(tzinfo=None)


async def test_a_secret_is_never_written(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock, studio_allow_writes=True)) as client:
        await fill(engine)
        before = await engine.fetch("SELECT * FROM accounts")
        answer = await client.patch("/api/tables/accounts/a1/", json={"password": "plain"})
        assert answer.status_code == 422
        answer = await client.post(
            "/api/tables/accounts/",
            json={"user_id": "u1", "provider": "x", "provider_account_id": "1", "password": "plain"},
        )
        assert answer.status_code == 422
        assert await engine.fetch("SELECT * FROM accounts") == before


async def test_a_read_only_table_answers_get_alone(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        for table in READ_ONLY:
            path = f"/api/tables/{table}/"
            rows = (await client.get(path)).json()["rows"]
            key = next(iter(rows[0].values())) if rows else "nobody"
            expected = {405} if rows else {404, 405}
            assert (await client.patch(f"{path}{key}/", json={})).status_code in expected
            assert (await client.delete(f"{path}{key}/")).status_code in expected
            assert (await client.post(path, json=SOMETHING)).status_code in {405, 422}
            assert (await client.delete(path)).status_code == 405
            assert (await client.get(path)).json()["rows"] == rows


async def test_put_is_refused_everywhere(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock, studio_allow_writes=True)) as client:
        await fill(engine)
        for table, key in (("users", "u1"), ("sessions", "s1"), ("accounts", "a1"), ("subscriptions", "b1")):
            assert (await client.put(f"/api/tables/{table}/{key}/", json=SOMETHING)).status_code == 405
        assert (await client.patch("/api/tables/sessions/s1/", json={"user_agent": "x"})).status_code == 200


async def test_a_user_is_added_edited_and_deleted(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock)
    async with logged_in(kit) as client:
        new = (await client.get("/api/tables/users/new/")).json()
        answer = await client.post("/api/tables/users/", json=new | {"email": " Ada@Example.com", "name": "Ada"})
        assert answer.status_code == 201, answer.text
        user = await kit.users.get_by_email("ada@example.com")
        assert user is not None
        assert len(user.id) == 32
        await factories.make_session(engine, user.id)
        answer = await client.patch(f"/api/tables/users/{user.id}/", json={"email": "LOVELACE@example.com"})
        assert answer.status_code == 200
        assert await kit.users.get_by_email("lovelace@example.com") is not None
        assert (await client.delete(f"/api/tables/users/{user.id}/")).status_code == 204
        assert await kit.users.get(user.id) is None
        assert await engine.fetchval("SELECT count(*) FROM sessions") == 0


async def test_a_new_row_needs_no_times(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        answer = await client.post("/api/tables/users/", json={"email": "a@example.com", "name": "A"})
        assert answer.status_code == 201, answer.text
        assert await engine.fetchval("SELECT created_at FROM users") is not None


JUNK_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"\xff\xfe",
    b"{}",
    b'{"email": null, "name": null}',
    b'{"email": 5, "name": []}',
    b'{"email": "a@example.com", "name": "\\u0000"}',
    b'{"email": "\\ud800@example.com", "name": "x"}',
    b'{"email": "no at sign", "name": "x"}',
    b'{"email": "a@example.com", "name": "x", "created_at": "never"}',
    b'{"email": "a@example.com", "name": "x", "created_at": "0001-01-01T00:00:00+14:00"}',
    b'{"email": "a@example.com", "name": "x", "unknown": 1}',
    b"[" * 100_000,
    b'{"email": "ada@example.com", "name": "the address is taken"}',
]


JUNK_PLACES = [
    ("POST", "/api/tables/users/"),
    ("PATCH", "/api/tables/users/u1/"),
    ("PUT", "/api/tables/users/u1/"),
    ("DELETE", "/api/tables/users/nobody/"),
    ("POST", "/api/tables/subscriptions/"),
    ("POST", "/public/logout/"),
    ("POST", "/api/change-password/"),
    ("POST", "/api/forms/x/"),
    ("POST", "/api/media/"),
    ("POST", "/"),
]


async def test_junk_is_never_answered_with_a_5xx(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        token = client.cookies["id"]
        for body, (method, path) in itertools.product(JUNK_BODIES, JUNK_PLACES):
            for kind in ("application/json", "multipart/form-data; boundary=x")[: 2 if len(body) < 5 else 1]:
                headers = {"content-type": kind}
                client.cookies["id"] = "nobody" if "logout" in path else token
                answer = await client.request(method, path, content=body, headers=headers)
                assert answer.status_code < 500, f"{method} {path} {body[:60]!r} {answer.status_code} {answer.text}"


async def test_a_junk_login_is_never_answered_with_a_5xx(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        for body in (
            b"",
            b"[]",
            b"{}",
            b'{"username": 1, "password": {}}',
            b'{"username": "\\ud800", "password": "x"}',
        ):
            answer = await client.post("/public/login/", content=body, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, f"{body!r} {answer.status_code} {answer.text}"


async def test_a_body_over_the_limit_is_refused(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        answer = await client.post("/api/tables/users/", content=b'"' + b"x" * 1_048_575 + b'"')
        assert answer.status_code == 413


async def test_a_body_that_does_not_arrive_is_given_up(
    engine: Engine, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kitrocket.admin.front._BODY_SECONDS", 0.2)
    async with served(make_kit(engine, clock), studio=True) as address:
        stream = await anyio.connect_tcp("127.0.0.1", int(address.rpartition(":")[2]))
        async with stream:
            await stream.send(b"POST /admin/public/login/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            with anyio.fail_after(30):
                assert (await stream.receive()).startswith(b"HTTP/1.1 408")


async def test_the_forms_repair_webhooks_and_say_what_is_wrong(
    engine: Engine, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kitrocket")
    await Desk(engine, clock).deliver(PAYLOADS["02"], "msg_parked")
    await fill(engine)
    await engine.fetch("UPDATE kitrocket.webhook_events SET payload = NULL WHERE webhook_id = 'w1'")
    async with logged_in(make_kit(engine, clock, dodo_products=PRODUCTS)) as client:

        async def submit(form: str, **fields: object) -> tuple[int, str]:
            answer = await client.post(f"/api/forms/{form}/", json=fields)
            return answer.status_code, answer.json().get("custom_form_success") or str(answer.json())

        assert await submit("replay-a-webhook", webhook_id="msg_parked") == (200, "msg_parked: parked (no_user).")
        await factories.make_user(engine, id=USER)
        assert await submit("replay-a-webhook", webhook_id=" msg_parked ") == (200, "msg_parked: applied.")
        assert f"a replay was asked for in the Studio by {STAFF}" in caplog.text
        for junk in ("unknown", "", "\0", "x" * 300, "w1"):
            status, text = await submit("replay-a-webhook", webhook_id=junk)
            assert (status, "custom_form_error" in text) == (422, True), text
        for junk in ({}, {"webhook_id": 1}, {"webhook_id": None}):
            assert (await submit("replay-a-webhook", **junk))[0] == 422
        assert await submit("retry-parked-webhooks") == (
            200,
            "Tried 0: 0 finished, 0 given up. 0 brought up to date.",
        )
        status, text = await submit("reconcile-with-dodopayments", dry_run=True)
        assert (status, "DODO_PAYMENTS_API_KEY" in text) == (422, True)
        del client.headers["X-CSRFToken"]
        assert (await client.post("/api/forms/retry-parked-webhooks/", json={})).status_code == 403
        client.cookies.delete("id")
        for form in ("replay-a-webhook", "retry-parked-webhooks", "reconcile-with-dodopayments"):
            assert (await client.get(f"/api/forms/{form}/")).status_code == 401
            assert (await client.post(f"/api/forms/{form}/", json={})).status_code in (401, 403)


async def test_the_form_that_reconciles_says_what_differs_before_it_writes(
    engine: Engine, clock: ManualClock, dodo: DodoServer
) -> None:
    desk = await with_user(Desk(engine, clock))
    await desk.deliver(PAYLOADS["02"])
    dodo.subscriptions[SUBSCRIPTION] = PAYLOADS["02"]["data"] | {"status": "on_hold"}
    kit = make_kit(engine, clock, dodo_products=PRODUCTS, dodo_payments_api_key="key", dodo_payments_base_url=dodo.url)
    async with logged_in(kit) as client:
        for dry_run, changed, status in ((True, 0, "active"), (False, 1, "past_due")):
            answer = await client.post("/api/forms/reconcile-with-dodopayments/", json={"dry_run": dry_run})
            text = answer.json()["custom_form_success"]
            assert text.startswith("Compared 1: ")
            assert f"{changed} changed" in text
            assert f"{SUBSCRIPTION} status: active here, on_hold there." in text
            assert await engine.fetchval("SELECT status FROM subscriptions") == status


JUNK_QUERIES = [
    "__order=nothing",
    "__order=user_id.email",
    "__order=",
    "__visible_fields=nothing",
    "__visible_fields=",
    "__page=0",
    "__page=-1",
    "__page=99999999999999999999999",
    "__page=x",
    "__page_size=-1",
    "__page_size=0",
    "__page_size=99999999999999999999",
    "created_at=never",
    "created_at=2026-01-01T00:00:00Z",
    "created_at=2026-01-01T00:00:00Z&created_at__operator=gt",
    "created_at__operator=nothing",
    "name=%00",
    "name=%ff%fe",
    "name=%ED%A0%80",
    "name=%25%25_",
    "name=a&name=b",
    "name__match=nothing",
    "nothing=1",
    "__readable=x",
    "__range_header=true",
    "__range_header=true&__range_header_name=%0d%0aX:y",
    "search=%00",
    "limit=-1",
    "limit=x",
    "limit=99999999999999999999999",
    "offset=-1&limit=1",
    "search={}%7B%7D'%22",
]


async def test_junk_queries_are_never_answered_with_a_5xx(
    engine: Engine, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        for query, place in itertools.product(JUNK_QUERIES, ("", "ids/", "count/", "u1/", "schema/", "new/")):
            answer = await client.get(f"/api/tables/users/{place}?{query}")
            assert answer.status_code < 500, f"{place} {query} {answer.status_code} {answer.text}"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


JUNK_KEYS = ["%00", "%ff", "x" * 7000, "..%2f..", "%F0%9F%9A%80", "a%2Fb", "nobody"]


async def test_junk_keys_are_never_answered_with_a_5xx(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        for key, method in itertools.product(JUNK_KEYS, ("GET", "PATCH", "PUT", "DELETE", "POST", "OPTIONS", "TRACE")):
            answer = await client.request(method, f"/api/tables/users/{key}/", json={})
            assert 400 <= answer.status_code < 500, f"{method} {key[:20]} {answer.status_code}"


async def test_a_second_live_subscription_is_refused_by_name(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        await fill(engine)
        answer = await client.post("/api/tables/subscriptions/", json={"user_id": "u1", "plan": "pro"})
        assert answer.status_code == 422
        answer = await client.post("/api/tables/subscriptions/", json={"user_id": "nobody", "plan": "pro"})
        assert answer.status_code == 422
        assert await engine.fetchval("SELECT count(*) FROM subscriptions") == 1


async def test_no_row_reaches_the_log(engine: Engine, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    async with logged_in(make_kit(engine, clock, studio_allow_writes=True)) as client:
        await fill(engine)
        await client.post("/api/tables/users/", json={"email": "ada@example.com", "name": "a-secret-name"})
        await client.patch("/api/tables/users/u1/", json={"name": "a-secret-name\0"})
        await client.get("/api/tables/users/?created_at__operator=gt&created_at=a-secret-name")
        await client.patch("/api/tables/accounts/a1/", json={"user_id": "a-secret-name"})
    ours = "\n".join(caplog.handler.format(record) for record in caplog.records if record.name != "httpx")
    assert "a-secret-name" not in ours
    assert "ada@example.com" not in ours


async def test_the_subscription_form_says_that_a_row_is_a_projection(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        schema = (await client.get("/api/tables/subscriptions/schema/")).json()
    assert "projection" in schema["extra"]["help_text"]


async def test_it_answers_to_its_host_names_alone(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock, studio_hosts=["studio.example.com"])
    async with served(kit, studio=True) as address, httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{address}/admin/")).status_code == 404
        named = {"host": "studio.example.com:1234"}
        assert (await client.get(f"{address}/admin/", headers=named)).status_code == 200
        assert (await client.get(f"{address}/healthz")).status_code == 200


async def test_cookies_are_for_https_alone_when_told_so(engine: Engine, clock: ManualClock) -> None:
    kit = make_kit(engine, clock, studio_secure=True)
    async with served(kit, studio=True) as address:
        await create_staff(engine, STAFF, PASSWORD)
        async with httpx.AsyncClient(base_url=f"{address}/admin", trust_env=False) as client:
            await client.get("/")
            answer = await client.post(
                "/public/login/",
                json={"username": STAFF, "password": PASSWORD},
                headers={"X-CSRFToken": client.cookies["csrftoken"]},
            )
    [cookie] = [value for value in answer.headers.get_list("set-cookie") if value.startswith("id=")]
    assert "secure" in cookie.lower()
    assert "httponly" in cookie.lower()


async def test_staff_get_a_random_password_and_can_get_a_new_one(engine: Engine, clock: ManualClock) -> None:
    async with served(make_kit(engine, clock), studio=True):
        assert await has_staff(engine) is False
        first = await create_staff(engine, STAFF)
        second = await create_staff(engine, STAFF)
        assert first != second
        assert len(second) >= 16
        assert await has_staff(engine) is True
        for name, password in (("", "long enough"), ("x" * 101, "long enough"), ("\0", "long enough"), ("x", "short")):
            with pytest.raises(InvalidInputError):
                await create_staff(engine, name, password)
        assert await create_staff(engine, "x" * 100, "long enough") == "long enough"


async def test_a_studio_leaves_the_tables_of_the_application_alone(engine: Engine, clock: ManualClock) -> None:
    before = Users._meta._db
    references = len(Users._meta.foreign_key_references)
    async with logged_in(make_kit(engine, clock)):
        assert Users._meta._db is before
        assert len(Users._meta.foreign_key_references) == references


async def test_a_login_ends_after_an_hour(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)):
        row = await engine.fetchrow("SELECT * FROM kitrocket.studio_sessions")
        assert row is not None
        assert row["max_expiry_date"] - row["expiry_date"] >= timedelta(days=6)


async def test_two_studios_in_one_process_show_two_databases(
    engine: Engine, clock: ManualClock, server: Server, template: str
) -> None:
    await factories.make_user(engine, email="here@example.com")
    name = await server.direct.create(template=template)
    try:
        async with server.engine(name) as other:
            await factories.make_user(other, email="there@example.com")
            async with logged_in(make_kit(engine, clock)) as here, logged_in(make_kit(other, clock)) as there:
                shown = [(await client.get("/api/tables/users/")).json()["rows"] for client in (here, there)]
    finally:
        await server.direct.drop(name)
    assert [[row["email"] for row in rows] for rows in shown] == [["here@example.com"], ["there@example.com"]]


@pytest.mark.direct
async def test_while_the_database_is_away_it_says_503(server: Server, database: str, clock: ManualClock) -> None:
    proxy = Proxy(server)
    async with proxy.running(), logged_in(make_kit(Engine(proxy.url(database)), clock)) as client:
        await proxy.cut()
        assert (await client.get("/api/tables/users/")).status_code == 503
        assert (await client.get("/")).status_code == 200
        proxy.is_cut = False
        assert (await client.get("/api/tables/users/")).status_code == 200


async def test_staff_change_their_password(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        form = {"current_password": PASSWORD, "new_password": "a new one", "confirm_new_password": "a new one"}
        wrong = await client.post("/api/change-password/", json=form | {"current_password": "wrong"})
        assert wrong.status_code == 422
        assert (await client.post("/api/change-password/", json=form)).status_code == 303
        assert (await client.get("/api/user/")).status_code == 401
        login = {"username": STAFF, "password": "a new one"}
        assert (await client.post("/public/login/", json=login)).status_code == 200


async def test_no_page_frames_it_and_no_cache_keeps_a_row(engine: Engine, clock: ManualClock) -> None:
    async with logged_in(make_kit(engine, clock)) as client:
        for path in ("/", "/api/tables/users/"):
            headers = (await client.get(path)).headers
            assert (headers["x-frame-options"], headers["cache-control"]) == ("DENY", "no-store")
