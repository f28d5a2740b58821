"""The processes of a run: one, or as many as torchrun started.

There is always a process group, also for one process, so that the trainer has one path. CPU ranks talk through gloo, GPU ranks
through NCCL (with gloo beside it for small host-side objects). The store through which the ranks found each other also holds
the counters that they share. Has not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from metareward.errors import UserError
from metareward.run import peers

T = TypeVar("T")

# Ranks wait for each other at the end of a stage; a stage can be hours longer on one rank than on another.
PATIENCE = timedelta(hours=12)

# Of this process; the store outlives no process group.
_store: dist.Store | None = None
_peers: list[peers.Peer] = []
_stop_watching: Callable[[], None] | None = None
_counters = 0


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
    global _store, _peers, _stop_watching, _counters
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        base, own, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        base.set_timeout(PATIENCE)
    else:
        base, own, size = dist.HashStore(), 0, 1
    _store, _counters = dist.PrefixStore("metareward", base), 0
    peers.register(_store, own)
    group_store = dist.PrefixStore("process group", base)
    dist.init_process_group(backend, store=group_store, rank=own, world_size=size, timeout=PATIENCE)
    _peers = peers.read_peers(_store, size)
    if size > 1:
        _stop_watching = peers.watch_for_end(_peers, own)


def stop_ranks(*, watch: bool = False) -> None:
    """Leave the process group. watch: go on answering torchrun's SIGTERM with who died."""
    global _store, _peers, _stop_watching
    if _stop_watching is not None and not watch:
        _stop_watching()
    _store, _peers, _stop_watching = None, [], None
    if dist.is_initialized():
        dist.destroy_process_group()


def with_ranks(work: Callable[[], None]) -> None:
    """Do `work` inside the process group of torchrun, or of this process alone."""
    start_ranks()
    try:
        with naming_lost_ranks():
            work()
    except peers.LostRank:
        # torchrun may end this process before the error has come to be printed.
        stop_ranks(watch=True)
        raise
    finally:
        stop_ranks()


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
    with naming_lost_ranks():
        dist.all_gather_object(values, value)
    return values


def neighbours(size: int) -> dist.ProcessGroup:
    """This rank's group where ranks 0 to size - 1 are one, the next `size` another, and so on. A collective."""
    return dist.new_subgroups(size, timeout=PATIENCE)[0]


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
        with naming_lost_ranks():
            dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class Counter:
    """A whole number, 0 at first, that all ranks add to, each as it likes and without waiting for the others.

    To make one is a collective: every rank makes its counters in the same order.
    """

    def __init__(self, name: str) -> None:
        global _counters
        self.store: dist.Store = dist.HashStore() if _store is None else _store
        # The number keeps apart two counters of one name; a new start of the run has a new store.
        self.key = f"counter/{_counters}/{name}"
        _counters += 1

    def add(self, amount: int) -> int:
        """Add, and return the sum after it; no two calls with an amount above 0, on any rank, return the same."""
        with naming_lost_ranks():
            return self.store.add(self.key, amount)


def check_peers() -> None:
    """Look whether the other ranks of this machine are there, where nothing else would tell.

    Raises:
        UserError: naming those that are not.
    """
    dead = peers.gone(_peers)
    if dead:
        raise peers.LostRank(peers.sentence(dead))


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Around anything that needs the other ranks: its failure becomes a UserError that names those which are gone."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not is_connection_error(error):
            raise
        raise peers.lost_peer(_peers, error) from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a collective or the store could not reach another rank; gloo has no exception of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
