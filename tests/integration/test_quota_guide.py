"""Every Python block of the page on quotas runs, in order, and says what it says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from factories import make_user
from kitrocket.engine import Engine
from kitrocket.usage import UsageService

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "quotas.md"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_blocks_of_the_page_on_quotas_run(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    usage = UsageService(engine)
    user_id = await make_user(engine)
    names: dict[str, object] = {"kit": SimpleNamespace(usage=usage), "user": SimpleNamespace(id=user_id)}
    blocks = re.findall(r"^```python fragment\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        code = compile(block, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, names)
        if inspect.isawaitable(running):
            await running
    said = capsys.readouterr().out
    assert "3166 " in said
    assert "never\ntrust\na\ncount\n0\n" in said
    assert f"{user_id} has used 80 % of 5000\n" in said
    assert await usage.total(user_id) == 1834 + 4 + 1834 + 900
