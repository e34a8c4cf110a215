"""The application of the tutorial does what the tutorial says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from kitrocket.engine import Engine
from kitrocket.kit import KitRocket
from kitrocket.settings import Settings

pytestmark = pytest.mark.asyncio

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
ADA = {"email": "Ada@Example.com", "name": "Ada", "password": "correct horse"}


@pytest.fixture
def app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Starlette:
    monkeypatch.setattr(
        "kitrocket.KitRocket",
        lambda: KitRocket(Settings(), engine=Engine(database_url), background=False),
    )
    programs = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (program,) = (one for one in programs if "app = Starlette(" in one)
    names: dict[str, object] = {"__name__": "app"}
    exec(compile(program, "app.py", "exec"), names)
    made = names["app"]
    assert isinstance(made, Starlette)
    return made


@asynccontextmanager
async def talking_to(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        yield client


async def test_sign_up_sign_in_ask_and_sign_out(app: Starlette) -> None:
    async with talking_to(app) as client:
        assert (await client.get("/me")).status_code == 401
        assert (await client.post("/sign-up", json=ADA)).status_code == 201
        assert (await client.post("/sign-up", json=ADA)).status_code == 409
        assert (await client.post("/sign-in", json=ADA | {"password": "wrong"})).status_code == 401
        assert (await client.post("/sign-in", json=ADA)).json().keys() == {"until"}
        assert (await client.post("/ask")).json() == {"tokens": 1834}
        assert (await client.get("/me")).json() == {"name": "Ada", "plan": None, "tokens": 1834}
        token = client.cookies["session"]
        assert (await client.post("/sign-out")).status_code == 200
        assert "session" not in client.cookies
        client.cookies["session"] = token
        assert (await client.get("/me")).status_code == 401


async def test_it_refuses_bad_input(app: Starlette) -> None:
    async with talking_to(app) as client:
        assert (await client.post("/sign-up", content=b"\xff")).json() == {"error": "body"}
        assert (await client.post("/sign-up", json=ADA | {"email": "nobody"})).json() == {"error": "email"}
        assert (await client.post("/sign-in", json=[])).status_code == 400


async def test_it_has_the_route_of_webhooks(app: Starlette) -> None:
    async with talking_to(app) as client:
        assert (await client.post("/webhooks/dodo", content=b"{}")).json() == {"error": "no_key"}
