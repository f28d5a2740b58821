"""The meta-judge: asks which of two judgments is better, and reads it (arXiv 2407.19594, section 2.2).

"A" is the judgment shown first, "B" the one shown second. There is no tie: a text that names both or neither
has no winner. The two letters are read by the same rules, for a reader that misses one of them more often
would add a position bias of its own.
"""

from __future__ import annotations

import re
from typing import Literal

from metareward.roles import verdict
from metareward.roles.judge import remove_scores
from metareward.roles.templates import Message, fill_template, user_message
from metareward.roles.verdict import MARK, OPEN, SPACE

Winner = Literal["first", "second"]

_LABEL = re.compile(verdict.label("winner", r"is\b"), re.IGNORECASE)
_JUDGMENT = r"(?i:(?:the[ \t]+)?judge?ment)[ \t\u00a0*_`\"'“”‘’:#\-\[(<{]*+"
_NAMED = re.compile(rf"{MARK}{OPEN}{MARK}{_JUDGMENT}(?P<letter>[ABab])(?![^\W_])")
# A bare letter must end its phrase: "Winner: A tie" has an article, not a name. The rule holds for B too.
_ENDS = rf"{MARK}[\])>}}]{{0,2}}{MARK}(?:[^\w\s]|[\n\r]|\Z)"
_BARE = re.compile(rf"{MARK}{OPEN}{MARK}(?P<letter>[AB])(?![^\W_])(?={_ENDS})")

_CLOSERS = r"[ \t\u00a0*_`\"'“”‘’\])>}.(]*+"
_OPENERS = r"[ \t\u00a0*_`\"'“”‘’\[(<{]*+"
_JOINED = re.compile(
    rf"{_CLOSERS}(?i:(?:[-–—/&|,;=+<>~]|or\b|and\b|versus\b|vs\b\.?|with\b|to\b){SPACE}){{0,3}}"
    rf"{_OPENERS}(?:{_JUDGMENT}[ABab]|[AB])(?![^\W_])"
)
_SLASHED = re.compile(rf"{_CLOSERS}[/|&]{_OPENERS}[ab](?![^\W_])")
_TIED = re.compile(r"\b(?:tie|ties|tied|draw)\b", re.IGNORECASE)


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
    found = verdict.last_match(_LABEL, text)
    if found is None:
        return None
    choice = _NAMED.match(text, found.end()) or _BARE.match(text, found.end())
    if choice is None:
        return None
    rest = verdict.rest_of_line(text, choice.end())
    if _JOINED.match(rest) or _SLASHED.match(rest) or _TIED.search(rest):
        return None
    return "first" if choice["letter"] in "Aa" else "second"
