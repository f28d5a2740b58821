"""The report and a prompt's story in the terminal. Text from models is shown, never obeyed: no markup, no control characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from metareward.report.assessments import Assessment
from metareward.report.data import Range, RunData, labels_of, read_run
from metareward.report.page import number, warnings_of
from metareward.report.run_charts import REASONS
from metareward.report.story import Story, read_story
from metareward.run.jsonl import Line
from metareward.run.summary import WIDTH, print_summary

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 48
"""Characters of a training curve."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str, style: str = "") -> Text:
    """Text as it is: brackets are no markup, and control characters, which could move the cursor or hide text, are dots."""
    return Text(CONTROL.sub("·", text), style=style)


def print_report(roots: Sequence[Path]) -> None:
    """The figures of the report, run after run.

    Raises:
        UserError: one of them is not a run directory.
    """
    console = Console(width=WIDTH)
    runs = [read_run(root, label) for root, label in zip(roots, labels_of(roots), strict=True)]
    for run in runs:
        if len(runs) > 1:
            console.print(Rule(plain(run.label)))
        print_summary(run.root)
        if run.iterations:
            console.print(distribution_table(run))
        for item in run.iterations:
            for name in ("loss", "accuracy", "margin"):
                values = [float(step[name]) for step in item.steps if name in step]
                if values:
                    console.print(plain(f"iteration {item.number}, {name:<9}{curve(values)}"))
        for assessment in run.assessments:
            console.print(assessment_table(assessment))
        for warning in warnings_of(run):
            console.print(plain(f"warning: {warning}", "yellow"))


def distribution_table(run: RunData) -> Table:
    """What the summary has no place for: distributions and reasons."""
    table = Table(title="Distributions (5, 25, 50, 75, 95 %) and pairs used in training", width=WIDTH)
    table.add_column("figure")
    for item in run.iterations:
        table.add_column(f"iteration {item.number}", justify="right")
    rows = {
        "answer length, characters": [quantile_text(item.response_lengths, 0) for item in run.iterations],
        "judgment length, characters": [quantile_text(item.judgment_lengths, 0) for item in run.iterations],
        "Elo, best - worst judgment": [quantile_text(item.elo_gaps, 2) for item in run.iterations],
        "scores of one answer, deviation": [
            "none"
            if item.judgments is None or item.judgments.spread is None
            else f"{item.judgments.spread:.2f}"
            for item in run.iterations
        ],
    }
    for kind in ("actor", "judge"):
        rows[f"{kind} pairs trained on"] = [
            str(item.pairs[kind].kept) if kind in item.pairs else "" for item in run.iterations
        ]
        for reason in dict.fromkeys(
            key for item in run.iterations if kind in item.pairs for key in item.pairs[kind].dropped
        ):
            label = f"  {kind}: {REASONS.get(reason, reason)}"
            rows[label] = [
                str(item.pairs[kind].dropped.get(reason, 0)) if kind in item.pairs else ""
                for item in run.iterations
            ]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def quantile_text(found: Range | None, digits: int) -> str:
    return "none" if found is None else "  ".join(f"{value:.{digits}f}" for value in found)


def curve(values: Sequence[float]) -> str:
    """A curve of blocks between its first and its last value."""
    finite = [value for value in values if abs(value) != float("inf") and value == value]
    if not finite:
        return "not finite"
    part = -(-len(finite) // CURVE)
    means = [sum(finite[at : at + part]) / len(finite[at : at + part]) for at in range(0, len(finite), part)]
    low, high = min(means), max(means)
    heights = [
        round((value - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0 for value in means
    ]
    return f"{finite[0]:.4f} {''.join(BLOCKS[height] for height in heights)} {finite[-1]:.4f}"


def assessment_table(assessment: Assessment) -> Table:
    table = Table(title=plain(f"Assessment {assessment.name}"), width=WIDTH)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("interval", justify="right")
    for figure in assessment.figures:
        interval = "" if figure.low is None else f"{number(figure.low)} to {number(figure.high)}"
        table.add_row(plain(figure.full_name), number(figure.value), interval)
    return table


def print_story(root: Path, prompt_id: str, iteration: int, comparison_texts: bool) -> None:
    """One prompt's story, iteration after iteration.

    Raises:
        UserError: no run, no such iteration or prompt.
    """
    console = Console(width=WIDTH)
    for found in read_story(root, prompt_id, iteration):
        console.print(Rule(plain(f"iteration {found.number}")))
        console.print(Panel(plain(found.prompt), title=plain(f"prompt {prompt_id}"), title_align="left"))
        for line in found.responses:
            print_answer(console, found, line)
        console.print(plain(found.reason, "bold"))
        if found.compared is None:
            console.print(plain("No judgments of this prompt were compared."))
        else:
            print_comparisons(console, found, comparison_texts)


def print_answer(console: Console, found: Story, line: Line) -> None:
    """An answer, and below it its judgments."""
    response_id = line["response_id"]
    scores = found.scores.get(response_id, [])
    told = f"mean score {sum(scores) / len(scores):.2f}" if scores else "no score"
    if not line["finished"]:
        told += ", unfinished"
    if line["duplicate_of"] is not None:
        told += f", the same as answer {line['duplicate_of']}"
    title = (
        f"answer {response_id}{role(found.actor_pair, response_id)}: {told}, {len(line['text'])} characters"
    )
    console.print(Panel(plain(line["text"]), title=plain(title), title_align="left"))
    for judgment in found.judgments[response_id]:
        score = "unreadable" if judgment["score"] is None else f"score {judgment['score']:g}"
        cut = "" if judgment["finished"] else ", unfinished"
        console.print(plain(f"  judgment {judgment['judgment_id']}: {score}{cut}", "bold"))
        console.print(plain("\n".join(f"    {part}" for part in judgment["text"].split("\n"))))


def role(pair: Line | None, name: int) -> str:
    """Which side of a pair a response or a judgment is."""
    if pair is None or name not in (pair["chosen"], pair["rejected"]):
        return ""
    return " (chosen)" if name == pair["chosen"] else " (rejected)"


def print_comparisons(console: Console, found: Story, texts: bool) -> None:
    """Elo of the judgments, and who won each comparison; with `texts`, what the meta-judge wrote."""
    scores = {line["judgment_id"]: line["score"] for line in found.judgments[found.compared or 0]}
    table = Table(title=f"Judgments of answer {found.compared}, compared by the meta-judge")
    for name in ("judgment", "score", "wins", "Elo", ""):
        table.add_column(name, justify="right")
    wins = [
        line["first"] if line["winner"] == "first" else line["second"]
        for line in found.comparisons
        if line["winner"]
    ]
    for judgment, elo in sorted(found.elo.items(), key=lambda item: -item[1]):
        side = role(found.judge_pair, judgment).strip(" ()")
        table.add_row(str(judgment), f"{scores[judgment]:g}", str(wins.count(judgment)), f"{elo:.2f}", side)
    console.print(table)
    if found.judge_pair is None:
        console.print(plain("There is no pair of judgments: see the dropped counts in `metareward summary`."))
    for line in found.comparisons:
        winner = {"first": line["first"], "second": line["second"], None: None}[line["winner"]]
        told = "unreadable" if winner is None else f"judgment {winner} wins"
        console.print(plain(f"  {line['first']} before {line['second']}: {told}"))
        if texts:
            console.print(plain("\n".join(f"    {part}" for part in line["text"].split("\n"))))
