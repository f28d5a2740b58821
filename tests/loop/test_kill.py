"""Killed at any moment and started again, a run gives what an undisturbed one gives: the same pairs, the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metareward.model.hf_files import weights_digest

# What tells that a stage has begun, and how long (seconds) it takes about: the kill comes at a random moment of that.
MOMENTS = [
    ("seed/examples.jsonl", 1.0),
    ("seed/examples.jsonl", 4.0),
    ("seed/training/step-000020", 4.0),
    ("seed/model/config.json", 0.6),
    ("iteration-1/responses.jsonl", 0.15),
    ("iteration-1/judgments.jsonl", 0.15),
    ("iteration-1/comparisons.jsonl", 0.3),
    ("iteration-1/model/config.json", 0.6),
    ("iteration-2/judgments.jsonl", 0.3),
    ("iteration-2/judge_pairs.jsonl", 0.5),
]
FILES = ("responses", "judgments", "actor_pairs", "comparisons", "judge_pairs")


def kill_after(process: subprocess.Popen[str], sign: Path, delay: float) -> bool:
    """SIGKILL the process `delay` seconds after `sign` appears; False where it ended before."""
    while not sign.exists():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
def test_ten_kills_change_nothing(
    finished_run: Path, tiny_world: Path, tmp_path: Path, launch: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    draw = random.Random(20240719)
    root = tmp_path / "killed"
    arguments = ["run", str(tiny_world / "recipe.toml"), "--run-dir", str(root)]
    kills = 0
    for sign, span in MOMENTS:
        process = launch(arguments)
        kills += kill_after(process, root / sign, draw.uniform(0.0, span))
        process.communicate()
    last = launch(arguments)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert kills >= 8, f"only {kills} of the {len(MOMENTS)} kills came before the run's end"
    for number in (1, 2):
        for name in FILES:
            relative = Path(f"iteration-{number}") / f"{name}.jsonl"
            assert (root / relative).read_bytes() == (finished_run / relative).read_bytes(), relative
    for folder in ("seed", "iteration-1", "iteration-2"):
        assert weights_digest(root / folder / "model") == weights_digest(finished_run / folder / "model"), (
            folder
        )
    leftovers = [
        path
        for path in root.rglob("*")
        if ".part-" in path.name or path.suffix == ".tmp" or ".partial-" in path.name
    ]
    assert not leftovers


def test_a_second_process_is_kept_out(
    tiny_world: Path,
    tmp_path: Path,
    launch: Callable[[list[str]], subprocess.Popen[str]],
    metareward: Callable[..., object],
) -> None:
    root = tmp_path / "shared"
    arguments = ["run", str(tiny_world / "recipe.toml"), "--run-dir", str(root)]
    first = launch(arguments)
    while not (root / "seed" / "examples.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = metareward(*arguments)
    assert second.returncode == 2
    assert "another process is working in" in second.stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()


@pytest.mark.slow
def test_kills_in_bf16_lose_and_double_nothing(
    finished_run: Path, tiny_world: Path, tmp_path: Path, launch: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    # In bf16 the batch that a request happens to be in can change its last bits, so texts may differ; identities may not.
    root = tmp_path / "bf16"
    arguments = ["run", str(tiny_world / "recipe.toml"), "--run-dir", str(root)]
    arguments += ["--seed.no-enabled", "--model.name", str(finished_run / "seed" / "model")]
    arguments += ["--train.compute-dtype", "bfloat16", "--sampler.dtype", "bfloat16"]
    draw = random.Random(7)
    kills = 0
    for sign in ("iteration-1/prompts.jsonl", "iteration-1/responses.jsonl", "iteration-1/model/config.json"):
        process = launch(arguments)
        kills += kill_after(process, root / sign, draw.uniform(0.0, 0.3))
        process.communicate()
    last = launch(arguments)
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert kills >= 2
    for number in (1, 2):
        folder = root / f"iteration-{number}"
        lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in FILES}
        prompts = [json.loads(line)["prompt_id"] for line in (folder / "prompts.jsonl").open()]
        answered = [(line["prompt_id"], line["response_id"]) for line in lines["responses"]]
        assert answered == [(prompt_id, index) for prompt_id in prompts for index in range(4)]
        usable = [
            (line["prompt_id"], line["response_id"])
            for line in lines["responses"]
            if line["finished"] and line["duplicate_of"] is None
        ]
        judged = [
            (line["prompt_id"], line["response_id"], line["judgment_id"]) for line in lines["judgments"]
        ]
        assert judged == [(*key, index) for key in usable for index in range(4)]
        compared = [
            (line["prompt_id"], line["response_id"], line["first"], line["second"])
            for line in lines["comparisons"]
        ]
        assert len(compared) == len(set(compared)) > 0
        for prompt_id, response_id, first, second in compared:
            assert (prompt_id, response_id, second, first) in compared
