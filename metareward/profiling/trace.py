"""Spans as a trace for Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev), in the Trace Event Format.

A process is a rank. Its thread "stages" shows the stages, "windows" the phases of every window as sums, one after the other
(their order within a window is not recorded), "steps" the spans of chosen steps as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metareward.profiling.read import Line, read_lines, span_files
from metareward.run.jsonl import check_writable, write_text

Event = dict[str, Any]
THREADS = ("stages", "windows", "steps")


def write_trace(run: Path, out: Path) -> int:
    """Write the trace of all ranks; returns its number of slices.

    Raises:
        UserError: no spans, or the place cannot be written.
    """
    check_writable(out)
    files = span_files(run)
    starts = [line["time"] for path in files for line in read_lines(path) if line["kind"] == "attempt"]
    origin = min(starts)
    events: list[Event] = []
    for path in files:
        rank = int(path.stem.split("-")[1])
        events += names(rank)
        events += slices(rank, read_lines(path), origin)
    write_text(out, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return sum(event["ph"] == "X" for event in events)


def names(rank: int) -> list[Event]:
    """How the viewer calls the rank and its rows."""
    head: Event = {"ph": "M", "pid": rank, "tid": 0, "name": "process_name", "args": {"name": f"rank {rank}"}}
    rows: list[Event] = [
        {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": name}}
        for number, name in enumerate(THREADS)
    ]
    return [head, *rows]


def slices(rank: int, lines: Iterator[Line], origin: float) -> Iterator[Event]:
    """The slices of one rank. Times in microseconds since `origin`."""

    def piece(row: str, name: str, start: float, seconds: float, **args: Any) -> Event:
        return {
            "ph": "X",
            "pid": rank,
            "tid": THREADS.index(row),
            "name": name,
            "ts": round((start - origin) * 1e6, 1),
            "dur": round(seconds * 1e6, 1),
            "args": args,
        }

    running: tuple[str, float, float] | None = None
    for line in lines:
        if line["kind"] == "step":
            for phase, start, seconds in line["spans"]:
                yield piece("steps", phase, start, seconds, step=line["step"], stage=line["stage"])
            continue
        if line["kind"] != "window":
            if running is not None:
                yield piece("stages", running[0], running[1], running[2] - running[1])
                running = None
            continue
        name = f"{line['stage']} {line['iteration']}" if line["iteration"] else line["stage"]
        if running is not None and running[0] != name:
            yield piece("stages", running[0], running[1], running[2] - running[1])
            running = None
        running = (name, line["start"] if running is None else running[1], line["end"])
        at = line["start"]
        for phase, seconds in line["seconds"].items():
            counts = line["counts"].get(phase, {})
            yield piece("windows", phase, at, seconds, stage=name, steps=line["steps"], **counts)
            at += seconds
    if running is not None:
        yield piece("stages", running[0], running[1], running[2] - running[1])
