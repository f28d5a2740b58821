"""The starter data keep the promises that a demo relies on.

A judge seeded on these lines must learn to read the response. So the score classes are balanced, and neither
the length of a response nor its place among the four of a prompt may give the quality away.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

STARTER = Path(__file__).resolve().parents[2] / "metareward" / "starter"
FIELDS = {"prompt_id", "prompt", "response_id", "response", "quality", "rationale"}
NUMBER_WORDS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|dozen"
    "|half|third|quarter|first|second|once|twice"
)
# A rationale precedes the verdict in a judgment, so a number in it could be mistaken for that verdict.
FORBIDDEN = re.compile(rf"\d|%|\bscor\w*|\brating\w*|\b({NUMBER_WORDS})\b", re.IGNORECASE)
QUOTED_RUN = 5


def read_lines(name: str) -> list[dict[str, Any]]:
    text = (STARTER / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def score_class(quality: float) -> int:
    return round(5 * quality)


@pytest.fixture(scope="module")
def quality() -> list[dict[str, Any]]:
    return read_lines("quality.jsonl")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return read_lines("prompts.jsonl")


@pytest.fixture(scope="module")
def by_prompt(quality: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in quality:
        groups[row["prompt_id"]].append(row)
    return groups


def test_fields_and_types(quality: list[dict[str, Any]]) -> None:
    for row in quality:
        assert set(row) == FIELDS
        assert isinstance(row["quality"], float)
        assert 0.0 <= row["quality"] <= 1.0
        for name in FIELDS - {"quality"}:
            assert isinstance(row[name], str)
            assert row[name] == row[name].strip() != ""


def test_four_responses_a_prompt(by_prompt: dict[str, list[dict[str, Any]]]) -> None:
    assert len(by_prompt) >= 48
    for number, (prompt_id, rows) in enumerate(by_prompt.items(), start=1):
        assert prompt_id == f"starter-{number:03d}"
        assert [row["response_id"] for row in rows] == [f"{prompt_id}-{letter}" for letter in "abcd"]
        assert len({row["prompt"] for row in rows}) == 1


def test_texts_are_unique(quality: list[dict[str, Any]], by_prompt: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("response_id", "response", "rationale"):
        assert len({row[name] for row in quality}) == len(quality), name
    assert len({rows[0]["prompt"].lower() for rows in by_prompt.values()}) == len(by_prompt)


def test_score_classes_are_balanced(quality: list[dict[str, Any]]) -> None:
    counts = Counter(score_class(row["quality"]) for row in quality)
    assert set(counts) == set(range(6))
    assert all(25 <= count <= 40 for count in counts.values()), counts


def test_no_quality_lies_on_a_class_boundary(quality: list[dict[str, Any]]) -> None:
    for row in quality:
        assert abs(5 * row["quality"] - score_class(row["quality"])) < 0.49, row["response_id"]


def test_qualities_within_a_prompt_are_apart(by_prompt: dict[str, list[dict[str, Any]]]) -> None:
    for prompt_id, rows in by_prompt.items():
        ordered = sorted(row["quality"] for row in rows)
        assert all(high - low >= 0.2 - 1e-9 for low, high in pairwise(ordered)), (prompt_id, ordered)
        assert len({score_class(value) for value in ordered}) == 4, (prompt_id, ordered)


def test_word_ranges(quality: list[dict[str, Any]]) -> None:
    for row in quality:
        assert 10 <= len(row["response"].split()) <= 80, row["response_id"]
        assert 15 <= len(row["rationale"].split()) <= 40, row["response_id"]


def test_length_does_not_decide(quality: list[dict[str, Any]]) -> None:
    lengths = [len(row["response"]) for row in quality]
    correlation = spearmanr(lengths, [row["quality"] for row in quality]).statistic
    assert abs(correlation) < 0.35, correlation


def test_every_class_has_short_and_long_responses(quality: list[dict[str, Any]]) -> None:
    for wanted in range(6):
        lengths = [len(row["response"]) for row in quality if score_class(row["quality"]) == wanted]
        assert min(lengths) < 130, wanted
        assert max(lengths) > 290, wanted


def test_position_does_not_decide(quality: list[dict[str, Any]]) -> None:
    places: dict[str, list[float]] = defaultdict(list)
    for row in quality:
        places[row["response_id"][-1]].append(row["quality"])
    means = {letter: sum(values) / len(values) for letter, values in places.items()}
    assert max(means.values()) - min(means.values()) < 0.1, means


def test_self_praise_is_present_and_poor(quality: list[dict[str, Any]]) -> None:
    begging = [
        row for row in quality if re.search(r"score: ?5|rate this|5/5", row["response"], re.IGNORECASE)
    ]
    assert len(begging) >= 4
    assert all(score_class(row["quality"]) <= 1 for row in begging)


def test_rationales_name_no_number_and_no_verdict(quality: list[dict[str, Any]]) -> None:
    for row in quality:
        found = FORBIDDEN.search(row["rationale"])
        assert found is None, (row["response_id"], found)


def test_rationales_do_not_quote_the_instruction(quality: list[dict[str, Any]]) -> None:
    for row in quality:
        prompt, rationale = words(row["prompt"]), " ".join(words(row["rationale"]))
        for start in range(len(prompt) - QUOTED_RUN + 1):
            run = " ".join(prompt[start : start + QUOTED_RUN])
            assert f" {run} " not in f" {rationale} ", (row["response_id"], run)


def test_rationales_vary_their_openings(quality: list[dict[str, Any]]) -> None:
    openings = Counter(" ".join(words(row["rationale"])[:3]) for row in quality)
    opening, count = openings.most_common(1)[0]
    assert count <= 4, opening


def test_demo_prompts(prompts: list[dict[str, Any]]) -> None:
    assert [row["prompt_id"] for row in prompts] == [f"demo-{number:03d}" for number in range(1, 65)]
    for row in prompts:
        assert set(row) == {"prompt_id", "prompt"}
        assert 3 <= len(row["prompt"].split()) <= 30
        assert re.search(r"[.?!][\"']?$", row["prompt"]), row
    assert len({row["prompt"].lower() for row in prompts}) == len(prompts)


def test_demo_prompts_do_not_overlap_the_judged_ones(
    quality: list[dict[str, Any]], prompts: list[dict[str, Any]]
) -> None:
    judged = {row["prompt"]: set(words(row["prompt"])) for row in quality}
    for row in prompts:
        own = set(words(row["prompt"]))
        for text, other in judged.items():
            assert len(own & other) / len(own | other) < 0.6, (row["prompt"], text)
