"""The host's work for a decode step of 1,024 running sequences: schedule, pages, segments, results. No model runs.

    pytest bench/test_schedule_bench.py --benchmark-only

The limit it is held against: 5 % of the step it belongs to, so the step's own time is measured by
``python -m bench.sampler`` (CPU) or ``bench/gpu_sampler.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from metareward.sampler.pages import PagePool
from metareward.sampler.prefix_tree import PrefixTree
from metareward.sampler.request import Request
from metareward.sampler.schedule import Scheduler

RUNNING = 1024


def requests(shape: str) -> list[Request]:
    """Requests without end for the benchmark: groups of eleven that share 1,000 tokens, or prompts of their own."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(400):
        prompt = tuple(rng.integers(0, 32_000, 1000).tolist())
        for member in range(11):
            own = () if shape == "groups" else tuple(rng.integers(0, 32_000, 60).tolist())
            made.append(Request(f"{group}/{member}", prompt + own))
    return made


@pytest.mark.parametrize("ending", ["none end", "16 end a step"])
@pytest.mark.parametrize("shape", ["groups", "groups with tails"])
def test_schedule(benchmark: Any, shape: str, ending: str) -> None:
    """Mean over 100 steps, the first ones after admission left out."""
    pool = PagePool(400_000)
    tree = PrefixTree(pool, 16)
    scheduler = Scheduler(
        iter(requests(shape)),
        pool,
        tree,
        tree.root(0),
        key_of=hash,
        stop_ids=[0],
        max_running=RUNNING,
        max_new_tokens=4096,
        max_step_tokens=8192,
    )
    rng = np.random.default_rng(1)

    def one() -> None:
        step = scheduler.next_step()
        assert step is not None
        tokens = np.ones(len(step.draws), dtype=np.int64)
        if ending != "none end":
            tokens[rng.integers(0, len(tokens), 16)] = 0
        scheduler.record(step, tokens, -tokens.astype(np.float32))

    while len(scheduler.slots.active) < RUNNING - 100:
        one()
    benchmark.pedantic(one, rounds=100, iterations=1, warmup_rounds=10)
    assert len(scheduler.running) > RUNNING - 100
