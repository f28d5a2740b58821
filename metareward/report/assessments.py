"""RUN/assessments/*.json: what `metareward assess ... --json` wrote, read without knowing every field.

Assessments differ in what they measure, so the figures are found by their form: a number, or an object with a `value` and an
`interval` of `low` and `high`. Their names are the keys on the way to them; in a list, each entry's `name` says whose they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

AGREEMENT = ("spearman", "pairwise", "accuracy")
"""Last keys of the figures that are drawn as agreement with people; others stand in the table."""


@dataclass(frozen=True)
class Figure:
    """A figure of an assessment, with its interval where it has one. None: undefined. `subject`: the name of the list's entry
    that it belongs to, usually a model; empty outside of lists."""

    subject: str
    name: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def full_name(self) -> str:
        return f"{self.subject} / {self.name}" if self.subject else self.name

    @property
    def is_win_rate(self) -> bool:
        """A share of wins against another model, plain or length-controlled."""
        return self.value is not None and self.leaf == "win_rate"

    @property
    def is_agreement(self) -> bool:
        return self.value is not None and self.leaf in AGREEMENT

    @property
    def leaf(self) -> str:
        return self.name.rsplit(" / ", 1)[-1]


@dataclass(frozen=True)
class Assessment:
    """One file. `about`: its short texts, such as the baseline and the judge."""

    name: str
    about: dict[str, str]
    figures: list[Figure]


def read_assessments(folder: Path) -> tuple[list[Assessment], list[str]]:
    """The assessments in a folder by file name, and the names of files that are not JSON or have no figure."""
    found, unread = [], []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            tree = None
        figures = list(figures_of(tree, ()))
        if not figures:
            unread.append(path.name)
            continue
        texts = tree if isinstance(tree, dict) else {}
        about = {name: text for name, text in texts.items() if isinstance(text, str) and len(text) <= 200}
        found.append(Assessment(path.stem, about, figures))
    return found, unread


def figures_of(tree: Any, path: tuple[str, ...], subject: str = "") -> Iterator[Figure]:
    """Every figure below `tree`, in the file's order. Flags are no figures, and lists only where their entries have names."""
    if isinstance(tree, list):
        for entry in tree:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                # The key of the list says no more than the entries' names do.
                yield from figures_of(entry, (), subject_of(entry))
    elif isinstance(tree, dict) and "value" in tree and path:
        low, high = interval_of(tree)
        value = tree["value"]
        if value is None or is_number(value):
            yield Figure(subject, " / ".join(path), value, low, high)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from figures_of(value, (*path, str(name)), subject)
    elif is_number(tree) and path:
        yield Figure(subject, " / ".join(path), tree)


def subject_of(entry: dict[str, Any]) -> str:
    baseline = entry.get("baseline")
    return f"{entry['name']} against {baseline}" if isinstance(baseline, str) else str(entry["name"])


def interval_of(tree: dict[str, Any]) -> tuple[float | None, float | None]:
    interval = tree.get("interval")
    ends = interval if isinstance(interval, dict) else tree
    low, high = ends.get("low"), ends.get("high")
    return (float(low), float(high)) if is_number(low) and is_number(high) else (None, None)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
