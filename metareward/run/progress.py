"""Progress bars with rate and time left, on rank 0 only; in a log file a line now and then instead of a redrawn one."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm


class LineByLine:
    """A stream for bars that are not on a terminal: every drawing is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(label: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> tqdm:
    """A bar over `total` units of which `done` were finished before; `update(n)` moves it."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=f" {unit}",
        disable=not shown,
        file=sys.stderr if interactive else LineByLine(sys.stderr),
        mininterval=0.2 if interactive else 15.0,
        # A slow step must not be drawn more often than the interval says, nor a fast one less.
        miniters=1,
        ncols=None if interactive else 110,
        dynamic_ncols=interactive,
        smoothing=0.1,
    )
