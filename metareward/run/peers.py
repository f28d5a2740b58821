"""Which ranks of a run are still alive, and what a rank says when the run ends under it.

A rank that dies takes the run with it: torchrun sees its process end and sends SIGTERM to the others, and a collective that
waits for it fails. Both ends are told here in one sentence with the rank's name. Only ranks on the same machine can be looked
at; of the others torchrun's own report says which one failed first.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from metareward.errors import UserError

# A process whose connections are closed may take a moment to be seen as ended.
LOOK_FOR = 5.0


class LostRank(UserError):
    """Another rank is gone, so this one cannot go on."""


class Peer(NamedTuple):
    """One rank's process; a process id means something only in its place (machine and process namespace)."""

    rank: int
    place: str
    pid: int


def register(store: dist.Store, rank: int) -> None:
    """Make this rank's process known to the others."""
    store.set(f"peer/{rank}", json.dumps([place(), os.getpid()]))


def read_peers(store: dist.Store, world_size: int) -> list[Peer]:
    """All ranks' processes; waits for those that have not registered yet."""
    return [Peer(rank, *json.loads(store.get(f"peer/{rank}"))) for rank in range(world_size)]


def place() -> str:
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


def gone(peers: list[Peer]) -> list[Peer]:
    """The peers on this machine whose process has ended."""
    here = place()
    return [peer for peer in peers if peer.place == here and has_ended(peer.pid)]


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Ended since, or a system without /proc.
        return Path("/proc/self/stat").exists()
    # A killed process stays as a zombie until its parent asks for it. Its name, in brackets, may hold anything.
    return stat.rpartition(")")[2].split()[0] in "ZX"


def sentence(dead: list[Peer]) -> str:
    """What to tell about ranks that ended before their time."""
    names = " and ".join(f"rank {peer.rank} (process {peer.pid})" for peer in dead)
    who = f"{names} died or stopped" if dead else "another rank died or stopped (torchrun's report names it)"
    return f"{who}, so the run ends; the same command goes on from here, and finished requests are kept"


def lost_peer(peers: list[Peer], error: Exception) -> LostRank:
    """The error to raise where a collective or the store failed: with the names of the ranks that are gone, if they show."""
    until = time.monotonic() + LOOK_FOR
    while not (dead := gone(peers)) and time.monotonic() < until:
        time.sleep(0.05)
    told = sentence(dead)
    return LostRank(told if dead else f"{told}: {str(error).splitlines()[0]}")


def watch_for_end(peers: list[Peer], own: int) -> Callable[[], None]:
    """Tell who died when torchrun ends this process (SIGTERM), then end. Returns what undoes it.

    A thread waits for the signal, because the main thread may sit for hours in a collective, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while received := inner.recv(1):
            if received[0] == signal.SIGTERM:
                end(peers, own)

    threading.Thread(target=wait, name="watch for SIGTERM", daemon=True).start()

    def undo() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        outer.close()

    return undo


def end(peers: list[Peer], own: int) -> None:
    """Say who died, on the first rank left of this machine, and end this process as SIGTERM would have."""
    here, dead = place(), gone(peers)
    left = [peer.rank for peer in peers if peer.place == here and peer not in dead]
    if own == min(left):
        # Without a dead rank somebody asked the whole run to stop.
        told = (
            sentence(dead)
            if dead or len(left) < len(peers)
            else "told to stop; the same command goes on from here"
        )
        print(f"\nmetareward: {told}", file=sys.stderr, flush=True)
    # The others must look before this one is gone too.
    time.sleep(0.5)
    os._exit(128 + signal.SIGTERM)
