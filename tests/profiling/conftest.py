"""A made-up run: spans of two ranks and two attempts, the first killed, on a machine of round figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metareward.config import Recipe
from metareward.profiling.machine import Machine
from metareward.run.directory import RunDirectory

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
JUDGE = {
    "prefill": {
        "passes": 2,
        "rows": 300,
        "prefill_rows": 300,
        "logit_rows": 10,
        "pairs": 6000,
        "kv_tokens": 300,
    },
    "decode": {
        "passes": 50,
        "rows": 400,
        "prefill_rows": 0,
        "logit_rows": 400,
        "pairs": 20_000,
        "kv_tokens": 9000,
    },
    "sample": {"logit_rows": 410},
    "host": {"requests": 20, "prompt_tokens": 1200, "new_tokens": 410, "completions": 20},
}


def attempt(name: float, rank: int) -> dict[str, Any]:
    head = {"kind": "attempt", "attempt": name, "rank": rank, "ranks": 2, "local_ranks": 2}
    return {**head, "device": "cpu", "threads": 1, "time": name}


def window(
    stage: str, iteration: int, start: float, seconds: dict[str, float], counts: dict[str, Any] | None = None
) -> dict[str, Any]:
    end = start + sum(seconds.values())
    head = {"kind": "window", "stage": stage, "iteration": iteration, "start": start, "end": end, "steps": 5}
    return {**head, "peak_memory": 2**20, "seconds": seconds, "counts": counts or {}}


def note(stage: str, iteration: int, **facts: Any) -> dict[str, Any]:
    return {"kind": "note", "stage": stage, "iteration": iteration, **facts}


def ended(stage: str, iteration: int, end: float, peak: int) -> dict[str, Any]:
    head = {"kind": "stage", "stage": stage, "iteration": iteration, "end": end, "complete": True}
    return {**head, "peak_memory": peak}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Rank 0 judges 10 s, rank 1 works 6 s of them; 4 s went into an attempt that was killed; then 5 s of training."""
    root = tmp_path / "run"
    RunDirectory(root).open(Recipe())
    (root / "spans").mkdir()
    notes = {"model": MODEL, "dtype": "float32"}
    forward = {"passes": 4, "rows": 800, "logit_rows": 100, "pairs": 9000, "completions": 8, "fused_rows": 75}
    for rank in (0, 1):
        work = {"prefill": 2.0, "decode": 5.0, "sample": 1.0, "host": 2.0}
        if rank == 1:
            work = {"prefill": 1.0, "decode": 3.0, "sample": 1.0, "host": 1.0, "wait": 4.0}
        train = {"forward": 1.0, "backward": 3.0, "optimizer": 1.0}
        lines = [
            attempt(1000.0, rank),
            window("start", 0, 1000.0, {"load": 2.0}),
            window("judge", 1, 1002.0, {"load": 3.0, "decode": 1.0}),
            attempt(2000.0, rank),
            window("start", 0, 2000.0, {"load": 1.0}),
            note("judge", 1, **notes),
            window("judge", 1, 2001.0, work, JUDGE),
            {
                "kind": "step",
                "stage": "judge",
                "iteration": 1,
                "step": 3,
                "spans": [["decode", 2002.0, 0.25]],
            },
            ended("judge", 1, 2011.0, 2**30 * (1 + rank)),
            note("train", 1, **notes),
            window("train", 1, 2011.5, train, {"forward": forward, "optimizer": {"passes": 2}}),
            ended("train", 1, 2016.5, 5 * 2**29),
            {"kind": "end", "time": 2017.0},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "spans" / f"rank-{rank}.jsonl").write_text(text)
    return root


@pytest.fixture
def machine() -> Machine:
    return Machine("made up", 2, 8e5, 1e6, {"bfloat16": 4e6, "float32": 2e6}, "2.13", "today")
