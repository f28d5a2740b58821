"""The tables of `metareward assess judge`: one column a model."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Figures = dict[str, Any]

LABEL_ROWS = (
    ("scored", "responses with a score"),
    ("spearman", "Spearman with labels"),
    ("kendall", "Kendall's tau-b"),
    ("pairwise", "pairwise agreement, ties half"),
    ("pairwise_untied", "pairwise agreement, ties left out"),
    ("tied", "ties among those pairs"),
    ("exact", "score class is the label's"),
)
LENGTH_ROWS = (
    ("label", "Spearman of length with labels"),
    ("score", "Spearman of length with scores"),
    ("partial", "Spearman with labels, length taken out"),
)
PREFERENCE_ROWS = (
    ("scored", "preference pairs with both scores"),
    ("accuracy", "preference accuracy, ties half"),
    ("accuracy_untied", "preference accuracy, ties left out"),
    ("tied", "ties among preference pairs"),
)
META_ROWS = (
    ("comparisons", "comparisons"),
    ("equal_scores", "of which of equal scores"),
    ("readable", "readable winners"),
    ("position", "first position wins"),
    ("position_equal", "first position wins, equal scores"),
    ("position_unequal", "first position wins, unequal scores"),
    ("higher_score", "higher score wins"),
    ("consistent", "same winner in both orders"),
)


def show(found: Figures) -> None:
    """Print all figures; brackets are intervals."""
    models = found["models"]
    confidence = found["resampling"]["confidence"]
    width = 46 + 25 * len(models)
    table = Table(
        title=f"Judge: {found['responses']} responses, {found['samples']} judgments each; "
        f"[{confidence:.0%} intervals by resampling prompts]".replace("[", "\\["),
        width=max(width, 96),
    )
    table.add_column("figure")
    for item in models:
        table.add_column(escape(item["name"]), justify="right", overflow="fold")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("readable judgments", [f"{item['parse_rate']:.1%} of {item['judgments']}" for item in models])
    row("score mean", [text_of(item["score_mean"]) for item in models])
    row("scores 0 1 2 3 4 5", [" ".join(map(str, item["score_histogram"].values())) for item in models])
    row("score entropy, nat", [text_of(item["score_entropy"]) for item in models])
    if any(item["left_out_too_long"] for item in models):
        row("left out as too long", [str(item["left_out_too_long"]) for item in models])
    for kind, by in (("sampled", "by sampled scores"), ("expected", "by expected scores")):
        if models[0]["labels"] is not None:
            section(table, by)
            for name, label in LABEL_ROWS:
                row(label, [text_of(item["labels"][kind][name]) for item in models])
            for name, label in LENGTH_ROWS:
                row(label, [text_of(item["labels"][kind]["length"][name]) for item in models])
        if models[0]["preferences"] is not None:
            if models[0]["labels"] is None:
                section(table, by)
            for name, label in PREFERENCE_ROWS:
                row(label, [text_of(item["preferences"][kind][name]) for item in models])
    if models[0]["meta_judge"] is not None:
        section(table, "as meta-judge")
        for name, label in META_ROWS:
            row(label, [text_of(item["meta_judge"][name]) for item in models])
    Console(width=max(width, 96)).print(table)


def section(table: Table, title: str) -> None:
    table.add_section()
    table.add_row(f"[bold]{title}[/bold]")


def text_of(value: Any) -> str:
    """A count, a number with three places, or an estimate with its interval in brackets; "none" where it is undefined."""
    if value is None:
        return "none"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    interval = value["interval"]
    ends = "" if interval is None else f" \\[{interval['low']:.3f}, {interval['high']:.3f}]"
    return text_of(value["value"]) + ends
