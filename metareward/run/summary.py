"""The tables at the end of a run, computed from its files: stages, judgments, pairs, training."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metareward.preference.bias import (
    ScoredVerdict,
    higher_score_preference,
    position_preference,
    position_preference_at_equal_scores,
    score_entropy,
)
from metareward.preference.caps import score_class
from metareward.run.directory import IterationFiles, RunDirectory, open_existing
from metareward.run.jsonl import Line, read_jsonl
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
        **response_figures(files),
        **judgment_figures(files),
        **pair_figures(events, number, "actor_pairs"),
        **comparison_figures(files),
        **pair_figures(events, number, "judge_pairs"),
        **training_figures(events, number),
        **logprob_figures(events, number),
    }


def response_figures(files: IterationFiles) -> Figures:
    responses = read_jsonl(files.responses)
    finished = [line for line in responses if line["finished"]]
    duplicates = sum(line["duplicate_of"] is not None for line in responses)
    return {
        "responses": f"{len(responses)} ({len(responses) - len(finished)} unfinished, {duplicates} duplicates)",
        "response length, characters": average([len(line["text"]) for line in responses], 0),
    }


def judgment_figures(files: IterationFiles) -> Figures:
    judgments = read_jsonl(files.judgments)
    scores = [line["score"] for line in judgments if line["score"] is not None]
    histogram = Counter(score_class(score) for score in scores)
    by_response: dict[tuple[str, int], list[float]] = defaultdict(list)
    for line in judgments:
        if line["score"] is not None:
            by_response[line["prompt_id"], line["response_id"]].append(line["score"])
    return {
        "judgments": str(len(judgments)),
        "parse rate": percent(len(scores), len(judgments)),
        "judgment length, characters": average([len(line["text"]) for line in judgments], 0),
        "score mean": average(scores, 2),
        "scores 0 1 2 3 4 5": " ".join(str(histogram.get(score, 0)) for score in range(6)),
        "score entropy, nat": decimal(score_entropy({float(key): count for key, count in histogram.items()})),
        "tie rate": tie_rate(by_response),
    }


def tie_rate(by_response: dict[tuple[str, int], list[float]]) -> str:
    """Share of prompts whose best and worst mean score are equal, among those with two or more scored responses."""
    means: dict[str, list[float]] = defaultdict(list)
    for (prompt_id, _), scores in by_response.items():
        means[prompt_id].append(sum(scores) / len(scores))
    several = [values for values in means.values() if len(values) >= 2]
    return percent(sum(max(values) - min(values) < 1e-9 for values in several), len(several))


def comparison_figures(files: IterationFiles) -> Figures:
    if not files.comparisons.is_file():
        return {}
    scores = {
        (line["prompt_id"], line["response_id"], line["judgment_id"]): line["score"]
        for line in read_jsonl(files.judgments)
    }
    comparisons = read_jsonl(files.comparisons)
    verdicts = [scored_verdict(line, scores) for line in comparisons]
    return {
        "comparisons": str(len(comparisons)),
        "readable winners": percent(sum(verdict.winner is not None for verdict in verdicts), len(verdicts)),
        "position preference (first)": share(position_preference(verdicts)),
        "  of equal scores": share(position_preference_at_equal_scores(verdicts)),
        "higher-score preference": share(higher_score_preference(verdicts)),
    }


def scored_verdict(line: Line, scores: dict[tuple[str, int, int], float]) -> ScoredVerdict:
    key = (line["prompt_id"], line["response_id"])
    return ScoredVerdict(line["winner"], scores[*key, line["first"]], scores[*key, line["second"]])


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


def average(values: list[float] | list[int], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f}" if values else "none"


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def decimal(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
