"""A rank that dies takes the run with it, by name; the next start samples only what was not finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REQUESTS = 6 * 24


def process_of_rank(launcher: int, rank: int) -> int:
    """The process id of a rank: the child of torchrun whose environment says so."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no child of {launcher} is rank {rank}")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank's process in /proc")
def test_a_dead_rank_ends_the_run_and_only_unfinished_requests_are_sampled_again(
    tiny_world: Path,
    tmp_path: Path,
    launch: Callable[..., subprocess.Popen[str]],
    metareward: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    root = tmp_path / "run"
    arguments = ["run", str(tiny_world / "recipe.toml"), "--run-dir", str(root), "--seed.no-enabled"]
    arguments += ["--respond.samples", "24", "--respond.max-new-tokens", "64"]
    process = launch(arguments, processes=2)
    parts = [root / "iteration-1" / f"responses.jsonl.part-{rank}" for rank in (0, 1)]
    while min(map(lines, parts)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    pid = process_of_rank(process.pid, 1)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    # Far below torchrun's 30 seconds of patience with a worker that does not listen.
    assert time.monotonic() - killed < 20
    assert f"metareward: rank 1 (process {pid}) died" in output

    kept = sum(map(lines, parts))
    assert 6 <= kept < REQUESTS
    done = metareward("stage", "respond", root)
    assert done.returncode == 0, done.stdout
    responses = [json.loads(line) for line in (root / "iteration-1" / "responses.jsonl").open()]
    assert len({(line["prompt_id"], line["response_id"]) for line in responses}) == len(responses) == REQUESTS
    events = [json.loads(line) for line in (root / "metrics.jsonl").open()]
    (event,) = [item for item in events if (item["event"], item["stage"]) == ("stage", "respond")]
    assert (event["earlier_requests"], event["requests"]) == (kept, REQUESTS - kept)
