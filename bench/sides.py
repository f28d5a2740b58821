"""One process a side: its steps are asked for one at a time, and its peak memory is its own.

Two sides that take turns in one process share an allocator and a peak. Here each has a process, which waits while
the other one measures.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from bench.peak_memory import reset_high_water_mark, status_bytes
from metareward.errors import UserError

Figures = dict[str, Any]
Role = Callable[..., None]
"""(connection, ...): sends "ready" figures, then figures for every command it receives, until that is "stop"."""


class Side:
    """The process of `role(connection, *arguments)`; use it in a `with`, which ends it."""

    def __init__(self, name: str, role: Role, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, other = context.Pipe()
        self.process = context.Process(target=run_role, args=(other, role, arguments), daemon=True)
        self.process.start()
        # The child holds its own end: with ours open, its death would not be seen.
        other.close()
        self.started = self.answer()

    def ask(self, command: str) -> Figures:
        self.connection.send(command)
        return self.answer()

    def answer(self) -> Figures:
        """
        Raises:
            UserError: what the side found wrong with its input.
            RuntimeError: the side failed or was killed.
        """
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process of {self.name} ended with exit code {self.process.exitcode}; -9 often means that the "
                f"machine ran out of memory: lower --micro-batch-tokens or --peer-batch"
            ) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"{self.name} failed:\n{value}")
        return value

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A side that did all its steps has ended already.
        with contextlib.suppress(OSError):
            self.connection.send("stop")
            self.process.join(timeout=60)
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_role(connection: Connection, role: Role, arguments: tuple[Any, ...]) -> None:
    """In the new process: what the role raises goes to the one who asked."""
    try:
        role(connection, *arguments)
    except UserError as error:
        connection.send(("user error", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def reply(connection: Connection, figures: Figures) -> None:
    connection.send(("figures", figures))


def start_peak(device: str = "cpu") -> int | None:
    """Give free memory back, let the peak begin anew and return the bytes held now; None where the system cannot."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS") if reset_high_water_mark() else None


def peak_since(before: int | None, device: str = "cpu") -> Figures:
    """`peak_whole_bytes`: the process's peak since `start_peak`, on a GPU that of its tensors; `peak_bytes`: that less what it
    held before."""
    if before is None:
        return {"peak_bytes": None, "peak_whole_bytes": None}
    whole = torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")
    return {"peak_bytes": whole - before, "peak_whole_bytes": whole}


def wait_for_device(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
