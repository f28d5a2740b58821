"""RUN/spans read back: what every stage of every iteration took, by phase and rank, over all attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metareward.errors import UserError

Counts = dict[str, float]
Line = dict[str, Any]


@dataclass
class Attempt:
    """A start of the run. ended: "finished", "error" (a stage raised) or "killed" (nothing tells of an end)."""

    name: float
    ranks: int
    local_ranks: int
    device: str
    threads: int
    start: float
    end: float
    ended: str = "killed"


@dataclass
class StageTime:
    """A stage of an iteration over all attempts.

    phases: [rank][phase] -> seconds. counts: [phase] -> totals over ranks. seconds: wall time; of each attempt that of its
    slowest rank. stopped: the part of it in attempts that did not finish the stage. peak_memory: bytes, the largest rank's.
    """

    stage: str
    iteration: int
    phases: dict[int, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: float = 0.0
    steps: int = 0
    peak_memory: int = 0
    notes: Line = field(default_factory=dict)

    @property
    def mean_phases(self) -> dict[str, float]:
        """Phase -> seconds, the mean over ranks."""
        totals: dict[str, float] = {}
        for found in self.phases.values():
            for phase, seconds in found.items():
                totals[phase] = totals.get(phase, 0.0) + seconds / len(self.phases)
        return totals

    @property
    def imbalance(self) -> float:
        """How much longer the busiest rank worked than the mean, as a share; waiting for others is no work."""
        busy = [
            sum(seconds for phase, seconds in found.items() if phase != "wait")
            for found in self.phases.values()
        ]
        mean = sum(busy) / len(busy) if busy else 0.0
        return max(busy) / mean - 1 if mean > 0 else 0.0

    def count(self, name: str) -> float:
        """A count added up over all phases."""
        return sum(found.get(name, 0.0) for found in self.counts.values())


@dataclass
class RunTime:
    """Everything that RUN/spans tells. Stages in the order in which they began."""

    attempts: list[Attempt]
    stages: list[StageTime]

    @property
    def wall(self) -> float:
        """Seconds in which the run ran, all attempts added; the pauses between them are not counted."""
        return sum(attempt.end - attempt.start for attempt in self.attempts)

    @property
    def outside(self) -> float:
        """Seconds of the wall time that belong to no stage."""
        return self.wall - sum(stage.seconds for stage in self.stages)

    @property
    def ranks(self) -> int:
        return self.attempts[-1].ranks


def span_files(run: Path) -> list[Path]:
    """The files of all ranks.

    Raises:
        UserError: there are none.
    """
    files = sorted((run / "spans").glob("rank-*.jsonl"), key=lambda path: int(path.stem.split("-")[1]))
    if not files:
        raise UserError(
            f"{run} has no spans: give the folder of a run; one that an earlier version made has none"
        )
    return files


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a rank; a last one that a kill cut short is passed over.

    Raises:
        UserError: another line is not valid.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                line = json.loads(raw)
                line["kind"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}, line {number} is not a span: remove that line") from None
            yield line


def read_run(run: Path) -> RunTime:
    """All ranks' files of a run, added up."""
    attempts: dict[float, Attempt] = {}
    stages: dict[tuple[int, str], StageTime] = {}
    # (attempt, iteration, stage) -> seconds by rank, and whether the stage was finished in it.
    seconds: dict[tuple[float, int, str], dict[int, float]] = {}
    finished: set[tuple[float, int, str]] = set()
    for path in span_files(run):
        attempt: Attempt | None = None
        rank = int(path.stem.split("-")[1])
        for line in read_lines(path):
            kind = line["kind"]
            if kind == "attempt":
                attempt = attempts.setdefault(
                    line["attempt"],
                    Attempt(
                        line["attempt"],
                        line["ranks"],
                        line["local_ranks"],
                        line["device"],
                        line["threads"],
                        line["time"],
                        line["time"],
                    ),
                )
                attempt.start = min(attempt.start, line["time"])
                continue
            if attempt is None:
                raise UserError(
                    f"{path} does not begin with an attempt: its beginning was cut off; remove it"
                )
            attempt.end = max(attempt.end, line.get("end") or line.get("time") or 0.0)
            if kind == "end":
                attempt.ended = "finished"
                continue
            if kind == "step":
                continue
            key = (line["iteration"], line["stage"])
            stage = stages.setdefault(key, StageTime(line["stage"], line["iteration"]))
            if kind == "window":
                add_window(stage, rank, line)
                ranks = seconds.setdefault((attempt.name, *key), {})
                ranks[rank] = ranks.get(rank, 0.0) + line["end"] - line["start"]
            elif kind == "note":
                known = {"kind", "stage", "iteration"}
                stage.notes.update({name: value for name, value in line.items() if name not in known})
            else:
                stage.peak_memory = max(stage.peak_memory, line["peak_memory"])
                if line["complete"]:
                    finished.add((attempt.name, *key))
                else:
                    attempt.ended = "error"
    for (name, iteration, label), by_rank in seconds.items():
        stage = stages[iteration, label]
        stage.seconds += max(by_rank.values())
        # The start is written before the stage of that name begins, and may be all that a kill left of it.
        if (name, iteration, label) not in finished and label != "start":
            stage.stopped += max(by_rank.values())
    return RunTime(sorted(attempts.values(), key=lambda item: item.start), list(stages.values()))


def add_window(stage: StageTime, rank: int, line: Line) -> None:
    phases = stage.phases.setdefault(rank, {})
    for phase, value in line["seconds"].items():
        phases[phase] = phases.get(phase, 0.0) + value
    for phase, counts in line["counts"].items():
        into = stage.counts.setdefault(phase, {})
        for name, value in counts.items():
            into[name] = into.get(name, 0.0) + value
    stage.peak_memory = max(stage.peak_memory, line["peak_memory"])
    if rank == 0:
        stage.steps += line["steps"]
