"""The collapse guard in whole runs of the tiny recipe: warned of, stopped, and gone on with without judge pairs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

# Beyond any judge's reach: ln 6 is 1.7918.
LIMITS = ["--guard.min-score-entropy", "1.8", "--guard.min-observations", "1"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def guarded(root: Path) -> list[dict[str, Any]]:
    return [event for event in read(root / "metrics.jsonl") if event["event"] == "guard"]


@pytest.fixture
def command(finished_run: Path, tiny_world: Path) -> list[Any]:
    """One iteration from the model that the seed stage of another run made."""
    settings = ["--seed.no-enabled", "--model.name", finished_run / "seed" / "model", "--stop-after", "1"]
    return ["run", tiny_world / "recipe.toml", *settings, *LIMITS]


def test_a_warning_changes_nothing(
    command: list[Any], finished_run: Path, tmp_path: Path, metareward: Any
) -> None:
    root = tmp_path / "warned"
    done = metareward(*command, "--run-dir", root)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('the run goes on, as guard.action = "warn" says') == 1
    assert [event["stage"] for event in guarded(root)] == ["judge", "compare"]
    for name in ("judgments", "judge_pairs"):
        path = Path("iteration-1") / f"{name}.jsonl"
        assert (root / path).read_bytes() == (finished_run / path).read_bytes()
    assert read(root / "iteration-1" / "judge_pairs.jsonl")
    if importlib.util.find_spec("matplotlib") is None:
        assert "no report was written: the report needs matplotlib" in done.stdout
    else:
        assert f"report: {root / 'report.html'}" in done.stdout
        page = (root / "report.html").read_text()
        assert "(guard.min_score_entropy = 1.8)" in page


def test_a_stopped_run_goes_on_without_judge_pairs(
    command: list[Any], tmp_path: Path, metareward: Any
) -> None:
    root = tmp_path / "stopped"
    stopped = metareward(*command, "--run-dir", root, "--guard.action", "stop")
    assert stopped.returncode == 2, stopped.stdout
    assert "Traceback" not in stopped.stdout
    assert "--guard.action warn" in stopped.stdout
    judgments = (root / "iteration-1" / "judgments.jsonl").read_bytes()
    assert not (root / "iteration-1" / "actor_pairs.jsonl").exists()

    again = metareward(*command, "--run-dir", root, "--guard.action", "stop")
    assert again.returncode == 2, "the same command meets the same answer"

    done = metareward(*command, "--run-dir", root, "--guard.action", "drop_judge_pairs")
    assert done.returncode == 0, done.stdout
    assert (root / "iteration-1" / "judgments.jsonl").read_bytes() == judgments
    assert read(root / "iteration-1" / "judge_pairs.jsonl") == []
    trained = next(event for event in read(root / "metrics.jsonl") if event["event"] == "preference_set")
    assert trained.get("judge", 0) == 0
    assert trained["actor"] > 0
    assert (root / "iteration-1" / "model").is_dir()
