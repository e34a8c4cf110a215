"""The fragments of the pages on users, sessions and webhooks run, in order, and say what the pages say."""

from __future__ import annotations

import ast
import inspect
import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from dodo_server import DodoServer
from factories import make_user
from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings
from kitrocket.testing import ManualClock, sign_webhook

pytestmark = pytest.mark.asyncio

GUIDES = Path(__file__).parents[2] / "docs" / "how-to"
KEY = "whsec_" + "a2l0cm9ja2V0" * 3


async def run_page(page: str, names: dict[str, Any]) -> None:
    """Run the fragments of a page one after another, in one set of names."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    for fragment in re.findall(r"^```python fragment\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        code = compile(fragment, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, names)
        if inspect.isawaitable(running):
            await running


async def test_the_page_on_users(engine: Engine, clock: ManualClock) -> None:
    settings = Settings(secret="s" * 32)

    def ticking() -> datetime:
        return clock.advance(timedelta(milliseconds=1))  # rows made one after another have an order

    names: dict[str, Any] = {"kit": KitRocket(settings, engine=engine, clock=ticking, background=False)}
    await run_page("users.md", names)
    assert (names["user"].email, names["user"].email_verified) == ("lovelace@example.com", None)
    assert names["found"].outcome == "created"
    assert names["both"].subscription is None
    assert names["account"].provider == "github"
    assert (names["gone"].sessions, names["gone"].accounts) == (0, 1)


async def test_the_page_on_sessions(engine: Engine, clock: ManualClock) -> None:
    kit = KitRocket(Settings(), engine=engine, clock=clock, background=False)
    user = await kit.users.create(email="ada@example.com", name="Ada", password="correct horse")
    names: dict[str, Any] = {"kit": kit, "user": user}
    await run_page("sessions.md", names)
    response = Response()
    names["set_cookie"](response, names["token"])
    cookie = response.headers["set-cookie"]
    assert "Max-Age=604800" in cookie
    assert all(word in cookie for word in ("HttpOnly", "Secure", "SameSite=Lax", "Path=/"))
    assert names["others"] == 0
    assert names["swept"].deleted == 0


async def test_the_page_on_webhooks(engine: Engine, clock: ManualClock, dodo: DodoServer) -> None:
    settings = Settings(
        dodo_payments_webhook_key=[KEY],
        dodo_products={"pdt_pro": "pro"},
        dodo_payments_api_key="key",
        dodo_payments_base_url=dodo.url,
    )
    kit = KitRocket(settings, engine=engine, clock=clock, background=False)
    user_id = await make_user(engine)
    event = {
        "type": "subscription.active",
        "timestamp": clock().isoformat(),
        "data": {
            "subscription_id": "sub_1",
            "status": "active",
            "product_id": "pdt_pro",
            "customer": {"customer_id": "cus_1"},
            "metadata": {"kitrocket_user_id": user_id},
        },
    }
    body = json.dumps(event).encode()
    headers = sign_webhook(body, key=KEY, webhook_id="msg_1", at=clock())
    names: dict[str, Any] = {"kit": kit, "user": await kit.users.get(user_id), "body": body, "headers": headers}
    await run_page("webhooks.md", names)
    assert names["receipt"].outcome == "applied"
    assert names["retried"].tried == 0
    assert names["again"].outcome == "applied"
    assert (names["access"].allowed, names["access"].plan, names["access"].reason) == (True, "pro", "active")
    assert await names["answer"](body, headers) == (200, {"outcome": "duplicate"})
    assert await names["answer"](body, {}) == (401, {"error": "missing_header"})
