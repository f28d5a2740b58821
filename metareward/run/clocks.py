"""Clocks for spans: the host's on a CPU, the device's own stream on a GPU.

A CPU computes in step with the host, so the host's clock is right. A GPU works behind the host's back: there a stamp is a CUDA
event on the current stream, read when it has happened and never waited for inside a step. The phases are then those of
the stream, and "host" is what the host kept the device waiting for. `StreamClock` has never run on a GPU.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Stamps are opaque; only differences have a meaning."""

    def stamp(self) -> Any:
        """Now."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """From one stamp to the next; both must have happened."""

    def happened(self, stamp: Any) -> bool:
        """Whether the stamp can be read already."""

    def settle(self) -> None:
        """Wait until all stamps have happened."""

    def drop(self, stamp: Any) -> None:
        """The stamp is not needed any more."""


class HostClock:
    """time.perf_counter."""

    def stamp(self) -> float:
        return perf_counter()

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier

    def happened(self, stamp: float) -> bool:
        return True

    def settle(self) -> None:
        pass

    def drop(self, stamp: float) -> None:
        pass


class StreamClock:
    """Timed CUDA events on the current stream, used again when they have been read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[torch.cuda.Event] = []

    def stamp(self) -> torch.cuda.Event:
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        # CUDA gives milliseconds in fp32: exact enough between neighbours, not over hours.
        return earlier.elapsed_time(later) / 1e3

    def happened(self, stamp: torch.cuda.Event) -> bool:
        return stamp.query()

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def drop(self, stamp: torch.cuda.Event) -> None:
        self.free.append(stamp)


def clock_for(device: torch.device) -> Clock:
    return StreamClock(device) if device.type == "cuda" else HostClock()
