"""RUN/spans/rank-N.jsonl: what every rank's time went to, phase by phase.

A mark is kept in memory; a few times a minute the marks of a stage become one line of sums, so the cost does not grow with
the file. Lines, in the order of time; `time`, `start` and `end` are seconds since the epoch:

    {"kind": "attempt", "attempt", "rank", "ranks", "local_ranks", "device", "threads", "time"}   a process has started
    {"kind": "window", "stage", "iteration", "start", "end", "steps", "peak_memory", "seconds": {phase: s},
     "counts": {phase: {name: n}}}
    {"kind": "note", "stage", "iteration", ...}                                                 facts, such as the model
    {"kind": "step", "stage", "iteration", "step", "spans": [[phase, start, seconds], ...]}       chosen steps only
    {"kind": "stage", "stage", "iteration", "end", "complete", "peak_memory"}                     a stage has ended
    {"kind": "end", "time"}                                                                     the process ended by itself

An attempt without an "end" was killed; what it did after its last window is not known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from metareward.phases import command_began
from metareward.run import ranks
from metareward.run.clocks import Clock, HostClock, clock_for
from metareward.run.jsonl import cut_torn_line, encode
from metareward.run.peaks import peak_bytes, reset_peak
from metareward.run.step_trace import ChosenSteps

FLUSH_SECONDS = 5.0
Counts = dict[str, float]


@dataclass
class OpenStage:
    """A stage that runs: its marks not yet written, and where its next window begins.

    marks: [phase, stamp, step, counts], each lasting until the next; the last is still running.
    """

    name: str
    iteration: int
    window_start: float
    marks: list[tuple[str, Any, int, Counts]] = field(default_factory=list)
    step: int = 0
    written_steps: int = 0
    peak: int = 0


class Spans:
    """The recorder of one rank; see `metareward.phases` for how it is used.

    path: the file, or None to record nothing. clock: see clocks.py. chosen: steps that are recorded one by one.
    """

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        *,
        clock: Clock | None = None,
        chosen: ChosenSteps | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.path = path
        self.device = device
        self.clock: Clock = clock or HostClock()
        self.chosen = chosen or ChosenSteps()
        self.flush_seconds = flush_seconds
        self.stages: list[OpenStage] = []
        self._next_flush = 0.0

    @contextmanager
    def stage(self, name: str, iteration: int) -> Iterator[None]:
        """A stage from begin to end; 0 is the seed's iteration. One inside another interrupts it. Starts in phase "other"."""
        if self.path is None:
            yield
            return
        if self.stages:
            self.chosen.stage_ends()
            self._write_window(last=True)
        self.stages.append(OpenStage(name, iteration, time.time()))
        reset_peak(self.device)
        self._open_window("other")
        self.chosen.stage_begins(name, iteration)
        try:
            yield
        except BaseException:
            # What went wrong is the stage's to say, also where the disk is too full for this line or the GPU is lost.
            with suppress(Exception):
                self._end_stage(complete=False)
            raise
        self._end_stage(complete=True)

    def _end_stage(self, complete: bool) -> None:
        """Write what the innermost stage has left, and go on with the one around it."""
        self.chosen.stage_ends()
        ended = self.stages[-1]
        try:
            self._write_window(last=True)
        finally:
            self.stages.pop()
        ended.peak = max(ended.peak, peak_bytes(self.device))
        self._write(
            kind="stage",
            stage=ended.name,
            iteration=ended.iteration,
            end=time.time(),
            complete=complete,
            peak_memory=ended.peak,
        )
        if self.stages:
            outer = self.stages[-1]
            outer.peak = max(outer.peak, ended.peak)
            outer.window_start = time.time()
            self._open_window("other")
            self.chosen.stage_begins(outer.name, outer.iteration, outer.step)

    def mark(self, phase: str, **counts: float) -> None:
        if not self.stages:
            return
        stage = self.stages[-1]
        running = stage.marks[-1]
        if running[0] == phase and running[2] == stage.step:
            # The same phase goes on: no new stamp, which on a GPU is an event.
            for name, value in counts.items():
                running[3][name] = running[3].get(name, 0) + value
            return
        stage.marks.append((phase, self.clock.stamp(), stage.step, counts))

    def step(self) -> None:
        if not self.stages:
            return
        self.stages[-1].step += 1
        if self.chosen.turns_at(self.stages[-1].step):
            # Starting and writing a trace takes seconds, which are no other phase's.
            self.mark("trace")
            self.chosen.step_ends(self.stages[-1].step)
        if perf_counter() >= self._next_flush:
            self._write_window()

    def note(self, **values: Any) -> None:
        """Facts about the running stage, written at once: a stage that is killed needs them too."""
        if self.stages:
            stage = self.stages[-1]
            self._write(kind="note", stage=stage.name, iteration=stage.iteration, **values)

    def close(self) -> None:
        """The process ends by itself."""
        self._write(kind="end", time=time.time())

    def _open_window(self, phase: str) -> None:
        stage = self.stages[-1]
        self.clock.settle()
        stage.marks = [(phase, self.clock.stamp(), stage.step, {})]
        self._next_flush = perf_counter() + self.flush_seconds

    def _write_window(self, last: bool = False) -> None:
        """Sum the marks that have happened into a line. With `last`, all of them: the window ends now."""
        stage, clock = self.stages[-1], self.clock
        if last:
            stage.marks.append(("", clock.stamp(), stage.step, {}))
            clock.settle()
        ready = len(stage.marks) - 1
        while ready > 0 and not clock.happened(stage.marks[ready][1]):
            ready -= 1
        self._next_flush = perf_counter() + self.flush_seconds
        if ready == 0:
            return
        seconds: dict[str, float] = {}
        totals: dict[str, Counts] = {}
        chosen: dict[int, list[tuple[str, float, float]]] = {}
        at = stage.window_start
        for place in range(ready):
            phase, stamp, step, counts = stage.marks[place]
            lasted = clock.seconds(stamp, stage.marks[place + 1][1])
            seconds[phase] = seconds.get(phase, 0.0) + lasted
            into = totals.setdefault(phase, {})
            for name, value in counts.items():
                into[name] = into.get(name, 0) + value
            if step + 1 in self.chosen:
                chosen.setdefault(step + 1, []).append((phase, at, round(lasted, 7)))
            at += lasted
            clock.drop(stamp)
        steps = stage.marks[ready][2] - stage.written_steps
        stage.peak = max(stage.peak, peak_bytes(self.device))
        head = {"stage": stage.name, "iteration": stage.iteration}
        self._write(
            kind="window",
            **head,
            start=stage.window_start,
            end=at,
            steps=steps,
            peak_memory=stage.peak,
            seconds={phase: round(value, 6) for phase, value in seconds.items()},
            counts={phase: found for phase, found in totals.items() if found},
        )
        for step, spans in chosen.items():
            if step > stage.step:
                continue  # what follows the stage's last step is none
            self._write(kind="step", **head, step=step, spans=spans)
        stage.marks = stage.marks[ready:]
        stage.window_start = at
        stage.written_steps += steps

    def _write(self, **line: Any) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(encode(line))
        except OSError:
            # Half a line may have been written; the next attempt cuts it off, if nothing comes behind it.
            self.path = None
            raise


def open_spans(folder: Path, chosen: ChosenSteps, flush_seconds: float = FLUSH_SECONDS) -> Spans:
    """This rank's recorder, in RUN/spans; earlier attempts stay in the file. A collective."""
    began, device = command_began(), ranks.device()
    attempt = ranks.on_first(lambda: round(time.time(), 3))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{ranks.rank()}.jsonl"
    cut_torn_line(path)
    spans = Spans(path, device, clock=clock_for(device), chosen=chosen, flush_seconds=flush_seconds)
    now = time.time()
    began = now if began is None else began
    spans._write(
        kind="attempt",
        attempt=attempt,
        rank=ranks.rank(),
        ranks=ranks.world_size(),
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        time=began,
    )
    spans._write(
        kind="window",
        stage="start",
        iteration=0,
        start=began,
        end=now,
        steps=0,
        peak_memory=0,
        seconds={"load": round(now - began, 6)},
        counts={},
    )
    return spans


def no_spans() -> Spans:
    """A recorder that records nothing."""
    return Spans(None, torch.device("cpu"))
