"""The recorder on a made-up clock: sums, windows, nesting, interruptions, and a clock that lags as a GPU's stream does."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metareward.run.spans import Spans, no_spans
from metareward.run.step_trace import ChosenSteps

CPU = torch.device("cpu")


@dataclass
class FakeClock:
    """Time as the test says it; `lag`: a stamp has happened only when so much time has passed, or after settle()."""

    now: float = 0.0
    lag: float = 0.0
    settled: float = -1.0
    dropped: int = 0

    def stamp(self) -> float:
        return self.now

    def seconds(self, earlier: float, later: float) -> float:
        assert self.happened(later), "read before it happened"
        return later - earlier

    def happened(self, stamp: float) -> bool:
        return stamp <= max(self.settled, self.now - self.lag)

    def settle(self) -> None:
        self.settled = self.now

    def drop(self, stamp: float) -> None:
        self.dropped += 1


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


@pytest.fixture
def recorder(tmp_path: Path) -> Callable[..., tuple[Spans, FakeClock, Path]]:
    def make(lag: float = 0.0, **options: Any) -> tuple[Spans, FakeClock, Path]:
        clock, path = FakeClock(lag=lag), tmp_path / "rank-0.jsonl"
        return Spans(path, CPU, clock=clock, flush_seconds=0.0, **options), clock, path

    return make


def total(path: Path, stage: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for line in lines(path, "window"):
        if line["stage"] == stage:
            for phase, seconds in line["seconds"].items():
                sums[phase] = sums.get(phase, 0.0) + seconds
    return sums


def test_every_moment_belongs_to_one_phase(recorder) -> None:
    spans, clock, path = recorder()
    with spans.stage("judge", 2):
        clock.now = 1.0
        spans.mark("prefill", rows=10)
        clock.now = 3.0
        spans.mark("decode", rows=4, passes=1)
        clock.now = 3.5
        spans.mark("decode", rows=5, passes=1)
        spans.step()
        clock.now = 4.0
        spans.mark("prefill", rows=2)
        clock.now = 7.0
        spans.note(dtype="float32")
    assert total(path, "judge") == {"other": 1.0, "prefill": 5.0, "decode": 1.0}
    counts = [line["counts"] for line in lines(path, "window")]
    assert sum(found.get("prefill", {}).get("rows", 0) for found in counts) == 12
    assert sum(found.get("decode", {}).get("rows", 0) for found in counts) == 9
    assert sum(line["steps"] for line in lines(path, "window")) == 1
    for line in lines(path, "window"):
        assert sum(line["seconds"].values()) == pytest.approx(line["end"] - line["start"])
    (ended,) = lines(path, "stage")
    assert (ended["stage"], ended["iteration"], ended["complete"]) == ("judge", 2, True)
    assert [line["dtype"] for line in lines(path, "note")] == ["float32"]
    assert ended["peak_memory"] > 10 * 2**20


def test_an_inner_stage_interrupts_the_outer(recorder) -> None:
    spans, clock, path = recorder()
    with spans.stage("train", 1):
        spans.mark("data")
        clock.now = 2.0
        with spans.stage("reference", 1):
            spans.mark("forward")
            clock.now = 12.0
        clock.now = 13.0
        spans.mark("backward")
        clock.now = 17.0
    assert total(path, "train") == {"data": 2.0, "other": 1.0, "backward": 4.0}
    assert total(path, "reference")["forward"] == 10.0


def test_an_error_ends_the_stage_as_incomplete(recorder) -> None:
    spans, clock, path = recorder()

    def work() -> None:
        with spans.stage("respond", 1):
            spans.mark("load")
            clock.now = 4.0
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert [line["complete"] for line in lines(path, "stage")] == [False]
    assert total(path, "respond")["load"] == 4.0
    spans.mark("decode")  # outside of a stage: nothing to belong to
    spans.step()
    assert spans.stages == []


def test_a_full_disk_does_not_hide_what_went_wrong(recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, _, path = recorder()

    def work() -> None:
        with spans.stage("respond", 1):
            spans.mark("load")
            spans.step()
            before.append(path.read_bytes())
            monkeypatch.setattr("metareward.run.spans.encode", full)
            raise ValueError("the stage's own words")

    def full(line: dict[str, Any]) -> str:
        raise OSError(28, "No space left on device")

    before: list[bytes] = []
    with pytest.raises(ValueError, match="own words"):
        work()
    assert spans.stages == []
    monkeypatch.undo()
    spans.close()
    # Nothing comes behind a line that may be torn.
    assert path.read_bytes() == before[0]


def test_a_clock_that_lags_is_never_read_too_early_and_loses_nothing(recorder) -> None:
    spans, clock, path = recorder(lag=2.5)
    with spans.stage("judge", 1):
        for _ in range(20):
            spans.mark("decode", rows=1)
            clock.now += 0.75
            spans.mark("host")
            clock.now += 0.25
            spans.step()
        assert 10 <= sum(line["steps"] for line in lines(path, "window")) < 20
    assert total(path, "judge") == {"other": 0.0, "decode": 15.0, "host": 5.0}
    assert sum(line["counts"].get("decode", {}).get("rows", 0) for line in lines(path, "window")) == 20
    assert sum(line["steps"] for line in lines(path, "window")) == 20
    assert clock.dropped == 1 + 40


def test_chosen_steps_are_written_one_by_one_and_traced(recorder, tmp_path: Path) -> None:
    spans, clock, path = recorder(chosen=ChosenSteps(2, 1, tmp_path, rank=3))
    with spans.stage("train", 4):
        for _ in range(5):
            spans.mark("forward")
            torch.ones(8) @ torch.ones(8)
            clock.now += 2.0
            spans.mark("backward")
            clock.now += 3.0
            spans.step()
        spans.mark("write")
    found = lines(path, "step")
    assert sorted({line["step"] for line in found}) == [2, 3]
    seconds = {step: {} for step in (2, 3)}
    for line in found:
        for phase, _, lasted in line["spans"]:
            seconds[line["step"]][phase] = seconds[line["step"]].get(phase, 0.0) + lasted
    assert {phase: seconds[2][phase] for phase in ("forward", "backward")} == {
        "forward": 2.0,
        "backward": 3.0,
    }
    assert seconds[3]["forward"] == 2.0
    (trace,) = tmp_path.glob("torch-*.json.gz")
    assert trace.name == "torch-iteration-4-train-rank-3.json.gz"
    assert any(
        "dot" in event.get("name", "")
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    )


def test_too_few_steps_to_trace_are_said(recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="metareward")
    spans, _, path = recorder(chosen=ChosenSteps(2, 7, tmp_path))
    with spans.stage("train", 1):
        for _ in range(3):
            spans.mark("forward")
            spans.step()
    assert "has 3 steps, fewer than logging.profile_after" in caplog.text
    assert not lines(path, "step")
    assert not list(tmp_path.glob("torch-*"))


def test_nothing_is_recorded_without_a_file() -> None:
    spans = no_spans()
    with spans.stage("judge", 1):
        spans.mark("decode", rows=1)
        spans.step()
        spans.note(model={})
    spans.close()
    assert spans.stages == []
