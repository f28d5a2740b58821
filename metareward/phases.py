"""How a room says what its time goes to, without knowing who listens: `phases.mark("decode")`.

At every moment exactly one phase runs: a mark ends the one before it and begins its own, so phases add up to the wall time.
`metareward.run.spans` records them; without it `UNRECORDED` is handed down. All rooms may import this file.

Phases of sampling: load (weights), data (reading, rendering prompts), prefill, decode and mixed (a step's forward pass over
prompt tokens only, next tokens only, both), sample (drawing from logits), host (schedule and book-keeping), write, check
(the sampler's log-probs against the trainer's).
Phases of training: load, data (packing), forward, backward, communication (what is not overlapped: gradient norm, figures),
optimizer, checkpoint, write. In both: wait (for other ranks), trace (writing a trace of chosen steps), other (what no mark claims).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Phases(Protocol):
    """What the engine and the trainer are given."""

    def mark(self, phase: str, **counts: float) -> None:
        """From now on time belongs to `phase`; `counts` (tokens, rows ...) are added to its totals."""

    def step(self) -> None:
        """A step of the engine or of the optimizer has ended."""


class Unrecorded:
    """Nobody listens."""

    def mark(self, phase: str, **counts: float) -> None:
        pass

    def step(self) -> None:
        pass


class Uncounted:
    """Passes phases on without their counts, for work that another rank of a tensor group counts."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases

    def mark(self, phase: str, **counts: float) -> None:
        self.phases.mark(phase)

    def step(self) -> None:
        self.phases.step()


UNRECORDED: Phases = Unrecorded()

_command_began: float | None = None


@contextmanager
def command() -> Iterator[None]:
    """Around a command: notes its beginning, so that a run's first span covers the imports and the process group."""
    global _command_began
    _command_began = time.time()
    try:
        yield
    finally:
        _command_began = None


def command_began() -> float | None:
    """Seconds since the epoch at which the running command began; None outside of one."""
    return _command_began
