"""Charts of the judge and the meta-judge: scores, what can be read, biases, Elo."""

from __future__ import annotations

from collections.abc import Callable

from metareward.report import drawing
from metareward.report.chart import (
    Chart,
    by_run,
    distributions,
    iteration_colours,
    iteration_names,
    legend_of,
    panels_of,
)
from metareward.report.data import IterationData, RunData
from metareward.run.figures import JudgmentFigures


def judge_charts(runs: list[RunData]) -> list[Chart]:
    return [
        score_distributions(runs),
        by_run(
            runs,
            "Mean score",
            "The average of all scores. It may rise as answers get better; if it runs towards 5 while the win "
            "rate stays, the judge has become generous, not the answers good.",
            of_judgments(lambda found: found.score_mean),
            "No judgments yet.",
            limits=(-0.1, 5.1),
        ),
        by_run(
            runs,
            "Spread of the scores (entropy)",
            "0 where every answer gets the same score, 1.79 where all six are used alike. A fall towards 0 is the "
            "sign of a collapsing judge.",
            of_judgments(lambda found: found.entropy),
            "No judgments yet.",
            limits=(-0.04, 1.85),
            reference=guard_limit(runs, "min_score_entropy"),
        ),
        by_run(
            runs,
            "Judgments that could be read",
            "Share of judgments that end in a score. Close to 100 % is good; the others are thrown away, and "
            "their time with them.",
            of_judgments(lambda found: found.parse_rate),
            "No judgments yet.",
            percent=True,
            limits=(-0.03, 1.05),
            reference=guard_limit(runs, "min_parse_rate"),
        ),
        by_run(
            runs,
            "Prompts whose answers all score the same",
            "Such a prompt gives no pair to learn from, so lower is better. It rises when the judge no longer "
            "tells answers apart.",
            of_judgments(lambda found: found.tie_rate),
            "No prompt has two scored answers yet.",
            percent=True,
            limits=(-0.03, 1.05),
        ),
        by_run(
            runs,
            "How far judgments of one answer differ",
            "Standard deviation, in points, of the scores that one answer gets when it is judged several times; "
            "2.5 is the most there can be. Lower is steadier, but 0 together with one score for everything says "
            "that the judge does not look at the answer.",
            of_judgments(lambda found: found.spread),
            "No answer has two readable scores yet.",
            limits=(-0.05, 2.55),
        ),
        distributions(
            runs,
            "Length of the judgments",
            "The dot is the middle judgment, the thick line the middle half, the thin line nine in ten. It should "
            "stay about as it is: much longer judgments cost time and are seldom better.",
            lambda item: item.judgment_lengths,
            "characters",
            "No judgments yet.",
        ),
    ]


def of_judgments(
    figure: Callable[[JudgmentFigures], float | None],
) -> Callable[[IterationData], float | None]:
    """A figure of an iteration's judgments; None where it has none yet."""
    return lambda item: None if item.judgments is None else figure(item.judgments)


def meta_judge_charts(runs: list[RunData]) -> list[Chart]:
    return [
        biases(runs),
        distributions(
            runs,
            "Elo between the best and the worst judgment",
            "How far apart the meta-judge puts the two judgments of a pair: a gap of 1 means odds of 2.7 to 1, of "
            "3 means 20 to 1. Gaps near 0 mean that it could hardly tell them apart, so the pairs teach little.",
            lambda item: item.elo_gaps,
            "Elo, natural log",
            "No judge pairs: they come with the meta-judge, in iterations that have `meta_judge = true`.",
        ),
    ]


def guard_limit(runs: list[RunData], setting: str) -> tuple[float, str] | None:
    """The limit of the collapse guard as a level to draw, where all runs have the same and it is on."""
    limits = {float(getattr(run.recipe.guard, setting)) for run in runs}
    limit = limits.pop()
    return (limit, "limit of the guard") if not limits and limit > 0 else None


def score_distributions(runs: list[RunData]) -> Chart:
    names, colours = iteration_names(runs), iteration_colours(runs)
    largest = max((max(shares_of(item)) for run in runs for item in run.iterations), default=0.0)

    def draw(run: RunData) -> str | None:
        judged = [item for item in run.iterations if item.judgments and item.judgments.readable]
        if not judged:
            return None
        return drawing.bars(
            [str(score) for score in range(6)],
            {f"iteration {item.number}": shares_of(item) for item in judged},
            [colours[item.number - 1] for item in judged],
            label="score",
            percent=True,
            highest=largest * 1.06,
        )

    return Chart(
        "Scores the judge gives",
        "Share of judgments that gave each score from 0 to 5. A healthy judge uses the whole scale; bars that "
        "pile up at one score, most often 5, say that it no longer tells answers apart.",
        panels_of(runs, draw),
        legend_of(names, colours) if names else [],
        missing="No judgments yet: they come with the judge stage.",
    )


def shares_of(item: IterationData) -> list[float]:
    """Share of each score class among the readable scores."""
    if item.judgments is None or not item.judgments.readable:
        return [0.0]
    return [count / item.judgments.readable for count in item.judgments.histogram]


def biases(runs: list[RunData]) -> Chart:
    names = ("prefers the one shown first", "prefers it at equal scores", "prefers the higher score")
    colours = drawing.SERIES[:3]

    def draw(run: RunData) -> str | None:
        found = [(float(item.number), item.comparisons) for item in run.iterations if item.comparisons]
        places = [number for number, _ in found]
        columns = (
            [item.first_preference for _, item in found],
            [item.first_preference_at_equal_scores for _, item in found],
            [item.higher_score_preference for _, item in found],
        )
        known = [index for index, column in enumerate(columns) if any(value is not None for value in column)]
        if not known:
            return None
        return drawing.lines(
            {names[index]: (places, columns[index]) for index in known},
            [colours[index] for index in known],
            label="iteration",
            percent=True,
            reference=(0.5, "no preference"),
            limits=(-0.03, 1.03),
            whole=True,
        )

    return Chart(
        "Biases of the meta-judge",
        "How often the judgment shown first, or the one with the higher score, wins a comparison. 50 % is "
        "unbiased. Close to 100 % for the higher score means that the judge is being trained to give high scores, "
        "whatever the answer.",
        panels_of(runs, draw),
        legend_of(names, colours),
        missing="No comparisons: they come with the meta-judge, in iterations that have `meta_judge = true`.",
    )
