"""The tables at the end of a run, computed from its files: stages, judgments, pairs, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metareward.run.directory import IterationFiles, RunDirectory, open_existing
from metareward.run.figures import comparison_figures, judgment_figures, response_figures
from metareward.run.jsonl import read_jsonl
from metareward.run.metrics import read_metrics

WIDTH = 118
Figures = dict[str, Any]


def print_summary(root: Path) -> None:
    """Print every table of a run, finished or not.

    Raises:
        UserError: `root` is not a run directory.
    """
    run, recipe = open_existing(root)
    events = read_metrics(root)
    console = Console(width=WIDTH)
    console.print(stage_table(stage_figures(events)))
    numbers = [
        number for number in range(1, len(recipe.iteration) + 1) if run.iteration(number).judgments.is_file()
    ]
    for event in reversed(events):
        if "implementations" in event:
            ops = ", ".join(f"{op}: {name}" for op, name in event["implementations"].items())
            console.print(f"Kernels of the last sampling stage: {ops}")
            break
    columns = {number: iteration_figures(run, number, events) for number in numbers}
    if columns:
        console.print(iteration_table(columns))


def stage_figures(events: list[Figures]) -> list[Figures]:
    """One entry a stage and iteration; a stage that was interrupted and went on is added up."""
    found: dict[tuple[int, str], Figures] = {}
    for event in events:
        if event["event"] != "stage":
            continue
        key = (event["iteration"], event["stage"])
        entry = found.setdefault(
            key, {"iteration": key[0], "stage": key[1], "seconds": 0.0, "requests": 0, "tokens": 0}
        )
        entry["seconds"] += event["seconds"]
        entry["requests"] += event.get("requests", 0)
        entry["tokens"] += event.get("tokens", event.get("new_tokens", 0))
        for name in ("prompt_tokens", "prefill_tokens"):
            if name in event:
                entry[name] = entry.get(name, 0) + event[name]
    return list(found.values())


def stage_table(stages: list[Figures]) -> Table:
    table = Table(title="Stages (tokens: sampled, or computed in training)", width=WIDTH)
    for name in (
        "iteration",
        "stage",
        "seconds",
        "requests",
        "tokens",
        "tokens/s",
        "prompt tokens",
        "of which computed",
    ):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for entry in stages:
        rate = entry["tokens"] / entry["seconds"] if entry["seconds"] > 0 and entry["tokens"] else None
        prompt, computed = entry.get("prompt_tokens"), entry.get("prefill_tokens")
        table.add_row(
            "seed" if entry["iteration"] == 0 else str(entry["iteration"]),
            entry["stage"],
            f"{entry['seconds']:.1f}",
            str(entry["requests"]),
            f"{entry['tokens']:,}" if entry["tokens"] else "",
            f"{rate:,.0f}" if rate else "",
            f"{prompt:,}" if prompt else "",
            f"{computed / prompt:.0%}" if prompt and computed else "",
        )
    total = sum(entry["seconds"] for entry in stages)
    table.add_section()
    table.add_row("", "all", f"{total:.1f}", "", "", "", "", "")
    return table


def iteration_figures(run: RunDirectory, number: int, events: list[Figures]) -> Figures:
    """Label -> text, in the order of the table."""
    files = run.iteration(number)
    return {
        **response_rows(files),
        **judgment_rows(files),
        **pair_figures(events, number, "actor_pairs"),
        **comparison_rows(files),
        **pair_figures(events, number, "judge_pairs"),
        **training_figures(events, number),
        **logprob_figures(events, number),
    }


def response_rows(files: IterationFiles) -> Figures:
    found = response_figures(read_jsonl(files.responses, without=["token_ids"]))
    return {
        "responses": f"{found.responses} ({found.unfinished} unfinished, {found.duplicates} duplicates)",
        "response length, characters": decimal(found.length_mean, 0),
    }


def judgment_rows(files: IterationFiles) -> Figures:
    found = judgment_figures(read_jsonl(files.judgments, without=["token_ids"]))
    return {
        "judgments": str(found.judgments),
        "parse rate": share(found.parse_rate),
        "judgment length, characters": decimal(found.length_mean, 0),
        "score mean": decimal(found.score_mean),
        "scores 0 1 2 3 4 5": " ".join(map(str, found.histogram)),
        "score entropy, nat": decimal(found.entropy),
        "tie rate": share(found.tie_rate),
    }


def comparison_rows(files: IterationFiles) -> Figures:
    if not files.comparisons.is_file():
        return {}
    found = comparison_figures(
        read_jsonl(files.comparisons), read_jsonl(files.judgments, without=["token_ids", "text"])
    )
    return {
        "comparisons": str(found.comparisons),
        "readable winners": share(found.decided / found.comparisons if found.comparisons else None),
        "position preference (first)": share(found.first_preference),
        "  of equal scores": share(found.first_preference_at_equal_scores),
        "higher-score preference": share(found.higher_score_preference),
    }


def pair_figures(events: list[Figures], number: int, stage: str) -> Figures:
    event = last(events, "pairs", stage, number)
    if event is None:
        return {}
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(event["dropped"].items()))
    return {
        f"{stage.replace('_', ' ')} kept": f"{event['kept']}",
        "  dropped" + " " * (stage == "judge_pairs"): dropped or "none",
    }


def training_figures(events: list[Figures], number: int) -> Figures:
    """First and last step; a step that was done again after a restart counts once."""
    steps = {
        event["step"]: event for event in events if event["event"] == "step" and event["iteration"] == number
    }
    if not steps:
        return {}
    first, final = steps[min(steps)], steps[max(steps)]
    figures = {"DPO steps": str(len(steps))}
    for name in ("loss", "accuracy", "margin"):
        figures[f"DPO {name}, first -> last step"] = f"{first[name]:.4f} -> {final[name]:.4f}"
    return figures


def logprob_figures(events: list[Figures], number: int) -> Figures:
    """Sampler against trainer on the same tokens, over the sampling stages of an iteration."""
    found = [event for event in events if event["iteration"] == number and "logprob_difference_mean" in event]
    if not found:
        return {}
    tokens = sum(event["logprob_difference_tokens"] for event in found)
    mean = (
        sum(event["logprob_difference_mean"] * event["logprob_difference_tokens"] for event in found) / tokens
    )
    largest = max(event["logprob_difference_max"] for event in found)
    return {"sampler - trainer log-prob, nat": f"{mean:.2g} mean, {largest:.2g} max"}


def iteration_table(columns: dict[int, Figures]) -> Table:
    table = Table(title="Iterations", width=WIDTH)
    table.add_column("figure")
    for number in columns:
        table.add_column(f"iteration {number}", justify="right")
    labels = list(dict.fromkeys(label for figures in columns.values() for label in figures))
    for label in labels:
        table.add_row(label, *(figures.get(label, "") for figures in columns.values()))
    return table


def last(events: list[Figures], event: str, stage: str, number: int) -> Figures | None:
    found = [
        item for item in events if (item["event"], item["stage"], item["iteration"]) == (event, stage, number)
    ]
    return found[-1] if found else None


def share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def decimal(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
