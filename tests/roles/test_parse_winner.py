"""Reading the meta-judge's winner."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.roles.meta_judge import parse_winner

# Every form is tested for A and, with the letters exchanged, for B: one rule for both positions.
NAMES_A = [
    "Winner: Judgement A",
    "Winner: Judgment A",
    "winner: judgement a",
    "WINNER: JUDGEMENT A",
    "Winner:Judgement A",
    "Winner : Judgement A",
    "Winner = Judgement A",
    "Winner：Judgement A",
    "Winner is: Judgement A",
    "**Winner:** Judgement A",
    "**Winner: Judgement A**",
    "**Winner**: **Judgment A**",
    "Winner: *Judgement A*",
    "### Winner: Judgement A",
    "`Winner: Judgement A`",
    "_Winner: Judgement A_",
    '"Winner: Judgement A"',
    "Winner: “Judgement A”",
    "Winner: [Judgement A]",
    "Winner: [[Judgement A]]",
    "Winner: (Judgement A)",
    "Winner: <Judgement A>",
    "Winner: Judgement [A]",
    "Winner: Judgement (A)",
    "Winner: **[Judgement A]**",
    "Winner: Judgement **A**",
    "Winner: Judgement: A",
    "Winner: Judgement-A",
    "Winner: Judgement_A",
    "Winner: JudgementA",
    "Winner: the Judgement A",
    "Winner: The judgment A",
    "Winner: Judgement A.",
    "Winner: Judgement A!",
    "Winner: Judgement A\n\n",
    "Winner: Judgement A\r\n",
    "Winner: Judgement A</s>",
    "Winner: Judgement A because it follows the rubric",
    "Winner: Judgement A, as it follows the rubric",
    "Winner: Judgement A - more accurate",
    "Winner: Judgement A (more accurate than Judgement C)",
    "Winner: Judgement A. Judgement C is vague.",
    "Winner: Judgement A, a careful reading",
    "My choice. Winner: Judgement A",
    "Winner: A",
    "Winner: A.",
    "Winner: **A**",
    "Winner: [A]",
    "Winner: [[A]]",
    "Winner: (A)",
    "Winner: A (more accurate)",
    "Winner: A, since it is accurate",
    "Winner: A\nbecause it is accurate",
    "Winner: Judgement A\nJudgement B was less accurate.",
    "Winner: Judgement B\nWinner: Judgement A",
    'Judgement B would say "Winner: Judgement B".\nWinner: Judgement A',
    "Winner: Tie\nWinner: Judgement A",
    "Winner: Judgement A or Judgement B\nWinner: Judgement A",
    "Winner: Judgement A\nThe winners: both. Non-winner: Judgement B",
]

NOBODY = [
    "",
    "Winner",
    "Winner:",
    "Judgement A",
    "Judgement A wins",
    "The winner is Judgement A",
    "Winner - Judgement A",
    "Winners: Judgement A",
    "Non-winner: Judgement A",
    "Winner:\nJudgement A",
    "Winner: Tie",
    "Winner: A tie",
    "Winner: a tie",
    "Winner: a",
    "Winner: both",
    "Winner: neither",
    "Winner: None",
    "Winner: Judgement",
    "Winner: Judgement C",
    "Winner: Judgement 1",
    "Winner: Response A",
    "Winner: not Judgement A",
    "Winner: Judgement AB",
    "Winner: Judgement A1",
    "Winner: AB",
    "Winner: Apple",
    "Winner: A judgement",
    "Winner: A and B",
    "Winner: A or B",
    "Winner: A/B",
    "Winner: A|B",
    "Winner: A, B",
    "Winner: A & B",
    "Winner: A = B",
    "Winner: A > B",
    "Winner: [A/B]",
    "Winner: [A] or [B]",
    "Winner: Judgement A or B",
    "Winner: Judgement A and B",
    "Winner: Judgement A/B",
    "Winner: Judgement a/b",
    "Winner: Judgement A|B",
    "Winner: Judgement A B",
    "Winner: Judgement A or Judgement B",
    "Winner: Judgement A and Judgement B",
    "Winner: Judgement A, Judgement B",
    "Winner: Judgement A vs. Judgement B",
    "Winner: Judgement A and also... Judgement A, Judgement B tie",
    "Winner: [Judgement A] or [Judgement B]",
    "Winner: **Judgement A** or **Judgement B**",
    "Winner: `Judgement A` or `Judgement B`",
    "Winner: Judgement A (tied)",
    "Winner: Judgement A, but it is a tie",
    "Winner: Judgement A (a draw)",
    "Winner: Judgement A\nWinner: Tie",
    "Winner: Judgement A\nWinner: Judgement A or B",
    "Winner: Judgement A\nWinner:",
]


def exchange(text: str) -> str:
    """The text with the letters A and B exchanged where they stand alone or after "Judgement"."""

    def other(match: re.Match[str]) -> str:
        return match[0].translate(str.maketrans("ABab", "BAba"))

    return re.sub(r"(?<![A-Za-z])[ABab](?![A-Za-z])|(?<=Judgement)[AB](?![A-Za-z])", other, text)


@pytest.mark.parametrize("text", NAMES_A)
def test_a_is_the_first_and_b_the_second(text: str) -> None:
    assert parse_winner(text) == "first"
    assert parse_winner(exchange(text)) == "second"


@pytest.mark.parametrize("text", NOBODY)
def test_nobody(text: str) -> None:
    assert parse_winner(text) is None
    assert parse_winner(exchange(text)) is None


VERDICT = st.lists(
    st.sampled_from(
        ["Winner", ":", " ", "\n", "Judgement ", "A", "B", " or ", "/", "*", "[", "]", ",", "tie", "."]
    )
    | st.text(max_size=5),
    max_size=20,
).map("".join)


@given(explanation=st.text() | VERDICT, spelling=st.sampled_from(["Judgement", "Judgment"]))
def test_whatever_comes_before_the_last_line_is_read(explanation: str, spelling: str) -> None:
    assert parse_winner(f"{explanation}\nWinner: {spelling} A") == "first"
    assert parse_winner(f"{explanation}\nWinner: {spelling} B") == "second"
    assert parse_winner(f"{explanation}\nWinner: Tie") is None


@given(VERDICT)
def test_exchanging_the_letters_exchanges_the_winner(text: str) -> None:
    exchanged = text.translate(str.maketrans("AB", "BA"))
    swapped = {"first": "second", "second": "first", None: None}
    # "a" and "b" inside words are no names; only texts without them have a clean exchange.
    if not set(text.replace("tie", "")) & set("ab"):
        assert parse_winner(exchanged) == swapped[parse_winner(text)]


@pytest.mark.parametrize("filler", [" ", "*", "]", "[", "Winner:", "Winner: A ", "or ", ". ", "-"])
def test_long_runs_take_no_exponential_time(filler: str) -> None:
    for text in (
        f"Winner: Judgement A{filler * 3000}",
        f"Winner{filler * 3000}: A",
        f"Winner: {filler * 3000}A",
    ):
        assert parse_winner(text) in ("first", None)
