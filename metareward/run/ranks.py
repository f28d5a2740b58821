"""The processes of a run: one, or as many as torchrun started.

There is always a process group, also for one process, so that the trainer has one path. CPU ranks talk through gloo, GPU ranks
through NCCL (with gloo beside it for small host-side objects). Has not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from metareward.errors import UserError

T = TypeVar("T")

# Ranks wait for each other at the end of a stage; a stage can be hours longer on one rank than on another.
PATIENCE = timedelta(hours=12)


def start_ranks() -> None:
    """Join the process group that torchrun's environment describes, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()}): "
                f"set --nproc-per-node to at most that"
            )
        torch.cuda.set_device(local)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def barrier() -> None:
    """Wait for all ranks. An object gather rather than dist.barrier, which would pick the GPU backend."""
    gather(None)


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and hand its result to all; an error there is raised on every rank.

    `action` must not be a collective itself: the other ranks are not in it.
    """
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
