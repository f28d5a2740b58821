"""Out of memory in training: one sentence that says which setting to lower and, where it was recorded, what was allocated.

On a GPU with `logging.memory_snapshot` the allocator's last events are kept while a stage trains, and written beside the traces
when memory runs out. Tested with stand-ins for the GPU; recording and snapshot have never run on one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from metareward.config import LoggingSettings, TrainSettings
from metareward.errors import UserError
from metareward.run import ranks
from metareward.stages.context import Context
from metareward.training.memory_check import Workload, advice

EVENTS = 100_000
"""Allocations and releases that are kept, the newest; each takes some kilobytes of main memory with its stack."""
SAVED = 0.25
"""The estimate was within what is free, or the check is off: the advice is what takes this share off it."""


def check_memory_snapshot(settings: LoggingSettings, device: torch.device) -> None:
    """
    Raises:
        UserError: a snapshot is asked for where there is no GPU.
    """
    if settings.memory_snapshot and device.type != "cuda":
        raise UserError(
            "logging.memory_snapshot = true records a GPU's allocations, and there is no GPU here: set it to false"
        )


@contextmanager
def naming_out_of_memory(
    context: Context, iteration: int, stage: str, work: Workload, settings: TrainSettings
) -> Iterator[None]:
    """Around all that computes in a training stage.

    Raises:
        UserError: a GPU's or the CPU's allocator, or Python, has no memory left.
    """
    logging = context.recipe.logging
    check_memory_snapshot(logging, ranks.device())
    if logging.memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python", clear_history=True)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = ""
        if logging.memory_snapshot:
            name = f"memory-iteration-{iteration}-{stage}-rank-{ranks.rank()}.pickle"
            told = write_snapshot(context.run.root / "spans" / name)
        elif work.device_type == "cuda":
            told = "; logging.memory_snapshot = true writes down what was allocated"
        raise UserError(sentence(error, iteration, stage, work, settings) + told) from error
    finally:
        if logging.memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)


def is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def write_snapshot(path: Path) -> str:
    """Write what is allocated and what was; returns the part of a sentence that says where it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        return f"; what was allocated could not be written to {path} ({os.strerror(error.errno or 0)})"
    return f"; what was allocated is in {path}, which https://docs.pytorch.org/memory_viz shows"


def sentence(
    error: BaseException, iteration: int, stage: str, work: Workload, settings: TrainSettings
) -> str:
    """What happened, and the cheapest change that takes a quarter off the estimate."""
    peak = work.estimate(settings).peak
    tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    facts = [tried.group().replace("Tried", "tried")] if tried else []
    where = "the GPU" if work.device_type == "cuda" else "the machine"
    place = f"the {stage} stage" + (f" of iteration {iteration}" if iteration else "")
    return (
        f"{where} ran out of memory in {place} ({', '.join([*facts, f'{peak / 1e9:.2f} GB a process were estimated'])}): "
        f"{advice(work, settings, int((1 - SAVED) * peak))}; the same command then goes on from the last checkpoint"
    )
