"""Figures of a stage's lines, worked out by hand."""

from __future__ import annotations

import math

import pytest

from metareward.run.figures import comparison_figures, judgment_figures, response_figures
from metareward.run.jsonl import Line

SCORES = {("a", 0): [5.0, 3.0], ("a", 1): [4.0, 4.0, None], ("b", 0): [4.75, None]}


def judgments() -> list[Line]:
    return [
        {
            "prompt_id": prompt_id,
            "response_id": response_id,
            "judgment_id": number,
            "text": "xx",
            "score": score,
        }
        for (prompt_id, response_id), scores in SCORES.items()
        for number, score in enumerate(scores)
    ]


def comparison(response_id: int, first: int, second: int, winner: str | None) -> Line:
    head = {"prompt_id": "a", "response_id": response_id}
    return {**head, "first": first, "second": second, "winner": winner}


def test_judgments() -> None:
    found = judgment_figures(judgments())
    assert (found.judgments, found.readable, found.histogram) == (7, 5, (0, 0, 0, 1, 2, 2))
    assert found.parse_rate == pytest.approx(5 / 7)
    assert found.score_mean == pytest.approx((5 + 3 + 4 + 4 + 4.75) / 5)
    assert found.entropy == pytest.approx(2 * 0.4 * math.log(1 / 0.4) + 0.2 * math.log(1 / 0.2))
    # Prompt a has two scored responses, of mean 4 both; b has one.
    assert (found.tie_rate, found.prompts_compared) == (1.0, 1)
    # Deviation 1 and 0; the one score of b tells nothing.
    assert found.spread == pytest.approx(0.5)
    assert found.length_mean == 2


def test_comparisons() -> None:
    found = comparison_figures(
        [
            comparison(0, 0, 1, "first"),
            comparison(0, 1, 0, "first"),
            comparison(0, 0, 1, None),
            comparison(1, 0, 1, "second"),
        ],
        judgments(),
    )
    assert (found.comparisons, found.decided, found.unequal) == (4, 3, 2)
    assert found.first_preference == pytest.approx(2 / 3)
    assert found.first_preference_at_equal_scores == 0
    assert found.higher_score_preference == 0.5


def test_responses() -> None:
    lines = [
        {"text": "xxx", "finished": True, "duplicate_of": None},
        {"text": "x", "finished": False, "duplicate_of": 0},
    ]
    found = response_figures(lines)
    assert (found.responses, found.unfinished, found.duplicates, found.length_mean) == (2, 1, 1, 2.0)


def test_nothing_to_measure() -> None:
    empty = judgment_figures([])
    assert (empty.parse_rate, empty.score_mean, empty.entropy) == (None, None, None)
    assert (empty.tie_rate, empty.spread, empty.length_mean) == (None, None, None)
    assert comparison_figures([], []).higher_score_preference is None
    assert response_figures([]).length_mean is None
