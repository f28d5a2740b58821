"""What a chart of the report is: drawings with one plain sentence on what they show and what is good or bad.

A chart that compares iterations has a panel for each run, all with the same scale; one that follows a single figure has a line for
each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from metareward.report import drawing
from metareward.report.data import IterationData, Range, RunData

Legend = list[tuple[str, str]]
"""Name and CSS colour."""


@dataclass(frozen=True)
class Panel:
    """A drawing with a name, which is empty where there is only one."""

    label: str
    svg: str


@dataclass(frozen=True)
class Chart:
    """A drawing or several, or in their place why there is none and how to get one (`missing`, with `code`)."""

    title: str
    sentence: str
    panels: list[Panel] = field(default_factory=list)
    legend: Legend = field(default_factory=list)
    missing: str = ""


def legend_of(names: Sequence[str], colours: Sequence[str]) -> Legend:
    return [(name, drawing.variable(colour)) for name, colour in zip(names, colours, strict=True)]


def run_colour(index: int) -> str:
    return drawing.SERIES[index % len(drawing.SERIES)]


def panels_of(runs: list[RunData], draw: Callable[[RunData], str | None]) -> list[Panel]:
    """A panel for each run that has something to draw."""
    drawn = [(run.label if len(runs) > 1 else "", draw(run)) for run in runs]
    return [Panel(label, svg) for label, svg in drawn if svg is not None]


def iteration_names(runs: list[RunData]) -> list[str]:
    most = max((len(run.iterations) for run in runs), default=0)
    return [f"iteration {number}" for number in range(1, most + 1)]


def iteration_colours(runs: list[RunData]) -> list[str]:
    return drawing.ramp(max(1, len(iteration_names(runs))))


def span(
    values: Iterable[float], *, at_least: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """Limits of an axis that holds all values, with some room; None where there are none."""
    known = [*values, *(at_least or ())]
    if not known:
        return None
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def by_run(
    runs: list[RunData],
    title: str,
    sentence: str,
    figure: Callable[[IterationData], float | None],
    missing: str,
    *,
    limits: tuple[float, float],
    percent: bool = False,
    reference: tuple[float, str] | None = None,
) -> Chart:
    """One figure of every iteration: a line a run."""
    series, colours = {}, []
    for index, run in enumerate(runs):
        values = [figure(item) for item in run.iterations]
        if any(value is not None for value in values):
            series[run.label] = ([float(item.number) for item in run.iterations], values)
            colours.append(run_colour(index))
    if not series:
        return Chart(title, sentence, missing=missing)
    svg = drawing.lines(
        series, colours, label="iteration", percent=percent, reference=reference, limits=limits, whole=True
    )
    return Chart(title, sentence, [Panel("", svg)], legend_of(list(series), colours) if len(runs) > 1 else [])


def distributions(
    runs: list[RunData],
    title: str,
    sentence: str,
    figure: Callable[[IterationData], Range | None],
    label: str,
    missing: str,
) -> Chart:
    """A distribution of every iteration: a panel a run, a row an iteration."""
    colours = iteration_colours(runs)
    limits = span(value for run in runs for item in run.iterations for value in figure(item) or ())

    def draw(run: RunData) -> str | None:
        rows = [(item.number, found) for item in run.iterations if (found := figure(item)) is not None]
        if not rows:
            return None
        return drawing.ranges(
            [f"iteration {number}" for number, _ in rows],
            [found for _, found in rows],
            [colours[number - 1] for number, _ in rows],
            label,
            limits,
        )

    return Chart(title, sentence, panels_of(runs, draw), missing=missing)
