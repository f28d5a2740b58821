"""Charts of what a run made and what it took: lengths, pairs, time, throughput."""

from __future__ import annotations

from collections.abc import Sequence

from metareward.report import drawing
from metareward.report.chart import Chart, Panel, distributions, legend_of, panels_of, run_colour
from metareward.report.data import RunData

REASONS = {
    "too_few_scored": "fewer than two scored answers",
    "equal_scores": "best and worst score equal",
    "same_response": "one answer was both picks",
    "not_better": "chosen not better",
    "chosen_too_long": "chosen text too long",
    "no_verdicts": "no readable verdict",
    "tied": "judgments tied",
    "score_class_cap": "too many of one score",
    "collapse_guard": "dropped by the guard",
    "identical_in_training": "both texts the same",
    "too_long_in_training": "too many tokens",
    "judge_share_cap": "too many judge pairs",
}
STAGES = ("seed", "respond", "judge", "actor_pairs", "compare", "judge_pairs", "reference", "train")


def response_lengths(runs: list[RunData]) -> Chart:
    return distributions(
        runs,
        "Length of the answers",
        "The dot is the middle answer, the thick line the middle half, the thin line nine in ten. Lengths that "
        "grow from iteration to iteration mean that the judge rewards length; a larger rho holds against it.",
        lambda item: item.response_lengths,
        "characters",
        "No answers yet.",
    )


def pairs(runs: list[RunData], kind: str) -> Chart:
    """Pairs of one kind ("actor" or "judge"), kept and dropped."""
    found = [item.pairs[kind] for run in runs for item in run.iterations if kind in item.pairs]
    reasons = list(dict.fromkeys(reason for entry in found for reason in entry.dropped))
    others = drawing.SERIES[1:]
    colours = [drawing.SERIES[0], *(others[index % len(others)] for index in range(len(reasons)))]
    most = max((entry.kept + sum(entry.dropped.values()) for entry in found), default=0)

    def draw(run: RunData) -> str | None:
        items = [item for item in run.iterations if kind in item.pairs]
        if not items:
            return None
        parts: dict[str, Sequence[float]] = {"kept": [item.pairs[kind].kept for item in items]}
        parts |= {reason: [item.pairs[kind].dropped.get(reason, 0) for item in items] for reason in reasons}
        return drawing.stacks([f"iteration {item.number}" for item in items], parts, colours, "prompts", most)

    told = {
        "actor": "Each prompt can give one pair of a better and a worse answer.",
        "judge": "Each prompt can give one pair of a better and a worse judgment of the same answer.",
    }[kind]
    names = ["kept", *(REASONS.get(reason, reason.replace("_", " ")) for reason in reasons)]
    return Chart(
        f"Pairs of {'answers' if kind == 'actor' else 'judgments'}, kept and dropped",
        f"{told} Kept ones were trained on, the others dropped for the reason in the legend. "
        "Many drops for one reason say which setting to look at.",
        panels_of(runs, draw),
        legend_of(names, colours),
        missing="None selected yet."
        if kind == "actor"
        else "None: they come with the meta-judge, in iterations that have `meta_judge = true`.",
    )


def stage_seconds(runs: list[RunData]) -> Chart:
    seen = {entry["stage"] for run in runs for entry in run.stages if entry["seconds"] >= 1}
    used = [name for name in STAGES if name in seen] + sorted(seen - set(STAGES))
    colours = [run_colour(index) for index in range(len(used))]
    length, unit = time_unit(runs)
    most = max((seconds(run, number) for run in runs for number in numbers_of(run)), default=0.0) / length

    def draw(run: RunData) -> str | None:
        numbers = numbers_of(run)
        if not numbers or not used:
            return None
        parts = {name: [seconds(run, number, name) / length for number in numbers] for name in used}
        rows = ["seed" if number == 0 else f"iteration {number}" for number in numbers]
        return drawing.stacks(rows, parts, colours, unit, most)

    return Chart(
        "Time by stage",
        "Where the time went. The longest part is the one to make faster first; in a run of the paper's size "
        "these are judge and compare.",
        panels_of(runs, draw),
        legend_of([name.replace("_", " ") for name in used], colours),
        missing="No stage of a second or more has ended yet.",
    )


def numbers_of(run: RunData) -> list[int]:
    """Iterations in which a stage has ended; 0 is the seed stage."""
    return sorted({entry["iteration"] for entry in run.stages})


def seconds(run: RunData, number: int, stage: str | None = None) -> float:
    """Of one stage of an iteration, or of all."""
    return sum(
        float(entry["seconds"])
        for entry in run.stages
        if entry["iteration"] == number and stage in (None, entry["stage"])
    )


def time_unit(runs: list[RunData]) -> tuple[float, str]:
    """The unit that suits the longest run: seconds in it, and its name."""
    longest = max((run.seconds for run in runs), default=0.0)
    return (3600.0, "hours") if longest > 7200 else (60.0, "minutes") if longest > 600 else (1.0, "seconds")


def throughput(runs: list[RunData]) -> Chart:
    stages = [name for name in STAGES if any(rate(run, name) for run in runs)]
    colours = [run_colour(index) for index in range(len(runs))]
    series = {run.label: [rate(run, name) for name in stages] for run in runs}
    svg = drawing.bars(
        [name.replace("_", " ") for name in stages], series, colours, label="tokens a second", percent=False
    )
    return Chart(
        "Throughput",
        "Tokens a second in each stage, over all iterations and processes: sampled ones in respond, judge and "
        "compare, computed ones in seed, reference and train. Higher is faster; compare only runs of the same "
        "model on the same machine.",
        [Panel("", svg)] if stages else [],
        legend_of(list(series), colours) if len(runs) > 1 else [],
        missing="No stage with tokens has ended yet.",
    )


def rate(run: RunData, stage: str) -> float | None:
    """Tokens a second of one stage over the whole run."""
    entries = [entry for entry in run.stages if entry["stage"] == stage and entry["tokens"]]
    took = sum(entry["seconds"] for entry in entries)
    return sum(entry["tokens"] for entry in entries) / took if took else None
