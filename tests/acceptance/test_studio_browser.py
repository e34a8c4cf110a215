"""The Studio in a real browser: log in, open each table, save forms.

``KITROCKET_SCREENSHOT`` names a file to save a picture to.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

import factories
from delivering import PAYLOADS, PRODUCTS, Desk, anonymous
from factories import AT
from kitrocket.admin import create_staff
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.tables import OWN_TABLES, SEED_TABLES
from kitrocket.testing import ManualClock
from serving import PASSWORD, STAFF, served

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Names, plans and statuses, the newest first.
PEOPLE = [
    ("Ada Lovelace", "pro", "active"),
    ("Grace Hopper", "pro", "trialing"),
    ("Annie Easley", "starter", "active"),
    ("Radia Perlman", "pro", "past_due"),
    ("Hedy Lamarr", "starter", "cancelled"),
    ("Karen Jones", "pro", "active"),
    ("Mary Jackson", "starter", "active"),
    ("Barbara Liskov", "pro", "active"),
    ("Frances Allen", "starter", "trialing"),
    ("Shafi Goldwasser", "pro", "active"),
]
#: Playwright gives a page five seconds.
expect.set_options(timeout=30_000)
TABLES = [table._meta.tablename for table in (*SEED_TABLES, *OWN_TABLES)]

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.browser,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:If running sessions in production"),
]


@pytest.fixture(scope="module", autouse=True)
def chromium() -> None:
    """Debian's chromium; where it is missing the tests are skipped, and in CI they fail."""
    if not Path(CHROMIUM).exists():
        missing = f"{CHROMIUM} is missing: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def browser(chromium: None) -> AsyncIterator[Browser]:
    """The browser, started once."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def studio(browser: Browser, kit: KitRocket) -> AsyncIterator[tuple[Page, str]]:
    """A page of the browser, logged in to the Studio, and the Studio's address."""
    async with served(kit, studio=True) as address:
        await create_staff(kit.engine, STAFF, PASSWORD)
        page = await browser.new_page(viewport={"width": 1480, "height": 760})
        try:
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            await page.goto(f"{address}/admin/")
            await page.fill("input[name=username]", STAFF)
            await page.fill("input[name=password]", PASSWORD)
            await page.click("button")
            await expect(page.get_by_text("users", exact=True).first).to_be_visible()
            yield page, f"{address}/admin/#"
            assert problems == []
        finally:
            await page.close()


async def fill(engine: Engine) -> None:
    for number, (name, plan, status) in enumerate(PEOPLE):
        at = AT - timedelta(days=number, microseconds=123)
        email = name.lower().replace(" ", ".") + "@example.com"
        user = await factories.make_user(engine, id=f"user_{number}", email=email, name=name, at=at)
        await factories.make_account(
            engine,
            user,
            id=f"account_{number}",
            access_token="the access token",
            refresh_token="the refresh token",
            password="the hash",
            expires_at=at,
            at=at,
        )
        await factories.make_session(engine, user, at=at)
        await engine.fetch(
            "INSERT INTO subscriptions (id, user_id, plan, status, current_period_end, created_at, updated_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, $6)",
            f"subscription_{number}",
            user,
            plan,
            status,
            (AT - timedelta(days=number - 30)).replace(tzinfo=None),
            (AT - timedelta(days=number)).replace(tzinfo=None),
        )


async def save(page: Page) -> None:
    """Press SAVE and wait for the server's answer."""
    async with page.expect_response(lambda answer: answer.request.method == "PATCH"):
        await page.get_by_role("button", name="Save").click()


async def test_each_table_opens(browser: Browser, engine: Engine, clock: ManualClock) -> None:
    await fill(engine)
    kit = KitRocket(Settings(), engine=engine, clock=clock, background=False)
    async with studio(browser, kit) as (page, _):
        for table in TABLES:
            await page.locator(f"a[href='#/{table}/']").click()
            await expect(page.get_by_role("heading", name=table.replace("_", " "), exact=True)).to_be_visible()
            if table in ("users", "accounts", "sessions", "subscriptions"):
                # Piccolo Admin mixes up the order of two tables when one is asked for before the last has come.
                await page.reload()
                addresses = page.locator("table").get_by_text("@example.com")
                await expect(addresses).to_have_count(len(PEOPLE))
                await expect(addresses.first).to_have_text("ada.lovelace@example.com")
            for secret in ("the access token", "the refresh token", "the hash"):
                await expect(page.get_by_text(secret)).to_have_count(0)
        await page.locator("a[href='#/subscriptions/']").click()
        await expect(page.locator("table").get_by_text("past_due")).to_be_visible()
        if picture := os.environ.get("KITROCKET_SCREENSHOT"):
            await page.screenshot(path=picture)


async def test_saving_a_user_changes_what_was_edited(browser: Browser, engine: Engine, clock: ManualClock) -> None:
    await fill(engine)
    before = dict(await engine.fetchrow("SELECT * FROM users WHERE id = 'user_0'") or {})
    kit = KitRocket(Settings(), engine=engine, clock=clock, background=False)
    async with studio(browser, kit) as (page, address):
        await page.goto(f"{address}/users/user_0")
        await expect(page.locator("textarea[name=email]").first).to_have_value("ada.lovelace@example.com")
        await page.locator("textarea[name=name]").first.fill("Augusta Ada King")
        await save(page)
    after = dict(await engine.fetchrow("SELECT * FROM users WHERE id = 'user_0'") or {})
    assert after == before | {"name": "Augusta Ada King", "updated_at": clock.now.replace(tzinfo=None)}


async def test_saving_an_account_keeps_its_secrets(browser: Browser, engine: Engine, clock: ManualClock) -> None:
    await fill(engine)
    before = dict(await engine.fetchrow("SELECT * FROM accounts WHERE id = 'account_0'") or {})
    kit = KitRocket(Settings(studio_allow_writes=True), engine=engine, clock=clock, background=False)
    async with studio(browser, kit) as (page, address):
        await page.goto(f"{address}/accounts/account_0")
        await expect(page.locator("textarea[name=provider]").first).to_have_value("github")
        await page.locator("textarea[name=provider]").first.fill("gitlab")
        await save(page)
    after = dict(await engine.fetchrow("SELECT * FROM accounts WHERE id = 'account_0'") or {})
    assert after == before | {"provider": "gitlab"}


async def test_a_read_only_form_says_so_and_changes_nothing(
    browser: Browser, engine: Engine, clock: ManualClock
) -> None:
    await fill(engine)
    before = await engine.fetch("SELECT * FROM accounts")
    kit = KitRocket(Settings(), engine=engine, clock=clock, background=False)
    async with studio(browser, kit) as (page, address):
        await page.goto(f"{address}/accounts/account_0")
        await expect(page.locator("textarea[name=provider]").first).to_have_value("github")
        await page.locator("textarea[name=provider]").first.fill("gitlab")
        await save(page)
        await expect(page.get_by_text("KITROCKET_STUDIO_ALLOW_WRITES")).to_be_visible()
    assert await engine.fetch("SELECT * FROM accounts") == before


async def test_an_address_that_is_taken_is_refused_in_words(
    browser: Browser, engine: Engine, clock: ManualClock
) -> None:
    await fill(engine)
    kit = KitRocket(Settings(), engine=engine, clock=clock, background=False)
    async with studio(browser, kit) as (page, address):
        await page.goto(f"{address}/users/user_0")
        await expect(page.locator("textarea[name=email]").first).to_have_value("ada.lovelace@example.com")
        await page.locator("textarea[name=email]").first.fill("grace.hopper@example.com")
        await save(page)
        await expect(page.get_by_text("another user already has this e-mail address")).to_be_visible()


async def open_form(page: Page, address: str, name: str) -> None:
    await page.goto(f"{address}/")
    await page.get_by_role("link", name=name).click()
    await expect(page.get_by_role("heading", name=name)).to_be_visible()


async def submit(page: Page, answer: str) -> None:
    await page.get_by_role("button", name="Submit").click()
    await expect(page.get_by_text(answer)).to_be_visible()


async def test_who_is_on_call_finds_a_parked_webhook_and_repairs_it(
    browser: Browser, engine: Engine, clock: ManualClock
) -> None:
    kit = KitRocket(Settings(dodo_products=PRODUCTS), engine=engine, clock=clock, background=False)
    desk = Desk(engine, clock)
    assert await desk.deliver(anonymous("02"), "msg_parked") == "parked"
    assert await desk.deliver(PAYLOADS["12"], "msg_other") == "ignored"
    mail = PAYLOADS["02"]["data"]["customer"]["email"]
    async with studio(browser, kit) as (page, address):
        await page.locator("a[href='#/webhook_events/']").click()
        parked = page.get_by_role("row").filter(has_text="msg_parked")
        for text in ("subscription.renewed", "parked", "no_user"):
            await expect(parked.get_by_text(text, exact=True)).to_be_in_viewport()
        await expect(page.get_by_text(mail)).to_have_count(0)

        await page.locator("a[href='#/users/']").click()
        # The defaults come last, and take the place of what was typed.
        async with page.expect_response(lambda answer: answer.url.endswith("/users/new/")):
            await page.get_by_text("Add Row").click()
        await expect(page.locator("input[name=created_at]")).not_to_have_value("")
        await page.locator("textarea[name=email]").first.fill(mail)
        await page.locator("textarea[name=name]").first.fill("Maya")
        await page.locator("input[type=datetime-local]").first.fill("2026-03-01T10:00:00")
        async with page.expect_response(lambda answer: answer.request.method == "POST") as made:
            await page.get_by_role("button", name="Create").click()
        assert (await made.value).status == 201

        await open_form(page, address, "Replay a webhook")
        await page.locator("input[name=webhook_id]").fill("msg_unknown")
        await submit(page, "msg_unknown")
        await page.locator("input[name=webhook_id]").fill("msg_parked")
        await submit(page, "msg_parked: applied.")
        await open_form(page, address, "Retry parked webhooks")
        await submit(page, "Tried 0: 0 finished, 0 given up.")
        await page.goto(f"{address}/")
        await page.locator("a[href='#/webhook_events/']").click()
        await expect(parked.get_by_text("applied", exact=True)).to_be_in_viewport()
    user = await kit.users.get_by_email(mail)
    assert user is not None
    assert (await kit.subscriptions.access(user.id)).allowed
