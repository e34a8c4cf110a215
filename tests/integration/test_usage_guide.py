"""Every Python block of the page on usage runs, in order, and says what it says."""

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

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "usage.md"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_blocks_of_the_page_run(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    usage = UsageService(engine)
    names: dict[str, object] = {
        "kit": SimpleNamespace(usage=usage, transaction=engine.transaction),
        "user": SimpleNamespace(id=await make_user(engine)),
    }
    blocks = re.findall(r"^```python fragment\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 10
    for block in blocks:
        code = compile(block, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, names)
        if inspect.isawaitable(running):
            await running
    assert names["total"] == names["sonnet"] == 1834 + 512 + 20 + 30 + 100
    assert "2 1" in capsys.readouterr().out
