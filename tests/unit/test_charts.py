"""What a report draws: names of others stay names, bars begin at zero and are as long as their values."""

from __future__ import annotations

import re
from decimal import Decimal
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitrocket.cli.charts import Panel, compact, svg, ticks
from kitrocket.cli.writing import cell, letters, printable, shortened

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    "\x1b[31mred",
    "[bold]x[/bold]",
    "\u202etxt.exe",
    "a&b\"'",
    "x" * 255,
    "模" * 90,
]


def panel(labels: list[str], values: list[int | Decimal], *, is_time: bool = False) -> Panel:
    return Panel("Tokens & more", "tokens", labels, values, [f"{value:,}" for value in values], is_time)


def bars(picture: str) -> list[tuple[float, float]]:
    """The width and height of each bar."""
    root = ElementTree.fromstring(picture)
    return [
        (float(one.attrib["width"]), float(one.attrib["height"]))
        for one in root.iter(f"{SVG}rect")
        if one.attrib.get("class") == "bar"
    ]


def words(picture: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("is_time", [True, False])
def test_hostile_names_stay_text(is_time: bool) -> None:
    picture = svg([panel(HOSTILE, [3] * len(HOSTILE), is_time=is_time)])
    root = ElementTree.fromstring(picture)
    tags = {one.tag.removeprefix(SVG) for one in root.iter()}
    assert tags <= {"svg", "g", "title", "style", "rect", "text", "line"}
    assert not [one for one in picture if not (one.isprintable() or one == "\n")]
    tips = " ".join(one.text or "" for one in root.iter(f"{SVG}title"))
    for name in ("<script>alert(1)</script>", r"\x1b[31mred", "[bold]x[/bold]", r"\u202etxt.exe", "a&b\"'", "x" * 255):
        assert name in tips


def test_lying_bars_are_as_long_as_their_values_from_zero() -> None:
    picture = svg([panel(["a", "b", "c", "d"], [4_000, 2_000, 0, 1])])
    [(a, _), (b, _), (d, _)] = bars(picture)
    assert a == pytest.approx(2 * b)
    assert d == pytest.approx(a / 4000, abs=0.01)
    assert {"0", "4,000", "tokens", "Tokens & more", "c", "1"} <= set(words(picture))


def test_columns_are_as_high_as_their_values_and_fit() -> None:
    picture = svg(
        [panel([f"2026-03-{day:02}" for day in range(1, 31)], [10**13 + day for day in range(30)], is_time=True)]
    )
    found = bars(picture)
    assert len(found) == 30
    assert max(height for _, height in found) <= 200
    assert {"0", "10T", "2026-03-01"} <= set(words(picture))
    assert len([word for word in words(picture) if word.startswith("2026")]) <= 12


@pytest.mark.parametrize("count", [1, 10_000])
def test_one_bucket_and_ten_thousand(count: int) -> None:
    picture = svg([panel(["2026-03-01 00:00"] * count, [Decimal("0.0001")] * count, is_time=True)])
    found = bars(picture)
    assert len(found) == count
    assert sum(width for width, _ in found) < 900
    assert len([word for word in words(picture) if word.startswith("2026")]) <= 10


@pytest.mark.parametrize("panels", [[panel([], [])], [panel(["a"], [0], is_time=True)]])
def test_nothing_is_said(panels: list[Panel]) -> None:
    assert "nothing in this window" in words(svg(panels))


@given(st.floats(1e-10, 1e20))
def test_ticks_are_round_and_reach_over_the_largest(largest: float) -> None:
    marks = ticks(largest)
    assert marks[0] == 0
    assert marks[-1] >= largest * (1 - 1e-8)
    assert marks[-2] < largest
    assert 2 <= len(marks) <= 6
    step = f"{marks[1]:.6e}"
    assert re.match(r"^(1|2|2\.5|5)0*(\.0*)?0*e", step)


def test_an_axis_is_short() -> None:
    shown = {
        0: "0",
        0.0025: "0.0025",
        12.5: "12.5",
        1500: "1,500",
        20_000: "20k",
        2.5e6: "2.5M",
        1e13: "10T",
        2e16: "20,000T",
    }
    assert {value: compact(value) for value in shown} == shown


def test_what_does_not_print_is_spelled_out() -> None:
    assert printable("a\x1b[0m\n\x9b\u202e\u200b\ud800\U000e0001 b") == r"a\x1b[0m\n\x9b\u202e\u200b\ud800\U000e0001 b"
    assert printable("gpt-4o שלום 模型") == "gpt-4o שלום 模型"


@given(st.text(max_size=60), st.integers(4, 30))
def test_a_name_is_cut_to_what_fits(name: str, width: int) -> None:
    cut = shortened(name, width)
    assert letters(cut) <= max(width, 0)
    if letters(printable(name)) <= width:
        assert cut == printable(name)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", " =1", "\t=1"])
def test_no_cell_is_a_formula(name: str) -> None:
    assert cell(name)[0] in "'\\"
    assert cell("gpt-4=o") == "gpt-4=o"
