"""What a run tells a plan: how long texts became, how many survived, and what share of the machine's limits was reached."""

from __future__ import annotations

from pathlib import Path

from metareward.errors import UserError
from metareward.profiling.figures import StageFigures, all_figures
from metareward.profiling.machine import Machine
from metareward.profiling.read import read_run
from metareward.run.directory import open_existing
from metareward.run.jsonl import read_jsonl
from metareward.run.metrics import read_metrics


def measured_values(root: Path, machine: Machine | None) -> dict[str, float]:
    """Values for `Assumptions`, of what the run has done so far; shares of limits only where a machine is given.

    Raises:
        UserError: not a run directory, or one without spans.
    """
    open_existing(root)
    figures = all_figures(read_run(root), machine)
    values = {**text_values(root, figures), **pair_values(root)}
    return values if machine is None else {**values, **reached_values(figures)}


def reached_values(figures: list[StageFigures]) -> dict[str, float]:
    """Shares of the limits over all stages; a step over prompts and next tokens counts for both. Training reaches what it computes
    again too, so that a plan may have another activation checkpointing than the run."""
    found: dict[str, float] = {}
    for name, phases in (
        ("prefill_reached", ("prefill", "mixed")),
        ("decode_reached", ("decode", "mixed")),
        ("sample_reached", ("sample",)),
        ("train_reached", ("forward", "backward")),
        ("optimizer_reached", ("optimizer",)),
    ):
        parts = [phase for item in figures for phase in item.phases if phase.phase in phases]
        seconds = sum(part.seconds for part in parts)
        limit = sum(part.limit_of_all for part in parts)
        if seconds > 0 and limit > 0:
            found[name] = limit / seconds
    sampled = [item for item in figures if item.new_tokens]
    steps = sum(item.time.steps for item in sampled)
    host = sum(part.seconds for item in sampled for part in item.phases if part.phase == "host")
    if steps:
        found["host_step"] = host / steps
    return found


def text_values(root: Path, figures: list[StageFigures]) -> dict[str, float]:
    """Mean lengths as shares of their limits."""
    recipe = open_existing(root)[1]
    limits = {
        "respond": ("response_share", recipe.respond.max_new_tokens),
        "judge": ("judgment_share", recipe.judge.max_new_tokens),
        "compare": ("comparison_share", recipe.meta_judge.max_new_tokens),
    }
    found: dict[str, float] = {}
    for stage, (name, limit) in limits.items():
        items = [item for item in figures if item.time.stage == stage]
        done = sum(item.time.count("completions") for item in items)
        if done:
            found[name] = sum(item.new_tokens for item in items) / done / limit
    return found


def pair_values(root: Path) -> dict[str, float]:
    """Shares of responses judged, of judgments read, of prompts that gave pairs."""
    run, recipe = open_existing(root)
    responses = judgments = judged = parsed = 0
    for number in range(1, len(recipe.iteration) + 1):
        files = run.iteration(number)
        if not files.judgments.is_file():
            continue
        answered, scored = read_jsonl(files.responses), read_jsonl(files.judgments)
        responses += len(answered)
        judged += sum(line["finished"] and line["duplicate_of"] is None for line in answered)
        judgments += len(scored)
        parsed += sum(line["finished"] and line["score"] is not None for line in scored)
    found = {}
    if responses and judgments:
        found = {"judged_share": judged / responses, "parsed_share": parsed / judgments}
    kept: dict[str, list[float]] = {}
    for event in read_metrics(root):
        if event["event"] == "pairs":
            kept.setdefault(event["stage"], []).append(event["kept"] / recipe.prompts.per_iteration)
    for stage, name in (("actor_pairs", "actor_pair_share"), ("judge_pairs", "judge_pair_share")):
        if stage in kept:
            found[name] = sum(kept[stage]) / len(kept[stage])
    return found


def check_useful(values: dict[str, float], root: Path) -> None:
    """Raises UserError where a run has nothing to tell."""
    if not values:
        raise UserError(
            f"{root} has finished no stage that tells a plan anything: give another run, or leave --rates out"
        )
