"""Charts of what was measured from outside of a run: against another model, and against people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from metareward.report import drawing
from metareward.report.assessments import Figure
from metareward.report.chart import Chart, Panel
from metareward.report.data import RunData

LABEL_CHARACTERS = 28
CHANCE = {"win_rate": 0.5, "spearman": 0.0, "pairwise": 0.5, "accuracy": 0.5}
"""What a figure is where there is nothing but chance, by its last key."""
WORDS = {
    "win_rate": "win rate",
    "length_controlled": "length-controlled",
    "spearman": "rank correlation",
    "pairwise": "pairs put in people's order",
    "accuracy": "preferred answers scored higher",
    "sampled": "sampled scores",
    "expected": "expected scores",
}


@dataclass(frozen=True)
class Rows:
    """One figure of several models, as (whose it is, the figure). `chance`: see CHANCE."""

    chance: float | None
    rows: list[tuple[str, drawing.Estimate]] = field(default_factory=list)


def win_rates(runs: list[RunData]) -> Chart:
    return assessed(
        runs,
        "Win rates",
        "How often answers of the model beat those of another, judged in both orders; the line is the interval of "
        "chance. Above 50 % is better than the other model, and only an interval that stays above 50 % is more "
        "than luck.",
        lambda figure: figure.is_win_rate,
        "No win rate has been measured. Make the folder `RUN/assessments`, measure one with "
        "`metareward assess responses ... --json RUN/assessments/NAME.json`, and draw this report again.",
    )


def agreement(runs: list[RunData]) -> Chart:
    return assessed(
        runs,
        "Judge against people",
        "How far the judge's scores agree with people's: correlations go from -1 over 0 (none) to 1; the line is "
        "the interval of chance, the dashed level what guessing reaches. They should not sink from one iteration to "
        "the next.",
        lambda figure: figure.is_agreement,
        "The judge has not been held against people. Make the folder `RUN/assessments`, do it with "
        "`metareward assess judge ... --json RUN/assessments/NAME.json`, and draw this report again.",
    )


def assessed(
    runs: list[RunData], title: str, sentence: str, wanted: Callable[[Figure], bool], missing: str
) -> Chart:
    """The figures that are wanted: a panel a figure, a row for each model that it was measured of."""
    panels = []
    for run in runs:
        for label, found in rows_by_figure(run, wanted).items():
            svg = drawing.estimates(
                [short(name) for name, _ in found.rows],
                [estimate for _, estimate in found.rows],
                percent=found.chance == 0.5,
                reference=found.chance,
            )
            panels.append(Panel(f"{run.label}: {label}" if len(runs) > 1 else label, svg))
    return Chart(title, sentence, panels, missing=missing)


def rows_by_figure(run: RunData, wanted: Callable[[Figure], bool]) -> dict[str, Rows]:
    """Name of a figure -> the figure. Where a file is about one model, it is the file's name that tells whose."""
    found: dict[str, Rows] = {}
    for item in run.assessments:
        for figure in item.figures:
            if wanted(figure) and figure.value is not None:
                told = in_words(figure.name)
                rows = found.setdefault(
                    f"{item.name}: {told}" if figure.subject else told, Rows(CHANCE.get(figure.leaf))
                ).rows
                rows.append((figure.subject or item.name, (figure.value, figure.low, figure.high)))
    return found


def in_words(name: str) -> str:
    """A figure's name for a reader: the figure, then what it is of."""
    *of, leaf = [WORDS.get(key, key.replace("_", " ")) for key in name.split(" / ")]
    return f"{leaf} ({', '.join(of)})" if of else leaf


def short(name: str) -> str:
    """Cut at the front: names differ at their end. The whole name stands in the table of the assessment."""
    return name if len(name) <= LABEL_CHARACTERS else "…" + name[1 - LABEL_CHARACTERS :]
