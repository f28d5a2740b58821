"""metrics.jsonl and the loggers beside it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from metareward.config import LoggingSettings
from metareward.errors import UserError
from metareward.run.metrics import Metrics, read_metrics

PLAIN = LoggingSettings()


def test_events_are_lines_and_come_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, PLAIN, active=True)
    metrics.event("stage", "judge", 2, seconds=1.5, note="a\u2028b\x85c")
    metrics.event("step", "train", 2, step=1, loss=0.7)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert read_metrics(tmp_path) == lines
    assert [(line["event"], line["stage"], line["iteration"]) for line in lines] == [
        ("stage", "judge", 2),
        ("step", "train", 2),
    ]
    assert lines[0]["note"] == "a\u2028b\x85c"
    assert lines[0]["time"] <= lines[1]["time"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LoggingSettings(tensorboard=True), active=False)
    metrics.event("stage", "judge", 1, seconds=1.0)
    metrics.close()
    assert not list(tmp_path.iterdir())
    assert read_metrics(tmp_path) == []


def test_a_line_that_a_kill_cut_short_costs_no_other(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, PLAIN, active=True)
    metrics.event("stage", "judge", 1, seconds=1.0)
    with metrics.path.open("a") as file:
        file.write('{"event":"sta')
    assert len(read_metrics(tmp_path)) == 1
    again = Metrics(tmp_path, PLAIN, active=True)
    again.event("pairs", "actor_pairs", 1, kept=3)
    assert [line["event"] for line in read_metrics(tmp_path)] == ["stage", "pairs"]


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    metrics = Metrics(tmp_path, LoggingSettings(tensorboard=True), active=True)
    metrics.event("step", "train", 1, step=1, loss=0.75)
    metrics.event("step", "train", 1, step=2, loss=0.5)
    metrics.event("step", "train", 2, step=1, loss=0.25)
    metrics.event("stage", "judge", 2, seconds=4.0, implementations={"a": "cpp"}, exact=True)
    metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "judge/seconds"]
    steps = [(item.step, item.value) for item in events.Scalars("train/loss")]
    assert [value for _, value in steps] == [0.75, 0.5, 0.25]
    assert steps == sorted(steps, key=lambda item: item[0])
    assert len({step for step, _ in steps}) == 3
    assert events.Scalars("judge/seconds")[0].value == 4.0
    assert len(read_metrics(tmp_path)) == 4


@pytest.mark.parametrize(
    ("settings", "module", "said"),
    [
        (LoggingSettings(tensorboard=True), "torch.utils.tensorboard", r"metareward\[tensorboard\]"),
        (LoggingSettings(wandb_project="p"), "wandb", r"metareward\[wandb\]"),
    ],
)
def test_a_missing_logger_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: LoggingSettings, module: str, said: str
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments, **options):
        if name == module:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=said):
        Metrics(tmp_path, settings, active=True)
