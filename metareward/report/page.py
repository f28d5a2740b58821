"""report.html: one file that opens offline, with everything in it and nothing fetched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from metareward.errors import UserError
from metareward.preference.collapse import Breach
from metareward.recipe_files import differences, flatten
from metareward.report import drawing, run_charts
from metareward.report.assessment_charts import agreement, win_rates
from metareward.report.chart import Chart, Panel
from metareward.report.data import RunData, labels_of, read_run
from metareward.report.examples import Example, examples
from metareward.report.judge_charts import judge_charts, meta_judge_charts
from metareward.report.training_charts import training_charts
from metareward.run.directory import RunDirectory
from metareward.run.jsonl import check_writable, write_text

EXAMPLE_ITERATIONS = 4
"""The first iteration and the last ones, so that the page of a long run stays small."""


@dataclass(frozen=True)
class Section:
    """A question a reader has, with the charts that answer it."""

    anchor: str
    title: str
    charts: list[Chart]


def write_report(roots: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the report of one run, or of several side by side, and return where it is.

    `out` is by default report.html in the run's folder, or comparison.html in the first one's. The same files give the same page,
    byte by byte.

    Raises:
        UserError: no run there, no place to write, or matplotlib is missing.
    """
    drawing.require_matplotlib()
    runs = [read_run(root, label) for root, label in zip(roots, labels_of(roots), strict=True)]
    final = out or roots[0] / ("report.html" if len(roots) == 1 else "comparison.html")
    check_writable(final)
    write_text(final, render(runs))
    return final


def render(runs: list[RunData]) -> str:
    """The page of these runs."""
    try:
        import jinja2
    except ImportError:
        raise UserError(
            "the report needs jinja2: pip install 'metareward[report]', then `metareward report RUN`"
        ) from None
    # Autoescape: models write what they like, tags too.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "with_code": with_code}
    folder = resources.files("metareward") / "report"
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    style = (folder / "page.css").read_text(encoding="utf-8")
    return template.render(
        runs=runs,
        title=" and ".join(run.label for run in runs),
        style=style,
        sections=with_own_ids(sections(runs)),
        overview=overview(runs),
        warnings=[(run.label, warning) for run in runs for warning in warnings_of(run)],
        examples=[(run.label, iteration, found) for run in runs for iteration, found in examples_of(run)],
        figure_tables=[(run.label, *figure_table(run)) for run in runs],
        changed=[(run.label, differences(runs[0].recipe, run.recipe)) for run in runs[1:]],
        settings=[(run.label, list(flatten(asdict(run.recipe)))) for run in runs],
    )


def sections(runs: list[RunData]) -> list[Section]:
    judge = judge_charts(runs)
    pairs = [run_charts.pairs(runs, "actor"), run_charts.pairs(runs, "judge")]
    time = [run_charts.stage_seconds(runs), run_charts.throughput(runs)]
    return [
        Section("model", "Does the model get better?", [win_rates(runs), run_charts.response_lengths(runs)]),
        Section("judge", "Is the judge still a judge?", [*judge, agreement(runs)]),
        Section("meta-judge", "Is the meta-judge fair?", meta_judge_charts(runs)),
        Section("pairs", "What was it trained on?", pairs),
        Section("training", "How did the training go?", training_charts(runs)),
        Section("time", "Where did the time go?", time),
    ]


def with_own_ids(found: list[Section]) -> list[Section]:
    """Drawings share ids, such as those of markers; on one page each needs its own."""
    return [
        replace(
            section,
            charts=[
                replace(
                    chart,
                    panels=[
                        Panel(
                            panel.label, drawing.apart(panel.svg, f"{section.anchor}-{chart_number}-{number}")
                        )
                        for number, panel in enumerate(chart.panels)
                    ],
                )
                for chart_number, chart in enumerate(section.charts)
            ],
        )
        for section in found
    ]


def overview(runs: list[RunData]) -> list[tuple[str, list[str]]]:
    """(label, a cell a run): what a run is, in a few lines."""
    return [
        ("model", [run.recipe.model.name.rsplit("/", 1)[-1] for run in runs]),
        ("state", ["finished" if run.finished else "not finished" for run in runs]),
        (
            "iterations with answers",
            [f"{len(run.iterations)} of {len(run.recipe.iteration)}" for run in runs],
        ),
        ("time in stages", [duration(run.seconds) for run in runs]),
        ("processes", ["unknown" if run.ranks is None else str(run.ranks) for run in runs]),
        ("score, first to last iteration", [first_to_last(run, "score_mean") for run in runs]),
        (
            "pairs trained on",
            [
                str(sum(pairs.kept for item in run.iterations for pairs in item.pairs.values()))
                for run in runs
            ],
        ),
        ("kernels", [most_common(run.implementations) for run in runs]),
    ]


def most_common(implementations: dict[str, str]) -> str:
    """What runs most of the ops; the table of all stands further below."""
    counts = Counter(implementations.values())
    return counts.most_common(1)[0][0] if counts else "unknown"


def first_to_last(run: RunData, name: str) -> str:
    values = [getattr(item.judgments, name) for item in run.iterations if item.judgments is not None]
    known = [value for value in values if value is not None]
    return f"{known[0]:.2f} → {known[-1]:.2f}" if known else "none yet"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    return (
        f"{whole // 3600} h {whole % 3600 // 60} min"
        if whole >= 3600
        else f"{whole // 60} min {whole % 60} s"
    )


def warnings_of(run: RunData) -> list[str]:
    """What a reader should know before the charts: limits passed, files that could not be read."""
    found = [
        f"iteration {item.number}: {'; '.join(Breach(**breach).sentence() for breach in event['passed'])}; "
        f"action: {event['action'].replace('_', ' ')}"
        for item in run.iterations
        for event in item.guard
        if event["passed"]
    ]
    return found + [
        f"assessments/{name} has no figure that can be read and was left out: delete it or write it anew"
        for name in run.unread_assessments
    ]


def examples_of(run: RunData) -> list[tuple[int, list[Example]]]:
    """(iteration, examples) of the first iteration and the last ones."""
    numbers = [item.number for item in run.iterations]
    chosen = (
        numbers if len(numbers) <= EXAMPLE_ITERATIONS else [numbers[0], *numbers[1 - EXAMPLE_ITERATIONS :]]
    )
    found = [(number, examples(RunDirectory(run.root).iteration(number))) for number in chosen]
    return [(number, items) for number, items in found if items]


def figure_table(run: RunData) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """Iterations, and (label, a cell an iteration): the table of `metareward summary`."""
    shown = [item for item in run.iterations if item.table]
    labels = list(dict.fromkeys(label for item in shown for label in item.table))
    return [item.number for item in shown], [
        (label, [item.table.get(label, "") for item in shown]) for label in labels
    ]


def number(value: Any) -> str:
    """A figure of an assessment as text; whole numbers are counts."""
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def with_code(text: str) -> Any:
    """Escaped text in which `...` becomes code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
