"""The fragments of the page on prices run, in order, and say what the page says."""

from __future__ import annotations

import ast
import inspect
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from factories import make_usage, make_user
from kitrocket.engine import Engine
from kitrocket.usage import UsageService

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "prices.md"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_blocks_of_the_page_run(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    [file] = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "prices.toml").write_text(file)
    monkeypatch.chdir(tmp_path)
    usage, user = UsageService(engine), await make_user(engine)
    for day in (10, 11):
        await make_usage(engine, user, tokens=1_000_000, at=datetime(2026, 3, day, tzinfo=UTC))
    names: dict[str, Any] = {"kit": SimpleNamespace(usage=usage), "user": SimpleNamespace(id=user)}
    blocks = re.findall(r"^```python fragment\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    totals = []
    for block in blocks:
        running = eval(compile(block, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.isawaitable(running):
            await running
        if "report" in names:
            totals.append(names["report"].total)
    assert totals[0] == Decimal("16.50")
    assert [str(line.day) for line in names["invoice"].lines] == ["2026-03-10", "2026-03-11"]
    said = capsys.readouterr().out
    for words in ("2026-03-11 7.5 USD", "2 0 0", "16.50 USD", "('a-model-of-tomorrow',) 700"):
        assert words in said
