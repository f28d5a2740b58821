"""Who of the ranks is gone, and how a failed collective names them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from metareward.errors import UserError
from metareward.run import peers, ranks
from metareward.run.peers import Peer, gone, lost_peer, read_peers, register, sentence


@pytest.fixture
def zombie() -> object:
    """A process that ended and that nobody has asked for, as torchrun's children are for a moment."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process
    process.wait()


def test_registered_processes_are_read_by_all() -> None:
    store = dist.HashStore()
    register(store, 1)
    register(store, 0)
    assert read_peers(store, 2) == [Peer(rank, peers.place(), os.getpid()) for rank in (0, 1)]


def test_ended_processes_of_this_machine_are_gone(zombie: subprocess.Popen) -> None:
    here = peers.place()
    listed = [
        Peer(0, here, os.getpid()),
        Peer(1, here, zombie.pid),
        Peer(2, "elsewhere", zombie.pid),
        Peer(3, here, 2**22 + 1),  # above the largest process id
        Peer(4, here, 1),
    ]
    assert [peer.rank for peer in gone(listed)] == [1, 3]


def test_the_sentence_names_the_ranks() -> None:
    assert sentence([Peer(1, "a", 7), Peer(3, "a", 9)]).startswith(
        "rank 1 (process 7) and rank 3 (process 9) died"
    )
    assert sentence([]).startswith("another rank died")


def test_a_failed_collective_names_who_is_gone(
    zombie: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [Peer(0, peers.place(), os.getpid()), Peer(1, peers.place(), zombie.pid)]
    monkeypatch.setattr(ranks, "_peers", listed)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    failure = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with (
        pytest.raises(UserError, match=rf"rank 1 \(process {zombie.pid}\) died .* goes on from here"),
        ranks.naming_lost_ranks(),
    ):
        raise failure
    with pytest.raises(UserError, match="rank 1"):
        ranks.check_peers()
    # Any other error stays what it is.
    with pytest.raises(RuntimeError, match="shape"), ranks.naming_lost_ranks():
        raise RuntimeError("shape mismatch")


def test_where_nobody_here_is_gone_the_failure_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOOK_FOR", 0.1)
    told = str(lost_peer([Peer(0, peers.place(), os.getpid())], RuntimeError("timed out\nin a.cc")))
    assert "another rank died or stopped" in told
    assert told.endswith(": timed out")


@pytest.mark.parametrize("lost", [True, False])
def test_the_watch_outlives_a_lost_rank_s_error_alone(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """torchrun's SIGTERM may be faster than the error is printed; of any other error the other ranks tell nothing."""
    ended: list[bool] = []

    def work() -> None:
        monkeypatch.setattr(ranks, "_stop_watching", lambda: ended.append(True))
        raise (peers.LostRank if lost else UserError)("so the run ends")

    with pytest.raises(UserError, match="so the run ends"):
        ranks.with_ranks(work)
    assert ended == ([] if lost else [True])
    assert not dist.is_initialized()


def test_counters_of_one_name_are_apart() -> None:
    first, second = ranks.Counter("same"), ranks.Counter("same")
    assert [first.add(1), first.add(2), second.add(1), first.add(0)] == [1, 3, 1, 3]
