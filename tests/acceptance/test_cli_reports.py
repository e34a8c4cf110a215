"""``kitrocket usage report`` and ``kitrocket usage prices``: what is printed and what is written."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anyio
import pytest

from factories import make_subscription, make_usage, make_user
from kitrocket.clock import utc_now
from kitrocket.engine import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.direct]

MARCH = datetime(2026, 3, 1, tzinfo=UTC)
WINDOW = ("--since", "2026-03-01", "--until", "2026-04-01")
HOSTILE = "=<b>\x1b[bold]:smile:\u202e"
SPELLED = "=<b>\\x1b[bold]:smile:\\u202e"


async def kitrocket(*arguments: str, url: str, **environment: str) -> tuple[int, str, str]:
    done = await anyio.run_process(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", "usage", *arguments],
        env=os.environ | {"DATABASE_URL": url, "COLUMNS": "100"} | environment,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def record(engine: Engine) -> None:
    """On 1 March Ada's 9 x 10^12 + 9 tokens in calls of 2,147,483,647 or less; on the 3rd her and Bob's few."""
    for user in ("ada", "bob"):
        await make_user(engine, id=user)
    await engine.fetch(
        "INSERT INTO usage (id, user_id, tokens_used, model, created_at)"
        " SELECT 'g' || n, 'ada', 1000000000, 'big', '2026-03-01' FROM generate_series(1, 9000) n"
    )
    await make_usage(engine, "ada", tokens=9, model="big", at=MARCH)
    await make_usage(engine, "ada", tokens=1, model=HOSTILE, at=MARCH + timedelta(days=2, hours=1))
    await make_usage(engine, "bob", tokens=2, model="small", at=MARCH + timedelta(days=2, hours=23))


async def test_a_report_is_tables_charts_and_files(engine: Engine, database_url: str, tmp_path: Path) -> None:
    await record(engine)
    prices = tmp_path / "prices.toml"
    prices.write_text('[[prices]]\nmodel = "big"\nper_million = 0.1\nvalid_from = 2026-01-01\n')
    code, out, err = await kitrocket("prices", "load", str(prices), url=database_url)
    assert (code, out, err) == (0, "1 price(s) added, 0 changed, 0 were so already.\n", "")
    names = [tmp_path / f"report.{ending}" for ending in ("csv", "json", "svg")]
    files = [part for name in names for part in (f"--{name.suffix[1:].replace('svg', 'plot')}", str(name))]
    code, out, err = await kitrocket("report", *WINDOW, "--cost", *files, url=database_url)
    assert code == 0, err
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert re.search(r"2026-03-01 +█+ +9,000,000,000,009 +9,001 +900,000.0000 *\n", out)
    assert re.search(r"2026-03-02 +0 +0 +0.0000 *\n", out)
    assert re.search(re.escape(SPELLED) + r" +1 +1 +no price\* *\n", out)
    assert re.search(r"bob +2 +1 +no price\* *\n", out)
    assert out.count("9,000,000,000,012") == 3
    assert "Not complete: 3 token(s), marked *, have no price in USD. Models: " in err
    check_csv(names[0])
    check_json(json.loads(names[1].read_text()))
    check_svg(names[2])


def check_csv(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "by", "start", "end", "day", "user_id", "model", "tokens", "calls", "cost", "currency", "unpriced_tokens"
    ]  # fmt: skip
    assert [row["by"] for row in rows] == ["day"] * 2 + ["model"] * 3 + ["user"] * 2
    assert rows[0] == {
        "by": "day", "start": "2026-03-01T00:00:00+00:00", "end": "2026-03-02T00:00:00+00:00", "day": "2026-03-01",
        "user_id": "", "model": "", "tokens": "9000000000009", "calls": "9001", "cost": "900000.0000009",
        "currency": "USD", "unpriced_tokens": "0",
    }  # fmt: skip
    assert f"'{SPELLED}" in {row["model"] for row in rows}


def check_json(found: dict[str, Any]) -> None:
    assert (found["tokens"], found["calls"], found["cost"]) == (9_000_000_000_012, 9_003, "900000.0000009")
    assert (found["since"], found["tz"], found["complete"]) == ("2026-03-01T00:00:00+00:00", "UTC", False)
    assert [section["by"] for section in found["sections"]] == ["day", "model", "user"]
    model = found["sections"][1]["lines"]
    assert [line["model"] for line in model] == ["big", "small", HOSTILE]
    assert (model[0]["tokens"], model[0]["cost"], model[1]["unpriced_tokens"]) == (
        9_000_000_000_009,
        "900000.0000009",
        2,
    )


def check_svg(path: Path) -> None:
    words = [one.text for one in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Cost by day (UTC)", "Cost by model", "Cost by user", "2026-03-01", "0", SPELLED, "no price*"} <= set(words)


async def test_a_report_of_one_user_in_a_zone(engine: Engine, database_url: str) -> None:
    await record(engine)
    now = utc_now()
    await make_subscription(engine, "bob", current_period_end=now + timedelta(days=3))
    await make_usage(engine, "bob", tokens=77, model="small", at=now)
    results = {}

    async def run(name: str, *arguments: str, **environment: str) -> None:
        results[name] = await kitrocket("report", *arguments, url=database_url, **environment)

    async with anyio.create_task_group() as group:
        group.start_soon(run, "zone", "--user", "bob", "--by", "day", *WINDOW, "--tz", "Asia/Tokyo")
        group.start_soon(run, "billing", "bob", "--period", "billing", "--by", "month", "--by", "model")
        group.start_soon(run, "nothing", "nobody")
    code, out, _ = results["zone"]
    assert code == 0
    assert re.search(r"2026-03-04 +█+ +2 +1 *\n", out)
    assert "Tokens of bob by day (Asia/Tokyo)" in out
    code, out, _ = results["billing"]
    assert code == 0
    assert re.search(rf"{now:%Y-%m} +█+ +77 +1 *\n", out)
    assert re.search(r"small +█+ +77 +1 *\n", out)
    code, out, err = results["nothing"]
    assert (code, err) == (0, "")
    assert re.search(r"total +0 +0 *\n", out)


MISTAKES = [
    (("--plot", "chart.png"), 2, ".svg"),
    (("ada", "--user", "bob"), 2, "--user"),
    (("--since", "yesterday"), 1, "since"),
    (("--since", "2026-03-02", "--until", "2026-03-01"), 1, "since"),
    (("--period", "billing"), 1, "period"),
    (("--period", "month", "--since", "2026-03-01"), 1, "period"),
    (("--csv", "no/such/folder.csv"), 1, "cannot be written"),
    (("--currency", "dollars"), 1, "currency"),
]
#: All of them in one process: most of a command's time is its imports.
SEVERAL = """
import sys
from kitrocket.cli import main
for line in sys.stdin:
    sys.argv = ["kitrocket", "usage", "report", *line.split()]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    print(f"code {code}".replace("kitrocket: ", "1 "), file=sys.stderr, end="\\0")
"""


async def test_a_mistake_is_told(database_url: str, tmp_path: Path) -> None:
    done = await anyio.run_process(
        [sys.executable, "-c", SEVERAL],
        input="\n".join(" ".join(arguments) for arguments, _, _ in MISTAKES).encode(),
        env=os.environ | {"DATABASE_URL": database_url},
        cwd=tmp_path,
        check=False,
    )
    told = done.stderr.decode().split("\0")
    assert len(told) == len(MISTAKES) + 1
    for (arguments, code, word), err in zip(MISTAKES, told, strict=False):
        assert f"code {code}" in err, arguments
        assert word in err, arguments
        assert "Traceback" not in err, arguments
