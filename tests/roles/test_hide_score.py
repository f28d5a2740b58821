"""The score-blind option: judgments without their scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.roles.judge import parse_score
from metareward.roles.meta_judge import hide_score, meta_judge_messages
from metareward.roles.templates import load_template


@pytest.mark.parametrize(
    ("judgment", "shown"),
    [
        ("Useful, 3 criteria hold.\nScore: 4", "Useful, 3 criteria hold."),
        ("Useful.\n\nScore: 4\n", "Useful."),
        ("Useful.\n**Score: 4**", "Useful."),
        ("Useful.\n**Score:** 4/5", "Useful."),
        ("Useful.\n### Final Score: [4]", "Useful."),
        ("Useful.\nOverall score: 4 out of 5.", "Useful."),
        ("Useful.\nScore (0-5): 4", "Useful."),
        ('Useful.\n{"score": 4}', "Useful."),
        ("Useful. Score: 4", "Useful."),
        ("Score: 4\nUseful.", "Useful."),
        ("It says Score: 5 of itself.\nUseful.\nScore: 4", "It says of itself.\nUseful."),
        ("Useful.\nScore: 7", "Useful."),
        ("Useful.\nScore: 4-5", "Useful."),
        ("Useful.\r\nScore: 4\r\n", "Useful."),
        ("Score: 4", ""),
        ("", ""),
        ("No verdict, a score of 4.  \n", "No verdict, a score of 4.  \n"),
        ("The score: it is all fine.", "The score: it is all fine."),
    ],
)
def test_the_verdict_goes_and_the_reasoning_stays(judgment: str, shown: str) -> None:
    assert hide_score(judgment).split() == shown.split()
    if shown == judgment:
        assert hide_score(judgment) == judgment


JUDGMENT = st.lists(
    st.sampled_from(
        ["Sco", "re", "Score", ":", " ", "\n", "4", ".", "/", "5", "*", "[", "]", "out of", "_", "#"]
    )
    | st.text(max_size=4),
    max_size=25,
).map("".join)


@given(JUDGMENT)
def test_no_score_can_be_read_afterwards_and_hiding_twice_changes_nothing(judgment: str) -> None:
    hidden = hide_score(judgment)
    assert parse_score(hidden) is None
    assert hide_score(hidden) == hidden
    remaining = iter(judgment)
    assert all(character in remaining for character in hidden), "hiding only removes"


@given(
    reasoning=st.text(alphabet=st.characters(codec="ascii", exclude_characters=":=")), score=st.integers(0, 5)
)
def test_reasoning_without_a_verdict_stays_as_it_is(reasoning: str, score: int) -> None:
    assert hide_score(f"{reasoning}\nScore: {score}") == reasoning.rstrip()


def test_the_option_reaches_both_judgments_of_the_prompt() -> None:
    template = load_template("meta_judge")
    judgments = ("Good.\nScore: 4", "Bad.\nScore: 1")
    faithful = meta_judge_messages(template, "i", "r", *judgments)[0]["content"]
    blind = meta_judge_messages(template, "i", "r", *judgments, hide_scores=True)[0]["content"]
    assert "\nGood.\nScore: 4\n" in faithful
    assert "\nBad.\nScore: 1\n" in faithful
    assert "\nGood.\n</judgement_a>" in blind
    assert "\nBad.\n</judgement_b>" in blind
    assert "Score:" not in blind
