"""What a person sees: live progress on a terminal, plain lines otherwise, tables, and one-line errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

Event = Mapping[str, Any]


@contextmanager
def watching(*, every_seconds: float, stream: TextIO | None = None) -> Iterator[Callable[[Event], None]]:
    """A listener for the events of a training run (see `trainers.loop.train_worker`), writing to `stream` (stderr).

    On a terminal one line of progress is kept up to date; elsewhere a line is written every `every_seconds`.
    """
    out = stream or sys.stderr
    if out.isatty():
        with _live(out) as listener:
            yield listener
    else:
        yield _plain(out, every_seconds)


def _plain(out: TextIO, every_seconds: float) -> Callable[[Event], None]:
    last = float("-inf")

    def listen(event: Event) -> None:
        nonlocal last
        if event.get("kind") == "progress":
            if time.monotonic() - last < every_seconds:
                return
            last = time.monotonic()
        out.write(line_of(event) + "\n")
        out.flush()

    return listen


@contextmanager
def _live(out: TextIO) -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=out)
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("starting", total=1.0)

        def listen(event: Event) -> None:
            if event.get("kind") == "progress":
                progress.update(task, completed=event["share"], description=line_of(event), refresh=True)
            else:
                progress.console.print(line_of(event), markup=False, highlight=False, soft_wrap=True)

        yield listen


def line_of(event: Event) -> str:
    """One line of text for an event."""
    kind = event.get("kind")
    if kind == "progress" and "text" in event:
        return f"{event['share']:6.1%}  {event['text']}"
    if kind == "progress":
        left = event["seconds_left"]
        parts = [
            f"epoch {event['epoch'] + 1}",
            f"{event['share']:6.1%}",
            f"loss {event['loss']:.4f}",
            f"{event['examples_per_second']:,.0f} examples/s",
            f"{duration(left)} left" if left is not None else "",
            f"{event['peak_rss_bytes'] / 2**20:,.0f} MiB",
        ]
        return "  ".join(part for part in parts if part)
    if kind == "validation":
        figures = [f"{name} {value:.4f}" for name, value in event.items() if isinstance(value, float)]
        return f"epoch {event['epoch']} validated: {'  '.join(figures)}{'  (best so far)' if event.get('best') else ''}"
    if "text" in event:
        return str(event["text"])
    return "  ".join(f"{name} {value}" for name, value in event.items())


def duration(seconds: float) -> str:
    """`1:05:09` or `4:07`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: text to the left, the figures (every column whose cells all start with a digit) to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [
        bool(rows) and all(row[i].lstrip("-.")[:1].isdigit() for row in rows if row[i]) for i in range(len(header))
    ]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
