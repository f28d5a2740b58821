"""Pairwise annotations in the form of AlpacaEval's annotations.json: read, written, and summed up as win rates.

An entry has `instruction`, `output_1` and `generator_1` (the baseline), `output_2` and `generator_2` (the model), `annotator`, and
`preference`: from 1, the baseline is preferred, to 2, the model is; 1.5 or 0 is a tie, null was not read.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metareward.assessment.interval import Resampling
from metareward.assessment.judge_table import text_of
from metareward.assessment.length_controlled import length_controlled
from metareward.assessment.win_rate import win_rate
from metareward.errors import UserError
from metareward.run.jsonl import write_text

Figures = dict[str, Any]


@dataclass(frozen=True)
class Annotation:
    """One comparison. `preference` in [0, 1], 1 for the model (output_2), None where it was not read. `index` is its place among
    the annotations of its two generators, by which AlpacaEval's difficulties are numbered."""

    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    annotator: str
    preference: float | None
    difficulty: float | None = None
    index: int = 0

    @property
    def group(self) -> tuple[str, str, str]:
        return self.generator_2, self.generator_1, self.annotator


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write them as AlpacaEval does."""
    lines = []
    for item in annotations:
        line: Figures = {
            "instruction": item.instruction,
            "output_1": item.output_1,
            "generator_1": item.generator_1,
            "output_2": item.output_2,
            "generator_2": item.generator_2,
            "annotator": item.annotator,
            "preference": None if item.preference is None else 1 + item.preference,
        }
        if item.difficulty is not None:
            line["instruction_difficulty"] = item.difficulty
        lines.append(line)
    write_text(path, json.dumps(lines, indent=2, ensure_ascii=False) + "\n")


def read_annotations(path: Path) -> list[Annotation]:
    """The entries of an annotations file, in file order.

    Raises:
        UserError: naming the first entry that is wrong.
    """
    entries = read_json_list(path)
    counted: dict[tuple[str, str, str], int] = {}
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is not an object: give the annotations.json that alpaca_eval wrote")
        for name in ("instruction", "output_1", "output_2"):
            if not isinstance(entry.get(name), str):
                raise UserError(
                    f'{where} needs a string in "{name}": give the annotations.json that alpaca_eval wrote'
                )
        value = entry.get("preference")
        difficulty = entry.get("instruction_difficulty")
        item = Annotation(
            entry["instruction"],
            entry["output_1"],
            entry["output_2"],
            str(entry.get("generator_1", "baseline")),
            str(entry.get("generator_2", "model")),
            str(entry.get("annotator", "")),
            preference_of(value, where),
            None if difficulty is None else number_of(difficulty, f'{where}, "instruction_difficulty"'),
        )
        index = counted.get(item.group, 0)
        counted[item.group] = index + 1
        found.append(replace(item, index=index))
    return found


def read_json_list(path: Path) -> list[Any]:
    """A JSON file that holds a list with something in it.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): give a JSON list") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is not a JSON list with entries: give the list that the harness wrote")
    return entries


def preference_of(value: Any, where: str) -> float | None:
    """AlpacaEval's 1 to 2 as 0 to 1; its old sign of a tie, 0, as 1/2; null as None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = number_of(value, f'{where}, "preference"')
    if number == 0:
        return 0.5
    if not 1.0 <= number <= 2.0:
        raise UserError(f"{where} has the preference {number}: it must be from 1 to 2, 0, or null")
    return number - 1


def number_of(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}: give a finite number")
    return float(value)


def add_difficulty(annotations: Sequence[Annotation], path: Path) -> list[Annotation]:
    """Difficulties from a CSV of (index, difficulty) with a header, such as AlpacaEval's instruction_difficulty.csv.

    Raises:
        UserError: it is wrong, or lacks an index.
    """
    known: dict[int, float] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if number == 1 or not row:
                    continue
                try:
                    known[int(row[0])] = number_of(float(row[1]), f"{path}, line {number}")
                except (ValueError, IndexError):
                    raise UserError(
                        f"{path}, line {number} is not an index and a difficulty: give lines such as 12,0.35"
                    ) from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the path") from None
    missing = next((item.index for item in annotations if item.index not in known), None)
    if missing is not None:
        raise UserError(
            f"{path} has no difficulty for index {missing}: give one for every prompt, numbered from 0"
        )
    return [replace(item, difficulty=known[item.index]) for item in annotations]


def summarise(annotations: Sequence[Annotation], resampling: Resampling) -> Figures:
    """Win rate, length-controlled win rate and lengths of one model against one baseline; None where nothing was read."""
    known = [item for item in annotations if item.preference is not None]
    lengths, baseline = [len(item.output_2) for item in known], [len(item.output_1) for item in known]
    rates = win_rate(
        [item.instruction for item in annotations],
        [item.preference for item in annotations],
        [len(item.output_2) for item in annotations],
        [len(item.output_1) for item in annotations],
        resampling,
    )
    difficulty = [item.difficulty for item in known if item.difficulty is not None]
    controlled = length_controlled(
        [item.preference for item in known if item.preference is not None],
        lengths,
        baseline,
        difficulty if len(difficulty) == len(known) else None,
        resampling,
    )
    return {**asdict(rates), "length_controlled": asdict(controlled)}


ROWS = (
    ("prompts", "prompts compared"),
    ("left_out", "left out (a verdict unread, or too long)"),
    ("win_rate", "win rate"),
    ("wins", "wins"),
    ("ties", "ties (or other with the order)"),
    ("losses", "losses"),
    ("length", "length, characters"),
    ("baseline_length", "length of the baseline's"),
    ("unfinished", "unfinished responses"),
    ("readable", "readable verdicts"),
    ("first_position_wins", "first position wins"),
)


def show(models: Sequence[Figures], title: str, confidence: float) -> None:
    """Print the figures, one column a model."""
    width = max(96, 46 + 25 * len(models))
    table = Table(title=f"{escape(title)} \\[{confidence:.0%} intervals by resampling prompts]", width=width)
    table.add_column("figure")
    for item in models:
        table.add_column(escape(item["name"]), justify="right", overflow="fold")
    for name, label in ROWS:
        if name in models[0]:
            table.add_row(label, *(text_of(item[name]) for item in models))
        if name == "win_rate":
            controlled = [item["length_controlled"] for item in models]
            table.add_row(
                "length-controlled win rate",
                *(
                    "too few prompts" if item["coefficients"] is None else text_of(item["win_rate"])
                    for item in controlled
                ),
            )
            table.add_row(
                "length effect, log odds",
                *(text_of((item["coefficients"] or {}).get("length")) for item in controlled),
            )
    Console(width=width).print(table)


def assess_file(
    path: Path, difficulty: Path | None, resampling: Resampling, out: Path | None
) -> list[Figures]:
    """Print the win rates of every (model, baseline, annotator) in an annotations file; write them as JSON to `out`.

    Raises:
        UserError: a file is wrong.
    """
    annotations = read_annotations(path)
    if difficulty is not None:
        annotations = add_difficulty(annotations, difficulty)
    groups: dict[tuple[str, str, str], list[Annotation]] = {}
    for item in annotations:
        groups.setdefault(item.group, []).append(item)
    found = [
        {"name": name, "baseline": baseline, "annotator": annotator, **summarise(items, resampling)}
        for (name, baseline, annotator), items in groups.items()
    ]
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n")
    for pair in dict.fromkeys((item["baseline"], item["annotator"]) for item in found):
        columns = [item for item in found if (item["baseline"], item["annotator"]) == pair]
        by = f", judged by {pair[1]}" if pair[1] else ""
        show(columns, f"Against {pair[0]}{by}", resampling.confidence)
    return found
