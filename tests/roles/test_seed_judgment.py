"""The judgments that the seed stage teaches: readable by the judge's own parser, and blind to the label but for the score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.roles.judge import parse_score
from metareward.roles.meta_judge import hide_score, parse_winner
from metareward.roles.seed_judgment import (
    comparison_text,
    coverage,
    form_of,
    judgment_text,
    observed_rationale,
    score_of_quality,
)


@pytest.mark.parametrize(
    ("quality", "score"),
    [
        (0.0, 0),
        (0.0999, 0),
        (0.1, 1),
        (0.2, 1),
        (0.3, 2),
        (0.5, 3),
        (0.69, 3),
        (0.7, 4),
        (0.8999, 4),
        (0.9, 5),
        (1.0, 5),
    ],
)
def test_the_score_is_the_nearest_fifth_halves_up(quality: float, score: int) -> None:
    assert score_of_quality(quality) == score


@given(one=st.floats(0, 1), two=st.floats(0, 1))
def test_scores_keep_the_order_of_the_labels(one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert 0 <= score_of_quality(low) <= score_of_quality(high) <= 5
    assert math.isclose(score_of_quality(one) / 5, one, abs_tol=0.1 + 1e-9)


@given(rationale=st.text(max_size=60), score=st.integers(0, 5))
def test_a_judgment_is_read_as_its_score(rationale: str, score: int) -> None:
    """Also where the rationale itself names another score."""
    text = judgment_text(rationale, score)
    assert parse_score(text) == score
    assert parse_score(judgment_text(f"{rationale}\nScore: 2", score)) == score
    assert text.endswith(f"\nScore: {score}")


@given(instruction=st.text(max_size=200), response=st.text(max_size=400))
def test_an_observed_rationale_names_no_score(instruction: str, response: str) -> None:
    rationale = observed_rationale(instruction, response)
    assert parse_score(rationale) is None
    assert hide_score(judgment_text(rationale, 3)) == rationale
    assert 3 < len(rationale.split()) <= 40
    assert "\n" not in rationale
    assert rationale == observed_rationale(instruction, response)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("", "a few words"),
        ("No.", "a few words"),
        ("word " * 15, "a single short remark"),
        ("word " * 16, "a short reply"),
        ("word " * 41, "a paragraph"),
        ("word " * 91, "a fairly full reply"),
        ("word " * 181, "a long reply"),
    ],
)
def test_length_is_told(response: str, said: str) -> None:
    assert f"The response is {said}" in observed_rationale("Question", response)


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("Plain words.", ""),
        ("What do you mean?", "that ends in a question"),
        ("One.\n\nTwo.\n\nThree.", "in several paragraphs"),
        ("- a\n- b\n* c", "with a list of several points"),
        ("\n".join(f"{index}. point" for index in range(9)), "with a list of many points"),
        ("```\ncode\n```", "with a block of code"),
    ],
)
def test_form_is_told(response: str, form: str) -> None:
    assert form_of(response) == form


def test_coverage_of_the_instruction_s_key_words() -> None:
    instruction = "Please tell me about the migration of arctic terns"
    assert "none of" in coverage(instruction, ["bread"])
    assert "few of" in coverage(instruction, ["arctic", "bread"])
    assert "some of" in coverage(instruction, ["arctic", "terns"])
    assert "most of" in coverage(instruction, ["migration", "arctic", "terns"])
    assert "few key words" in coverage("What is it?", ["bread"])


def test_repetition_is_told_of_long_responses_only() -> None:
    assert "repeats itself" in observed_rationale("Question", "again and " * 40)
    assert "repeats itself" not in observed_rationale("Question", "again and " * 10)


@pytest.mark.parametrize(("letter", "winner"), [("A", "first"), ("B", "second")])
def test_a_comparison_is_read_as_its_winner(letter: str, winner: str) -> None:
    text = comparison_text(letter)
    assert parse_winner(text) == winner
    assert all(word in text for word in ("Adherence", "Accuracy", "Consistency"))
    # The two differ in nothing but the letters, so that no other word gives the winner away.
    swapped = comparison_text("B" if letter == "A" else "A")
    marked = text.replace(f"Judgement {letter}", "Judgement W")
    assert marked.replace("Judgement A", "Judgement L").replace(
        "Judgement B", "Judgement L"
    ) == swapped.replace(f"Judgement {'B' if letter == 'A' else 'A'}", "Judgement W").replace(
        f"Judgement {letter}", "Judgement L"
    )
