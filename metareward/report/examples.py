"""A few prompts to read: the chosen and the rejected answer with their judgments, and a comparison of two judgments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from metareward.run.directory import IterationFiles
from metareward.run.jsonl import Line, read_jsonl

EXAMPLES = 2
"""Prompts an iteration."""
JUDGMENTS = 3
"""Judgments shown of an answer."""
CHARACTERS = 2500
"""Of a text, so that the page stays small whatever a model wrote."""


@dataclass(frozen=True)
class Answer:
    """An answer with its mean score and some of its judgments, as (score, text); a score of None could not be read."""

    response_id: int
    score: float
    text: str
    judgments: list[tuple[float | None, str]]


@dataclass(frozen=True)
class Comparison:
    """Two judgments of one answer, and what the meta-judge wrote. `winner`: "first", "second", or None: unreadable."""

    response_id: int
    first: tuple[float | None, str]
    second: tuple[float | None, str]
    text: str
    winner: str | None


@dataclass(frozen=True)
class Example:
    prompt_id: str
    prompt: str
    best: Answer
    worst: Answer
    comparison: Comparison | None


def examples(files: IterationFiles, count: int = EXAMPLES) -> list[Example]:
    """The pairs of answers whose scores are furthest apart, the first in the file among equals."""
    if not files.actor_pairs.is_file():
        return []
    found = read_jsonl(files.actor_pairs)
    pairs = sorted(found, key=lambda line: line["rejected_score"] - line["chosen_score"])[:count]
    wanted = {line["prompt_id"] for line in pairs}

    def of_wanted(lines: Iterable[Line]) -> list[Line]:
        return [line for line in lines if line["prompt_id"] in wanted]

    prompts = {line["prompt_id"]: line["prompt"] for line in read_jsonl(files.prompts)}
    texts = {
        (line["prompt_id"], line["response_id"]): line["text"]
        for line in of_wanted(read_jsonl(files.responses, without=["token_ids"]))
    }
    judgments: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in of_wanted(read_jsonl(files.judgments, without=["token_ids"])):
        judgments[line["prompt_id"], line["response_id"]].append(line)
    compared = of_wanted(read_jsonl(files.comparisons)) if files.comparisons.is_file() else []

    def answer(prompt_id: str, response_id: int, score: float) -> Answer:
        lines = judgments[prompt_id, response_id][:JUDGMENTS]
        shown = [(line["score"], cut(line["text"])) for line in lines]
        return Answer(response_id, score, cut(texts[prompt_id, response_id]), shown)

    return [
        Example(
            line["prompt_id"],
            cut(prompts[line["prompt_id"]]),
            answer(line["prompt_id"], line["chosen"], line["chosen_score"]),
            answer(line["prompt_id"], line["rejected"], line["rejected_score"]),
            comparison([item for item in compared if item["prompt_id"] == line["prompt_id"]], judgments),
        )
        for line in pairs
    ]


def comparison(compared: list[Line], judgments: dict[tuple[str, int], list[Line]]) -> Comparison | None:
    """The first comparison with a readable winner, else the first."""
    if not compared:
        return None
    line = next((item for item in compared if item["winner"] is not None), compared[0])
    own = {
        item["judgment_id"]: (item["score"], cut(item["text"]))
        for item in judgments[line["prompt_id"], line["response_id"]]
    }
    return Comparison(
        line["response_id"], own[line["first"]], own[line["second"]], cut(line["text"]), line["winner"]
    )


def cut(text: str) -> str:
    """At most CHARACTERS of a text, saying how many are left out."""
    if len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]} [… {len(text) - CHARACTERS} more characters; see `metareward show`]"
