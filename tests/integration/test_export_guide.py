"""Every Python block of the page on billing usage runs, in order."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from dodo_server import DodoServer
from factories import make_subscription, make_usage, make_user
from kitrocket.clock import utc_now
from kitrocket.engine import Engine
from kitrocket.migrations import fill_outbox
from kitrocket.usage import UsageService

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_blocks_of_the_page_run(engine: Engine, dodo: DodoServer, capsys: pytest.CaptureFixture[str]) -> None:
    await fill_outbox(engine, on=True)
    user_id = await make_user(engine)
    await make_subscription(engine, user_id, dodo_customer_id="cus_1")
    for id in ("good", "bad"):
        await make_usage(engine, user_id, id=id, at=utc_now())
    dodo.dislikes = lambda event: event["event_id"] == "bad"
    usage = UsageService(engine, export_event="tokens.used", api_key="key", base_url=dodo.url)
    names: dict[str, object] = {"kit": SimpleNamespace(usage=usage)}
    blocks = re.findall(r"^```python fragment\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        running = eval(compile(block, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.isawaitable(running):
            await running
    assert capsys.readouterr().out.splitlines() == ["1 1 0 0", "0 0 1 None", "bad HTTP 422"]
