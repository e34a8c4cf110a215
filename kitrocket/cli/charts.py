"""Bar charts as SVG, written by hand: a few rectangles and labels need no library.

A picture is one or several panels below one another. Everything that came from outside is escaped, and what does not
print is spelled out; a name that is too long is cut, and whole in the tooltip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from html import escape
from math import ceil, floor, log10

from kitrocket.cli.writing import printable, shortened

_WIDTH = 900
_RIGHT, _TOP, _BOTTOM = 24, 58, 46
#: Of a panel of columns: its plot's height and left edge. Of one of bars: the height of a bar, and where bars begin.
_PLOT, _LEFT = 200, 84
_ROW, _NAMES, _VALUES = 24, 250, 150
#: How many letters of a name fit.
_LETTERS = 32
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333;unicode-bidi:isolate}"
    ".title{font-weight:600;font-size:15px;fill:#111}.axis{fill:#666;font-size:11px}.bar{fill:#2f6f9f}.grid{stroke:#e3e3e3}.zero{stroke:#777}"
)


@dataclass(frozen=True)
class Panel:
    """A chart of its own: a value, not negative, for each label, and how it reads. ``unit`` is what the values count.

    Upright columns where ``is_time`` says that the labels follow one another, else lying bars.
    """

    title: str
    unit: str
    labels: Sequence[str]
    values: Sequence[int | Decimal]
    texts: Sequence[str]
    is_time: bool


def svg(panels: Sequence[Panel]) -> str:
    """Return a picture of the panels, an SVG document."""
    drawn, top = [], 0
    for panel in panels:
        height, lines = (_columns if panel.is_time else _bars)(panel) if any(panel.values) else _nothing(panel)
        drawn.append(f'<g transform="translate(0 {top})">{"".join(lines)}</g>')
        top += height
    about = escape("; ".join(printable(panel.title) for panel in panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}" '
        f'role="img" aria-label="{about}"><title>{about}</title><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{top}" fill="#fff"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def compact(value: float | Decimal) -> str:
    """Return a number as an axis shows it: 0, 0.25, 1,500, 20k, 1.5M, 10T."""
    for size, letter in _UNITS:
        if value >= size and (size > 10**3 or value >= 10**4):
            return f"{float(value) / size:.4g}{letter}" if value < 10**15 else f"{float(value) / size:,.0f}{letter}"
    return f"{float(value):,.4g}" if value < 1000 else f"{float(value):,.0f}"


def ticks(largest: float) -> list[float]:
    """Return two to six evenly spaced round numbers, from 0 to one that is not below ``largest``, which is positive."""
    power = 10.0 ** floor(log10(largest / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power * 5 >= largest)
    return [number * step for number in range(ceil(largest / step - 1e-9) + 1)]


def _columns(panel: Panel) -> tuple[int, list[str]]:
    scale = _scale(panel)
    across, bottom = _WIDTH - _LEFT - _RIGHT, _TOP + _PLOT
    slot = across / len(panel.values)
    every = ceil(len(panel.values) / max(1, across // (8 * max(map(len, panel.labels)))))
    lines = list(_head(panel))
    for mark in scale:
        y = bottom - _PLOT * mark / scale[-1]
        lines.append(_line(mark, _LEFT, y, _WIDTH - _RIGHT, y))
        lines.append(_text(_LEFT - 8, y + 4, compact(mark), anchor="end", kind="axis"))
    for number, (label, value, text) in enumerate(zip(panel.labels, panel.values, panel.texts, strict=True)):
        x, tall = _LEFT + number * slot, _PLOT * float(value) / scale[-1]
        wide = min(max(slot * 0.8, slot - 4), 80.0)
        if value:
            lines.append(_rect(x + (slot - wide) / 2, bottom - tall, wide, tall, f"{label}: {text}"))
        if number % every == 0:
            lines.append(_text(x + slot / 2, bottom + 18, label, anchor="middle", kind="axis"))
    return bottom + _BOTTOM, lines


def _bars(panel: Panel) -> tuple[int, list[str]]:
    scale = _scale(panel)
    across, bottom = _WIDTH - _NAMES - _VALUES, _TOP + _ROW * len(panel.values)
    lines = list(_head(panel))
    for mark in scale:
        x = _NAMES + across * mark / scale[-1]
        lines.append(
            f'<line class="{"grid" if mark else "zero"}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        )
        lines.append(_text(x, bottom + 18, compact(mark), anchor="middle", kind="axis"))
    for number, (label, value, text) in enumerate(zip(panel.labels, panel.values, panel.texts, strict=True)):
        y, wide = _TOP + number * _ROW, across * float(value) / scale[-1]
        name = printable(label)
        # An <svg> of its own clips whatever a font makes of the name.
        lines.append(
            f'<svg y="{y}" width="{_NAMES - 10}" height="{_ROW}"><title>{escape(name)}</title>'
            f"{_text(_NAMES - 10, 16, shortened(name, _LETTERS), anchor='end')}</svg>"
        )
        if value:
            lines.append(_rect(_NAMES, y + 4, wide, _ROW - 8, f"{label}: {text}"))
        lines.append(_text(_NAMES + wide + 6, y + 16, text, anchor="start"))
    return bottom + _BOTTOM, lines


def _nothing(panel: Panel) -> tuple[int, list[str]]:
    return 110, [*_head(panel), _text(_WIDTH / 2, 78, "nothing in this window", anchor="middle")]


def _head(panel: Panel) -> Iterator[str]:
    yield _text(16, 26, panel.title, anchor="start", kind="title")
    yield _text(16, 44, panel.unit, anchor="start", kind="axis")


def _scale(panel: Panel) -> list[float]:
    return ticks(float(max(panel.values)))


def _rect(x: float, y: float, width: float, height: float, tip: str) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="bar" {place}><title>{escape(printable(tip))}</title></rect>'


def _line(mark: float, x1: float, y1: float, x2: float, y2: float) -> str:
    kind = "grid" if mark else "zero"
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, *, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(printable(words))}</text>'
