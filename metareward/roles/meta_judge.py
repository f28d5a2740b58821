"""The meta-judge: asks which of two judgments is better, and reads it (arXiv 2407.19594, section 2.2).

"A" is the judgment shown first, "B" the one shown second. There is no tie; see `winner` for how a verdict is read.
"""

from __future__ import annotations

from metareward.roles.judge import remove_scores
from metareward.roles.templates import Message, fill_template, user_message
from metareward.roles.winner import Winner, winner_parser

__all__ = ["Winner", "hide_score", "meta_judge_messages", "parse_winner"]

_parse = winner_parser("judge?ment")


def meta_judge_messages(
    template: str,
    instruction: str,
    response: str,
    judgment_a: str,
    judgment_b: str,
    hide_scores: bool = False,
) -> list[Message]:
    """The conversation whose next turn names the better of two judgments of `response`.

    Args:
        template: from `load_template("meta_judge", ...)`.
        instruction: the prompt that the actor answered.
        response: the response that both judgments are about.
        judgment_a: the judgment shown first.
        judgment_b: the judgment shown second.
        hide_scores: show both judgments without their scores (`hide_score`), against a meta-judge that
            goes by the higher score. Off in the paper.
    """
    if hide_scores:
        judgment_a, judgment_b = hide_score(judgment_a), hide_score(judgment_b)
    values = {
        "instruction": instruction,
        "response": response,
        "judgment_a": judgment_a,
        "judgment_b": judgment_b,
    }
    return user_message(fill_template(template, values))


def hide_score(judgment: str) -> str:
    """The judgment without its score: see `judge.remove_scores`. The reasoning may still betray it."""
    return remove_scores(judgment)


def parse_winner(text: str) -> Winner | None:
    """Who wins: "first" for Judgement A, "second" for Judgement B, None where the text does not say so.

    Reads `Winner: Judgement A` in either spelling and any case, with Markdown, quotes or brackets, and a bare
    capital letter that ends its phrase. The LAST verdict decides alone: if it names both, neither or a tie,
    there is no winner.
    """
    return _parse(text)
