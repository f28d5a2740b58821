"""Charts of what was measured from outside of a run: against another model, and against people."""

from __future__ import annotations

from collections.abc import Callable

from metareward.report import drawing
from metareward.report.assessments import Figure
from metareward.report.chart import Chart, Panel
from metareward.report.data import RunData

LABEL_CHARACTERS = 28


def win_rates(runs: list[RunData]) -> Chart:
    return assessed(
        runs,
        "Win rates",
        "How often answers of the model beat those of another, judged in both orders; the line is the interval of "
        "chance. Above 50 % is better than the other model, and only an interval that stays above 50 % is more "
        "than luck.",
        lambda figure: figure.is_win_rate,
        0.5,
        "No win rate has been measured. Make the folder `RUN/assessments`, measure one with "
        "`metareward assess responses ... --json RUN/assessments/NAME.json`, and draw this report again.",
    )


def agreement(runs: list[RunData]) -> Chart:
    return assessed(
        runs,
        "Judge against people",
        "How far the judge's scores agree with people's: correlations go from -1 over 0 (none) to 1, shares from "
        "0 to 1; the line is the interval of chance. They should not sink from one iteration to the next.",
        lambda figure: figure.is_agreement,
        None,
        "The judge has not been held against people. Make the folder `RUN/assessments`, do it with "
        "`metareward assess judge ... --json RUN/assessments/NAME.json`, and draw this report again.",
    )


def assessed(
    runs: list[RunData],
    title: str,
    sentence: str,
    wanted: Callable[[Figure], bool],
    reference: float | None,
    missing: str,
) -> Chart:
    """The figures that are wanted: a panel a figure, a row for each model that it was measured of."""
    panels = []
    for run in runs:
        for label, rows in rows_by_figure(run, wanted).items():
            svg = drawing.estimates(
                [short(name) for name, _ in rows],
                [estimate for _, estimate in rows],
                percent=reference is not None,
                reference=reference,
            )
            panels.append(Panel(f"{run.label}: {label}" if len(runs) > 1 else label, svg))
    return Chart(title, sentence, panels, missing=missing)


def rows_by_figure(
    run: RunData, wanted: Callable[[Figure], bool]
) -> dict[str, list[tuple[str, drawing.Estimate]]]:
    """Name of a figure -> (whose it is, the figure). Where a file is about one model, it is the file's name that tells whose."""
    found: dict[str, list[tuple[str, drawing.Estimate]]] = {}
    for item in run.assessments:
        for figure in item.figures:
            if wanted(figure) and figure.value is not None:
                label = f"{item.name}: {figure.name}" if figure.subject else figure.name
                row = (figure.subject or item.name, (figure.value, figure.low, figure.high))
                found.setdefault(label, []).append(row)
    return found


def short(name: str) -> str:
    """Cut at the front: names differ at their end. The whole name stands in the table of the assessment."""
    return name if len(name) <= LABEL_CHARACTERS else "…" + name[1 - LABEL_CHARACTERS :]
