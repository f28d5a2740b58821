"""The judge: asks for a score from 0 to 5 by the rubric, and reads it (arXiv 2407.19594, section 2.1).

The judge gives its reasoning first and ends with `Score: <n>`. Only the last verdict of the completion
counts, because the reasoning may quote a score that the judged response claims for itself. A text that could
be read in two ways ("4-5", "1 + 1 + 1 = 3") has no score: a missing judgment is better than a wrong one.
"""

from __future__ import annotations

import re

from metareward.roles import verdict
from metareward.roles.templates import Message, fill_template, user_message
from metareward.roles.verdict import MARK, OPEN, SPACE

MIN_SCORE, MAX_SCORE = 0.0, 5.0

_SCALE_NOTE = rf"\({SPACE}(?:out of{SPACE}5|0{SPACE}(?:-|–|to){SPACE}5){SPACE}\)"
_LABEL = re.compile(verdict.label("score", _SCALE_NOTE), re.IGNORECASE)
_MARK = re.compile(MARK)
# No sign: "+1" is a point that is added, "-1" is out of range.
_VALUE = re.compile(rf"{MARK}(?P<open>{OPEN}){MARK}(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")

_UNIT = rf"{SPACE}(?:points?|pts?\.?|stars?)?{SPACE}"
_OF_FIVE = rf"{_UNIT}(?:/|out{SPACE}of|of\b){MARK}(?:5(?:\.0+)?(?![0-9]|\.[0-9])|five)(?![^\W_]|/)"
_SCALE = re.compile(rf"{MARK}(?:\({_OF_FIVE}{SPACE}\)|{_OF_FIVE})", re.IGNORECASE)
# What makes the figure part of something else: a letter or decimal ("4th", "4.5.1"), another scale, a range,
# a list, a sum, a percentage.
_GLUED = re.compile(r"[^\W_]|\.+[0-9]")
_CONTINUED = re.compile(
    rf"{MARK}(?:"
    rf"[0-9+%±]"
    rf"|\(?{_UNIT}(?:[/⁄／]|out{SPACE}of\b|of{SPACE}[0-9]|%)"
    rf"|or\b"
    rf"|(?:(?:[-–—−~×÷=,;:<>→|&]|to\b|and\b|or\b|through\b){SPACE}){{1,3}}{MARK}\.?[0-9]"
    rf")",
    re.IGNORECASE,
)

_SHOWN = re.compile(
    rf"[*_`#>]{{0,8}}(?:(?:final|overall|total){SPACE})?{_LABEL.pattern}(?:[^\w\n\r]|_)*[0-9]\S*(?:{_SCALE.pattern})?",
    re.IGNORECASE,
)


def judge_messages(template: str, instruction: str, response: str) -> list[Message]:
    """The conversation whose next turn is a judgment of `response`.

    Args:
        template: from `load_template("judge", ...)`.
        instruction: the prompt that the actor answered.
        response: the actor's text; a closing tag of the template inside it is neutralised (see `templates`).
    """
    return user_message(fill_template(template, {"instruction": instruction, "response": response}))


def parse_score(text: str) -> float | None:
    """The score that a judgment ends with, or None where it has no readable one in [0, 5].

    Reads `Score: 4` in any case, with Markdown or quotes anywhere, `=` for the colon, brackets around the
    number, fractions ("4.5", ".5"), "out of 5" or "/5" after it, and "(0-5)" or "(out of 5)" after the word.
    The LAST verdict decides alone: if it is out of range or cannot be read, there is no score.
    """
    span = score_span(text)
    return None if span is None else float(text[span[0] : span[1]])


def score_span(text: str) -> tuple[int, int] | None:
    """Where the number that `parse_score` reads stands in `text`: (start, end) in characters, or None."""
    found = verdict.last_match(_LABEL, text)
    if found is None:
        return None
    value = _VALUE.match(text, found.end())
    if value is None or not _stands_alone(verdict.rest_of_line(text, value.end()), value["open"]):
        return None
    return value.span("number") if MIN_SCORE <= float(value["number"]) <= MAX_SCORE else None


def remove_scores(text: str) -> str:
    """`text` without any score verdict, quoted ones and out-of-range ones included.

    A line that says nothing else goes as a whole. A text without a verdict is returned as it is. Afterwards
    `parse_score` finds nothing; a score told in other words ("I award four points") stays.
    """
    # Cutting a phrase out can join its neighbours into a new one. Each turn is shorter, so this ends.
    while (shorter := _remove_once(text)) != text:
        text = shorter
    return text


def _stands_alone(rest: str, opening: str) -> bool:
    if _GLUED.match(rest):
        return False
    rest = _skip(_SCALE, rest)
    if opening:
        rest = _skip(_MARK, rest)
        if not rest.startswith(verdict.closing(opening)):
            return False
        rest = _skip(_SCALE, rest[len(opening) :])
    return _CONTINUED.match(rest) is None


def _skip(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.match(text)
    return text[found.end() :] if found else text


def _remove_once(text: str) -> str:
    kept = []
    for line in re.split(r"(?<=\n)", text):
        # The plain label first: it is several times quicker to look for, and most lines have none.
        shorter = _SHOWN.sub("", line) if _LABEL.search(line) else line
        if shorter == line or re.search(r"[^\W_]", shorter):
            kept.append(shorter)
    remaining = "".join(kept)
    return text if remaining == text else remaining.rstrip()
