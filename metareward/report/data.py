"""A run read into plain figures: what the charts, the page and the terminal tables are made from.

Reads a run at any point of its life; what is not there yet is None or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metareward.config import Recipe
from metareward.report.assessments import Assessment, read_assessments
from metareward.run.directory import IterationFiles, RunDirectory, open_existing
from metareward.run.figures import (
    ComparisonFigures,
    JudgmentFigures,
    ResponseFigures,
    comparison_figures,
    judgment_figures,
    response_figures,
)
from metareward.run.jsonl import read_jsonl
from metareward.run.metrics import read_metrics
from metareward.run.summary import iteration_figures, last, stage_figures

Event = dict[str, Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Range = tuple[float, ...]
"""Values at QUANTILES."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs of one kind in one iteration: how many were kept, and how many were dropped for which reason."""

    kept: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class IterationData:
    """Figures of one iteration; lengths in characters. `steps` are the training's events in order, each step once.

    `elo_gaps`: Elo of the chosen minus Elo of the rejected judgment, over the iteration's judge pairs. `table`: label -> text,
    as `metareward summary` prints it.
    """

    number: int
    responses: ResponseFigures | None
    response_lengths: Range | None
    judgments: JudgmentFigures | None
    judgment_lengths: Range | None
    comparisons: ComparisonFigures | None
    elo_gaps: Range | None
    pairs: dict[str, Pairs]
    steps: list[Event]
    guard: list[Event]
    table: dict[str, str]


@dataclass(frozen=True)
class RunData:
    """One run. `stages`: an entry a stage and iteration, in the order they ran; see `stage_figures`."""

    label: str
    root: Path
    recipe: Recipe
    finished: bool
    seed_steps: list[Event]
    stages: list[Event]
    iterations: list[IterationData]
    implementations: dict[str, str]
    ranks: int | None
    assessments: list[Assessment]
    unread_assessments: list[str]

    @property
    def seconds(self) -> float:
        """Time of all stages, in seconds; of a stage that was killed, what it took when it went on."""
        return float(sum(entry["seconds"] for entry in self.stages))


def read_run(root: Path, label: str) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: `root` is not a run directory, or one of its files was damaged.
    """
    run, recipe = open_existing(root)
    events = read_metrics(root)
    numbers = [
        number for number in range(1, len(recipe.iteration) + 1) if run.iteration(number).responses.is_file()
    ]
    assessments, unread = read_assessments(root / "assessments")
    told: Event = next((event for event in reversed(events) if "implementations" in event), {})
    return RunData(
        label=label,
        root=root,
        recipe=recipe,
        finished=any(event["event"] == "finished" for event in events),
        seed_steps=steps_of(events, 0),
        stages=stage_figures(events),
        iterations=[read_iteration(run, number, events) for number in numbers],
        implementations=dict(told.get("implementations", {})),
        ranks=told.get("ranks"),
        assessments=assessments,
        unread_assessments=unread,
    )


def read_iteration(run: RunDirectory, number: int, events: list[Event]) -> IterationData:
    files = run.iteration(number)
    responses = read_jsonl(files.responses, without=["token_ids"])
    judgments = read_jsonl(files.judgments, without=["token_ids"]) if files.judgments.is_file() else []
    comparisons = read_jsonl(files.comparisons) if files.comparisons.is_file() else []
    return IterationData(
        number=number,
        responses=response_figures(responses),
        response_lengths=quantiles([len(line["text"]) for line in responses]),
        judgments=judgment_figures(judgments) if judgments else None,
        judgment_lengths=quantiles([len(line["text"]) for line in judgments]),
        comparisons=comparison_figures(comparisons, judgments) if comparisons else None,
        elo_gaps=elo_gaps(files),
        pairs=pairs_of(events, number),
        steps=steps_of(events, number),
        guard=[
            event
            for stage in ("judge", "compare")
            if (event := last(events, "guard", stage, number)) is not None
        ],
        table=iteration_figures(run, number, events) if judgments else {},
    )


def elo_gaps(files: IterationFiles) -> Range | None:
    if not files.judge_pairs.is_file():
        return None
    return quantiles([line["chosen_elo"] - line["rejected_elo"] for line in read_jsonl(files.judge_pairs)])


def pairs_of(events: list[Event], number: int) -> dict[str, Pairs]:
    """Kind ("actor", "judge") -> the pairs that training used and, from selection to training, those that were dropped."""
    found = {}
    trained = last(events, "preference_set", "train", number) or {}
    for kind in ("actor", "judge"):
        event = last(events, "pairs", f"{kind}_pairs", number)
        if event is None:
            continue
        dropped = dict(event["dropped"])
        kept = event["kept"]
        if trained:
            for reason in ("identical", "too_long"):
                if count := trained.get(f"{kind}_{reason}", 0):
                    dropped[f"{reason}_in_training"] = count
            used = trained.get(kind, 0)
            # What neither was used nor has a reason fell to pairs.max_judge_share.
            beyond = (
                kept - used - sum(trained.get(f"{kind}_{reason}", 0) for reason in ("identical", "too_long"))
            )
            if beyond > 0:
                dropped["judge_share_cap"] = beyond
            kept = used
        found[kind] = Pairs(kept, dropped)
    return found


def steps_of(events: list[Event], number: int) -> list[Event]:
    """The optimizer steps of an iteration (0: of the seed stage); of a step that was done again, the last."""
    steps = {
        event["step"]: event for event in events if event["event"] == "step" and event["iteration"] == number
    }
    return [steps[step] for step in sorted(steps)]


def quantiles(values: Sequence[float]) -> Range | None:
    return tuple(float(value) for value in np.quantile(values, QUANTILES)) if values else None


def labels_of(roots: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many parents as it takes to tell them apart."""
    parts = [root.absolute().parts for root in roots]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(item[-depth:]) for item in parts]
        if len(set(labels)) == len(labels):
            return labels
    # One run given twice.
    return [f"{'/'.join(item[-1:])} ({number})" for number, item in enumerate(parts, 1)]
