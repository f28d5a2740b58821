"""Charts of the optimizer's steps."""

from __future__ import annotations

import math

from metareward.report import drawing
from metareward.report.chart import (
    Chart,
    Panel,
    iteration_colours,
    iteration_names,
    legend_of,
    panels_of,
    run_colour,
    span,
)
from metareward.report.data import Event, RunData

Curve = tuple[list[float], list[float]]
"""Step numbers and values."""


def training_charts(runs: list[RunData]) -> list[Chart]:
    begins_at_ln2 = all(run.recipe.train.loss == "dpo" for run in runs)
    return [
        training(
            runs,
            "loss",
            "Training loss",
            "What the optimizer brings down. With DPO it starts at 0.69, a coin toss between chosen and rejected, "
            "and should sink slowly; a fall close to 0 within an iteration means that it learns the pairs by "
            "heart.",
            (math.log(2), "ln 2, where DPO starts") if begins_at_ln2 else None,
        ),
        training(
            runs,
            "accuracy",
            "Pairs put in the right order",
            "Share of the pairs of a step whose chosen text has gained more than the rejected one since the "
            "training began; 0 in the first step, when nothing has moved. Above 50 % and rising is learning, 100 "
            "% early is learning by heart.",
            (0.5, "a coin toss"),
        ),
        training(
            runs,
            "margin",
            "Margin",
            "How far the model has moved towards the chosen and away from the rejected texts. It should grow from "
            "0; very large values mean that it has gone far from the model it started from.",
            (0.0, "no difference"),
        ),
        seed_loss(runs),
    ]


def training(
    runs: list[RunData], name: str, title: str, sentence: str, reference: tuple[float, str] | None
) -> Chart:
    """A figure of every optimizer step: a panel a run, a line an iteration."""
    names, colours = iteration_names(runs), iteration_colours(runs)
    curves = {
        (run.label, item.number): curve
        for run in runs
        for item in run.iterations
        if (curve := curve_of(item.steps, name)) is not None
    }
    percent = name.startswith("accuracy")
    level = () if reference is None else (reference[0],)
    limits = (-0.03, 1.03) if percent else span([*level, *(y for curve in curves.values() for y in curve[1])])

    def draw(run: RunData) -> str | None:
        own = {number: curve for (label, number), curve in curves.items() if label == run.label}
        if not own:
            return None
        return drawing.lines(
            {f"iteration {number}": curve for number, curve in own.items()},
            [colours[number - 1] for number in own],
            label="step",
            percent=percent,
            reference=reference,
            limits=limits,
        )

    legend = legend_of(names, colours) if names else []
    return Chart(title, sentence, panels_of(runs, draw), legend, missing="No training step yet.")


def curve_of(steps: list[Event], name: str) -> Curve | None:
    """The steps that have the figure, long curves thinned."""
    known = [(float(step["step"]), float(step[name])) for step in steps if is_finite(step.get(name))]
    return drawing.thinned([place for place, _ in known], [value for _, value in known]) if known else None


def is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def seed_loss(runs: list[RunData]) -> Chart:
    curves = {run.label: curve for run in runs if (curve := curve_of(run.seed_steps, "loss")) is not None}
    colours = [run_colour(index) for index, run in enumerate(runs) if run.label in curves]
    return Chart(
        "Loss of the seed stage",
        "How well the model imitates the judgments made from people's labels, before the first iteration. It "
        "should sink and level off.",
        [Panel("", drawing.lines(curves, colours, label="step"))] if curves else [],
        legend_of(list(curves), colours) if len(runs) > 1 else [],
        missing="This run has no seed stage, or it has not begun.",
    )
