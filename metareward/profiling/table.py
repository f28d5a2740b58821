"""The profile of a run as tables in the terminal, and as a plain dictionary."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from metareward.profiling.figures import StageFigures, advice
from metareward.profiling.machine import Machine
from metareward.profiling.read import RunTime

WIDTH = 132


def print_profile(run: RunTime, figures: list[StageFigures], machine: Machine | None) -> None:
    """All tables, then what stands out, then what to improve first."""
    console = Console(width=WIDTH)
    console.print(time_table(run, figures))
    console.print(limit_table(figures))
    console.print(phase_table(figures))
    for sentence in remarks(run, machine):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(advice(figures, run.wall, machine is not None), highlight=False, soft_wrap=True)


def time_table(run: RunTime, figures: list[StageFigures]) -> Table:
    names = ("iteration", "stage", "seconds", "share", "requests/s", "prompt tokens", "reused", "new tokens")
    table = new_table("Time and tokens", *names, f"tokens/s {unit(run)}")
    for item in figures:
        rate = item.requests / item.time.seconds if item.requests and item.time.seconds > 0 else None
        table.add_row(
            *head(item),
            f"{item.time.seconds:,.1f}",
            f"{item.share:.1%}",
            number(rate, ".3g"),
            whole(item.prompt_tokens),
            f"{item.reused_tokens / item.prompt_tokens:.0%}" if item.prompt_tokens else "",
            whole(item.new_tokens),
            whole(item.tokens_per_s),
        )
    table.add_section()
    table.add_row(
        "", "outside stages", f"{run.outside:,.1f}", f"{run.outside / run.wall:.1%}" if run.wall else ""
    )
    table.add_row("", "wall time", f"{run.wall:,.1f}")
    return table


def limit_table(figures: list[StageFigures]) -> Table:
    table = new_table(
        "Against the limits of the machine",
        "iteration",
        "stage",
        "prefill MFU",
        "decode bandwidth",
        "mixed MFU",
        "mixed bandwidth",
        "training MFU",
        "seconds",
        "at the limit",
        "peak memory",
        "imbalance",
    )
    for item in figures:
        table.add_row(
            *head(item),
            *(percent(share) for share in (item.prefill_mfu, item.decode_bandwidth)),
            *(percent(share) for share in (item.mixed_mfu, item.mixed_bandwidth, item.train_mfu)),
            f"{item.time.seconds:,.1f}",
            number(item.limit, ",.1f"),
            f"{item.time.peak_memory / 2**30:.2f} GiB" if item.time.peak_memory else "",
            percent(item.time.imbalance if len(item.time.phases) > 1 else None),
        )
    return table


def phase_table(figures: list[StageFigures]) -> Table:
    """Seconds by phase, iterations added up, the phases that matter most on top."""
    stages = list(dict.fromkeys(item.time.stage for item in figures))
    found: dict[str, dict[str, float]] = {}
    for item in figures:
        for part in item.phases:
            row = found.setdefault(part.phase, {})
            row[item.time.stage] = row.get(item.time.stage, 0.0) + part.seconds
    table = new_table("Seconds by phase (mean over ranks), all iterations", "phase", *stages, "all")
    for phase, row in sorted(found.items(), key=lambda entry: -sum(entry[1].values())):
        cells = (f"{row[stage]:.1f}" if stage in row else "" for stage in stages)
        table.add_row(phase, *cells, f"{sum(row.values()):.1f}")
    return table


def remarks(run: RunTime, machine: Machine | None) -> list[str]:
    """What the tables do not tell: attempts, what the shares are of, a machine file of another machine."""
    found = []
    killed = sum(attempt.ended == "killed" for attempt in run.attempts)
    failed = sum(attempt.ended == "error" for attempt in run.attempts)
    if len(run.attempts) > 1 or killed or failed:
        stopped = sum(stage.stopped for stage in run.stages)
        found.append(
            f"{len(run.attempts)} attempts: {killed} killed or still running, {failed} ended by an error; {stopped:,.1f} s were "
            "spent in stages that their attempt did not finish."
        )
    if machine is None:
        return [
            *found,
            "No machine was measured, so there are no limits: `metareward profile --machine` measures it.",
        ]
    found.append(
        f"Limits: {machine.bandwidth / 1e9:,.1f} GB/s, {machine.rate('bfloat16') / 1e12:,.3g} TFLOP/s in bf16, "
        f"{machine.rate('float32') / 1e12:,.3g} in fp32, measured on {machine.device} ({machine.threads} threads)."
    )
    if machine.sheet is not None:
        found.append(
            f"MFU and bandwidth are shares of the data sheet: {machine.sheet.bfloat16 / 1e12:,.4g} TFLOP/s in bf16, "
            f"{machine.sheet.bandwidth / 1e9:,.0f} GB/s."
        )
    elif machine.kind == "cuda":
        found.append(
            f"No data sheet of {machine.device} is known, so MFU and bandwidth are shares of what was measured; add it to "
            "metareward/model/data_sheets.py."
        )
    device, threads = run.attempts[-1].device, run.attempts[-1].threads
    if device != "cpu" and device != machine.device:
        found.append(f"The run used {device}: the limits are those of another machine.")
    elif device == "cpu" and threads * run.attempts[-1].local_ranks != machine.threads:
        found.append(
            f"The run had {threads} threads a rank, {run.attempts[-1].local_ranks} ranks a machine: measure with "
            f"OMP_NUM_THREADS={threads * run.attempts[-1].local_ranks} for limits that fit."
        )
    return found


def as_dictionary(run: RunTime, figures: list[StageFigures], machine: Machine | None) -> dict[str, Any]:
    """Everything that is printed, unrounded, for other programs."""
    stages = []
    for item in figures:
        values = {name: value for name, value in asdict(item).items() if name not in ("time", "phases")}
        stages.append(
            {
                "stage": item.time.stage,
                "iteration": item.time.iteration,
                "seconds": item.time.seconds,
                "seconds_in_unfinished_attempts": item.time.stopped,
                "limit": item.limit,
                "peak_memory": item.time.peak_memory,
                "imbalance": item.time.imbalance,
                **values,
                "phases": {phase.phase: asdict(phase) for phase in item.phases},
            }
        )
    return {
        "wall_seconds": run.wall,
        "outside_stages": run.outside,
        "ranks": run.ranks,
        "attempts": [asdict(attempt) for attempt in run.attempts],
        "machine": None if machine is None else asdict(machine),
        "stages": stages,
        "advice": advice(figures, run.wall, machine is not None),
    }


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, width=WIDTH)
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("stage", "phase") else "right", no_wrap=name == "stage"
        )
    return table


def head(item: StageFigures) -> tuple[str, str]:
    return (str(item.time.iteration) if item.time.iteration else "", item.time.stage)


def unit(run: RunTime) -> str:
    return "a rank" if run.attempts[-1].device == "cpu" else "a GPU"


def whole(value: float) -> str:
    return f"{value:,.0f}" if value else ""


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
