"""How a command that lasts shows how far it is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import anyio
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from kitrocket.cli.running import remarks

#: How often a line is printed where there is no terminal, in seconds.
_EVERY = 10.0


class _Rate(ProgressColumn):
    """Items a second, as the last half minute had them."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of ``what``: call what the block gets with the number that is done so far.

    It goes to standard error: on a terminal a bar with the rate and an estimate of the time that is left, elsewhere a
    plain line every ten seconds.
    """
    if not remarks.is_terminal:
        yield _lines(what, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=remarks) as bar:
        task = bar.add_task(what, total=total)
        # More may have come up than there was at first.
        yield lambda done: bar.update(task, completed=done, total=max(done, total))


def _lines(what: str, total: int) -> Callable[[int], None]:
    began = shown = anyio.current_time()

    def report(done: int) -> None:
        nonlocal shown
        now = anyio.current_time()
        if now - shown < _EVERY:
            return
        shown = now
        rate = done / (now - began)
        left = timedelta(seconds=round(max(total - done, 0) / rate))
        remarks.print(f"{what}: {done:,} of {max(done, total):,}, {rate:,.0f}/s, about {left} left")

    return report
