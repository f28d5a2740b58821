"""Reads which of two shown texts a comparing role names as the better one.

The meta-judge compares judgments and the response judge compares responses; their verdicts differ in one word only. "A" is what was
shown first, "B" what was shown second. There is no tie: a text that names both or neither has no winner. The two letters are read
by the same rules, for a reader that misses one of them more often would add a position bias of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from metareward.roles import verdict
from metareward.roles.verdict import MARK, OPEN, SPACE

Winner = Literal["first", "second"]

_LABEL = re.compile(verdict.label("winner", r"is\b"), re.IGNORECASE)
# A bare letter must end its phrase: "Winner: A tie" has an article, not a name. The rule holds for B too.
_ENDS = rf"{MARK}[\])>}}]{{0,2}}{MARK}(?:[^\w\s]|[\n\r]|\Z)"
_BARE = re.compile(rf"{MARK}{OPEN}{MARK}(?P<letter>[AB])(?![^\W_])(?={_ENDS})")

_CLOSERS = r"[ \t\u00a0*_`\"'“”‘’\])>}.(]*+"
_OPENERS = r"[ \t\u00a0*_`\"'“”‘’\[(<{]*+"
_SLASHED = re.compile(rf"{_CLOSERS}[/|&]{_OPENERS}[ab](?![^\W_])")
_TIED = re.compile(r"\b(?:tie|ties|tied|draw)\b", re.IGNORECASE)


def winner_parser(noun: str) -> Callable[[str], Winner | None]:
    """A reader of verdicts such as `Winner: Judgement A`.

    The reader returns "first" for A, "second" for B, None where the text does not say so. It takes any case, Markdown, quotes or
    brackets, and a bare capital letter that ends its phrase. The LAST verdict decides alone: if it names both, neither or a tie,
    there is no winner.

    Args:
        noun: a regular expression of what is compared, such as "judge?ment"; read in any case.
    """
    thing = rf"(?i:(?:the[ \t]+)?{noun})[ \t\u00a0*_`\"'“”‘’:#\-\[(<{{]*+"
    named = re.compile(rf"{MARK}{OPEN}{MARK}{thing}(?P<letter>[ABab])(?![^\W_])")
    joined = re.compile(
        rf"{_CLOSERS}(?i:(?:[-–—/&|,;=+<>~]|or\b|and\b|versus\b|vs\b\.?|with\b|to\b){SPACE}){{0,3}}"
        rf"{_OPENERS}(?:{thing}[ABab]|[AB])(?![^\W_])"
    )

    def parse(text: str) -> Winner | None:
        found = verdict.last_match(_LABEL, text)
        if found is None:
            return None
        choice = named.match(text, found.end()) or _BARE.match(text, found.end())
        if choice is None:
            return None
        rest = verdict.rest_of_line(text, choice.end())
        if joined.match(rest) or _SLASHED.match(rest) or _TIED.search(rest):
            return None
        return "first" if choice["letter"] in "Aa" else "second"

    return parse
