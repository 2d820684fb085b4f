"""What the command line prints: the door to rich.

Decides the two looks of everything: redrawn and coloured on a terminal, plain lines elsewhere (a log, a pipe, a test).
Leaves what is said to the commands. Results go to stdout; progress, errors and advice to stderr.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_INTERVAL_S = 10.0


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (stdout where none is named) is a terminal that can be redrawn."""
    return (stream or sys.stdout).isatty()


def print_json(value: Any) -> None:
    """``value`` as one indented JSON object on stdout; a number that JSON cannot say becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """``rows`` under ``columns`` on stdout: framed on a terminal, aligned plain lines elsewhere."""
    cells = [[str(cell) for cell in row] for row in rows]
    if is_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        framed = Table(*columns, title=title)
        for row in cells:
            framed.add_row(*(Text(cell) for cell in row))
        Console().print(framed)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    sys.stdout.write(f"{title}\n" if title else "")
    for line in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


class Advance(Protocol):
    def __call__(self, amount: int = 1, /, note: str = "") -> None:
        """``amount`` more of the total is done; ``note`` is what is worth saying beside it now."""
        ...


def progress(total: int, unit: str, what: str = "") -> AbstractContextManager[Advance]:
    """Progress towards ``total`` units on stderr; the context gives the function to call as work is done."""
    return _bar(total, unit, what) if is_terminal(sys.stderr) else _plain_progress(total, unit, what)


@contextmanager
def _bar(total: int, unit: str, what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount=1, /, note="": bar.update(task, advance=amount, description=_joined(what, note))


@contextmanager
def _plain_progress(total: int, unit: str, what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """A line for each tenth, but none within ten seconds of the last, and one at the end."""
    done, told, told_at, said = 0, 0, clock(), what

    def tell() -> None:
        nonlocal told, told_at
        told, told_at = done, clock()
        share = 100 * done // total if total > 0 else 100
        sys.stderr.write(f"{said}: {done} of {total} {unit} ({share} %)\n".removeprefix(": "))
        sys.stderr.flush()

    def advance(amount: int = 1, /, note: str = "") -> None:
        nonlocal done, said
        done, said = done + amount, _joined(what, note)
        if (done - told) * 10 >= total and clock() - told_at >= PLAIN_INTERVAL_S:
            tell()

    yield advance
    if done != told:
        tell()


def _joined(what: str, note: str) -> str:
    return f"{what} ({note})" if note else what


class LiveView:
    """A handful of named values that change: redrawn in place on a terminal, a plain line every few seconds elsewhere.

    A context manager; `update` may be called as often as there is news. A value that became empty is not shown.
    """

    def __init__(
        self, title: str, interval_s: float = PLAIN_INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._interval_s = interval_s
        self._clock = clock
        self._values: dict[str, object] = {}
        self._next_line_at = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        if is_terminal():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, values: Mapping[str, object]) -> None:
        """Show ``values``, keys in their order, over those shown before."""
        self._values = {name: value for name, value in (self._values | dict(values)).items() if value != ""}
        if self._live is not None:
            self._draw(self._live)
        elif self._clock() >= self._next_line_at:
            self._next_line_at = self._clock() + self._interval_s
            line = ", ".join(f"{name} {value}" for name, value in self._values.items())
            sys.stdout.write(f"{self._title}: {line}\n")
            sys.stdout.flush()

    def _draw(self, live: Live) -> None:
        from rich.table import Table
        from rich.text import Text

        grid = Table(title=self._title, show_header=False)
        for name, value in self._values.items():
            grid.add_row(Text(name), Text(str(value)))
        live.update(grid, refresh=True)
