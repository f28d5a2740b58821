"""Two processes on gloo give what one gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metareward.profiling.read import read_run

FILES = ("responses", "judgments", "actor_pairs", "comparisons", "judge_pairs")


def losses(root: Path) -> dict[tuple[int, int], float]:
    events = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return {
        (event["iteration"], event["step"]): event["loss"] for event in events if event["event"] == "step"
    }


@pytest.mark.slow
def test_two_processes_give_the_same_files_and_losses(
    finished_run: Path, tiny_world: Path, tmp_path: Path, metareward: Any
) -> None:
    # Both start from the same seeded model: hundreds of seed steps would magnify the last bit in which sums differ.
    settings = ["--seed.no-enabled", "--model.name", finished_run / "seed" / "model"]
    roots = {}
    for processes in (1, 2):
        roots[processes] = tmp_path / f"on-{processes}"
        done = metareward(
            "run", tiny_world / "recipe.toml", "--run-dir", roots[processes], *settings, processes=processes
        )
        assert done.returncode == 0, done.stdout
    for number in (1, 2):
        for name in FILES:
            relative = Path(f"iteration-{number}") / f"{name}.jsonl"
            assert (roots[1] / relative).read_bytes() == (roots[2] / relative).read_bytes(), relative
    one, two = losses(roots[1]), losses(roots[2])
    assert one.keys() == two.keys()
    assert one == pytest.approx(two, abs=1e-4)
    alone, together = (read_run(roots[processes]) for processes in (1, 2))
    assert (alone.ranks, together.ranks) == (1, 2)
    assert together.outside < 0.1 * together.wall
    for one_stage, two_stage in zip(alone.stages, together.stages, strict=True):
        assert one_stage.stage == two_stage.stage
        assert len(two_stage.phases) == 2
        for name in ("requests", "prompt_tokens", "new_tokens", "completions"):
            if one_stage.stage not in ("train", "reference"):  # a rank with nothing to do computes a filler
                assert one_stage.count(name) == two_stage.count(name), (one_stage.stage, name)


def test_a_batch_that_two_processes_cannot_share_is_refused(
    tiny_world: Path, tmp_path: Path, metareward: Any
) -> None:
    done = metareward(
        "run",
        tiny_world / "recipe.toml",
        "--run-dir",
        tmp_path / "odd",
        "--train.batch-pairs",
        3,
        processes=2,
    )
    assert done.returncode != 0
    assert "train.batch_pairs = 3 does not divide over 2 processes" in done.stdout
