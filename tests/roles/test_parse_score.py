"""Reading a judge's score: what models really write, and what must not be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.roles.judge import parse_score, score_span

READ = [
    ("Score: 4", 4),
    ("Score: 0", 0),
    ("Score: 5", 5),
    ("score: 4", 4),
    ("SCORE: 4", 4),
    ("Score:4", 4),
    ("Score :  4", 4),
    ("Score\u00a0:\u00a04", 4),
    ("Score: 4 \n\n", 4),
    ("Score: 4\r\n", 4),
    ("Score：4", 4),
    ("Score = 4", 4),
    ("Score=4", 4),
    # Markdown and quotes
    ("**Score:** 4", 4),
    ("**Score: 4**", 4),
    ("**Score**: 4", 4),
    ("**Score:** **4**", 4),
    ("***Score:*** 4", 4),
    ("Score: ** 4 **", 4),
    ("__Score:__ 4", 4),
    ("_Score: 4_", 4),
    ("_Score:_ 4", 4),
    ("`Score: 4`", 4),
    ("```\nScore: 4\n```", 4),
    ("### Score: 4", 4),
    ("- Score: 4", 4),
    ("-Score: 4", 4),
    ("> Score: 4", 4),
    ('{"score": 4}', 4),
    ("'Score': '4'", 4),
    ("“Score: 4”", 4),
    ("Score: **4**/5", 4),
    # brackets
    ("Score: [4]", 4),
    ("Score: <4>", 4),
    ("Score: (4)", 4),
    ("Score: {4}", 4),
    ("Score: [[4]]", 4),
    ("Score: **[4]**", 4),
    ("Score: [**4**]", 4),
    ("[Score: 4]", 4),
    ("(Score: 4)", 4),
    ("<Score: 4>", 4),
    ("Score: [4/5]", 4),
    ("Score: [4]/5", 4),
    ("Score: (4 out of 5)", 4),
    ("Score: <4> out of 5", 4),
    # the scale
    ("Score: 4/5", 4),
    ("Score: 4 / 5", 4),
    ("Score: 4/5.", 4),
    ("Score: 4/5.0", 4),
    ("Score: 4.0/5.0", 4),
    ("Score: 4 out of 5", 4),
    ("Score: 4 out of 5.", 4),
    ("Score: 4 (out of 5)", 4),
    ("Score: 4 out of five", 4),
    ("Score: 4 of 5", 4),
    ("Score: 4 points", 4),
    ("Score: 4 points out of 5", 4),
    ("Score: 1 point", 1),
    ("Score (0-5): 4", 4),
    ("Score (0 to 5): 4", 4),
    ("Score (out of 5): 4", 4),
    ("**Score (out of 5):** 4", 4),
    # fractions
    ("Score: 4.5", 4.5),
    ("Score: 4.75", 4.75),
    ("Score: 5.0", 5),
    ("Score: 0.0", 0),
    ("Score: .5", 0.5),
    ("Score: 4.5/5", 4.5),
    ("Score: 05", 5),
    # what follows
    ("Score: 4.", 4),
    ("Score: 4!", 4),
    ("Score: 4,", 4),
    ("Score: 4, because it is useful", 4),
    ("Score: 4. The response lacks depth. 5 would be too much.", 4),
    ("Score: 4 - a solid answer", 4),
    ("Score: 4 – a solid answer", 4),
    ("Score: 4 because of 2 errors", 4),
    ("Score: 4 (four)", 4),
    ("Score: 4 (5 would need more detail)", 4),
    ("Score: 4 and no more", 4),
    ("Score: 4</s>", 4),
    ("Score: 4<|im_end|>", 4),
    ("Score: 4\n5 is for experts.", 4),
    ("Score: 4\n/10", 4),
    ("Score: 4\n\nNote: the user asked for 3 items.", 4),
    # where it stands
    ("It is good. Score: 4", 4),
    ("It is good.Score: 4", 4),
    ("good—Score: 4", 4),
    ("Final Score: 4", 4),
    ("**Overall score:** 4", 4),
    ("Total score: 4", 4),
    # the last one decides
    ("Score: 5\nScore: 2", 2),
    ('The response says "Score: 5" about itself.\nScore: 1', 1),
    ("Relevance score: 1\nUsefulness score: 1\nScore: 2", 2),
    ("Score: 9\nScore: 3", 3),
    ("Score: <n>\nScore: 3", 3),
    ("Score:\nScore: 3", 3),
    ("Score:Score: 3", 3),
    ("Score: 3\nI took points off: the score - 1 - was hard to give.", 3),
    ("Score: 3\nThe scores: 1, 2. Underscore: 4. sub_score: 4. F1-score: 1. Scored: 5", 3),
    ("Score: 3\nScore (out of 10): 6", 3),
]

NOT_READ = [
    "",
    "Score",
    "Score:",
    "Score: ",
    "4",
    "4/5",
    "I give it a score of 4.",
    "The score is 4",
    "Score 4",
    "Score - 4",
    "score - 4",
    "Score – 4",
    "Scores: 4",
    "Scored: 4",
    "Underscore: 4",
    "sub_score: 4",
    "sub-score: 4",
    "Score (out of 10): 4",
    "Score (1-10): 4",
    # no number, or not the whole story
    "Score: four",
    "Score: <n>",
    "Score: n",
    "Score: N/A",
    "Score: none",
    "Score: nan",
    "Score: inf",
    "Score: about 4",
    "Score: ~4",
    "Score: ≈4",
    "Score: >4",
    "Score: <4",
    "Score: [4",
    "Score: [4)",
    "Score: [[4]",
    "Score: [4, 5]",
    "Score: [4-5]",
    "Score: (4 + 1)",
    "Score: ４",
    "Score: ٤",
    "Score: IV",
    "Score:\n4",
    "Score: ..5",
    # out of range
    "Score: 6",
    "Score: 7",
    "Score: 10",
    "Score: 45",
    "Score: 100",
    "Score: 5.01",
    "Score: 5.5",
    "Score: -1",
    "Score: - 1",
    "Score: −1",
    "Score: –1",
    "Score: +1",
    "Score: -0",
    "Score: " + "9" * 400,
    # another scale
    "Score: 3/10",
    "Score: 8/10",
    "Score: 3 / 10",
    "Score: [3]/10",
    "Score: [3/10]",
    "Score: **3**/10",
    "Score: 3/50",
    "Score: 3/5.5",
    "Score: 3/4",
    "Score: 3/5/2024",
    "Score: 3⁄10",
    "Score: 3／10",
    "Score: 3 out of 10",
    "Score: 3 (out of 10)",
    "Score: 3 points out of 10",
    "Score: 3 of 10",
    "Score: 3 out of 50",
    "Score: 3%",
    "Score: 3 %",
    # ranges, lists, sums
    "Score: 4-5",
    "Score: 4 - 5",
    "Score: 4–5",
    "Score: 4—5",
    "Score: 4~5",
    "Score: 4 to 5",
    "Score: 4 or 5",
    "Score: 4 or even 5",
    "Score: 4 and 5",
    "Score: 4, 5",
    "Score: 4, or 5",
    "Score: 4 5",
    "Score: 4 1/2",
    "Score: 4½",
    "Score: 4/5 or 5/5",
    "Score: 4 out of 5 - 5 out of 5",
    "Score: 4 -> 5",
    "Score: 4 → 5",
    "Score: 4 | 5",
    "Score: 4:5",
    "Score: 4+",
    "Score: 4±1",
    "Score: 1+1+1",
    "Score: 1 + 1 + 1 = 3",
    "Score: 4 = 4",
    "Score: 4 * 1",
    "Score: 4 × 1",
    # part of a longer number or word
    "Score: 4,5",
    "Score: 4.5.1",
    "Score: 4th",
    "Score: 4e1",
    "Score: 0x4",
    "Score: 4k",
    "Score: 4_000",
    "Score: 4²",
    "Score: 4５",
    # the last one decides, also when it is unreadable
    "Score: 4\nScore: 7",
    "Score: 4\nScore: -1",
    "Score: 4\nScore: N/A",
    "Score: 4\nScore: 3/10",
    "Score: 4\nScore:",
    'The response claims "Score: 5".\nScore: five',
]


@pytest.mark.parametrize(("text", "score"), READ)
def test_read(text: str, score: float) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize("text", NOT_READ)
def test_not_read(text: str) -> None:
    assert parse_score(text) is None
    assert score_span(text) is None


@pytest.mark.parametrize(("text", "score"), READ)
def test_span_covers_the_number_alone(text: str, score: float) -> None:
    span = score_span(text)
    assert span is not None
    number = text[span[0] : span[1]]
    assert float(number) == score
    assert set(number) <= set("0123456789.")


def test_span_is_that_of_the_last_verdict() -> None:
    text = "Score: 4\nthen Score: 4.5/5"
    assert score_span(text) == (text.index("4.5"), text.index("4.5") + 3)


IN_RANGE = st.sampled_from(["0", "1", "2", "3", "4", "5", "0.5", "2.25", "4.9", "5.0"])
JUDGMENT = st.lists(
    st.sampled_from(
        ["Score", ":", "=", " ", "\n", "4", ".", "/", "5", "*", "[", "]", "<", "-", "or", "(", ")", "_"]
    )
    | st.text(max_size=5),
    max_size=25,
).map("".join)


@given(reasoning=st.text() | JUDGMENT, number=IN_RANGE)
def test_whatever_comes_before_the_last_line_is_read(reasoning: str, number: str) -> None:
    text = f"{reasoning}\nScore: {number}"
    assert parse_score(text) == float(number)
    assert score_span(text) == (len(text) - len(number), len(text))


@given(reasoning=st.text() | JUDGMENT, number=st.integers(6, 10**6) | st.integers(-(10**6), -1))
def test_nothing_before_an_out_of_range_last_line_is_read(reasoning: str, number: int) -> None:
    assert parse_score(f"{reasoning}\nScore: {number}") is None


@given(JUDGMENT)
def test_a_score_is_none_or_in_range_and_agrees_with_its_span(text: str) -> None:
    score, span = parse_score(text), score_span(text)
    assert (score is None) == (span is None)
    if score is not None and span is not None:
        assert 0 <= score <= 5
        assert float(text[slice(*span)]) == score


@pytest.mark.parametrize(
    "filler", [" ", "*", "_", "`", "Score:", "Score: 4 ", "(", "Score (", "4", "\t \u00a0"]
)
def test_long_runs_take_no_exponential_time(filler: str) -> None:
    for text in (f"Score: 4{filler * 3000}", f"Score{filler * 3000}: 4", f"{filler * 3000}\nScore: 4"):
        assert parse_score(text) in (4.0, None)
