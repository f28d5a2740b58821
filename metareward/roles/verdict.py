"""What the two verdict parsers share: how models dress up a line such as `Score: 4`.

Both verdicts have a label ("Score", "Winner"), a separator and a value on the same line. The models put
Markdown or quotes around any part, and brackets around the value. A label is found anywhere in a line, since
small models run the verdict on after their reasoning; the LAST label of the text is the verdict, whatever it
says. An unreadable last verdict makes the whole text unreadable: an earlier one may be a quotation.

Runs of blanks are matched possessively (`*+`): a sampled text can hold thousands of blanks, and several
adjoining runs that give characters back would take time cubic in them.
"""

from __future__ import annotations

import re

SPACE = r"[ \t\u00a0]*+"
MARK = r"[ \t\u00a0*_`\"'“”‘’]*+"
"""Blanks, Markdown emphasis and quotes: they may stand between any two parts of a verdict."""

OPEN = r"[\[(<{]{0,2}"
_CLOSING_OF = {"[": "]", "(": ")", "<": ">", "{": "}"}


def closing(opening: str) -> str:
    """The brackets that close `opening`, innermost first: "[[" gives "]]"."""
    return "".join(_CLOSING_OF[bracket] for bracket in reversed(opening))


def label(word: str, note: str = "") -> str:
    """Regular expression (to be compiled ignoring case) of a label with its separator.

    The word must stand alone: "underscore:", "sub_score:" and "F1-score:" are other things than a score.
    `note` is an optional expression between word and separator.

    The separators are `:`, its full-width form, and `=`. A dash is none: "score - 1" may be a subtraction.
    """
    alone = r"(?<![^\W_])(?<![^\W_][-_])"
    return rf"{alone}{word}{MARK}(?:{note}{MARK})?[:=：]"


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match of `pattern` in `text`."""
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None


def rest_of_line(text: str, start: int) -> str:
    """The text from `start` to the end of its line."""
    return re.split(r"[\n\r]", text[start:], maxsplit=1)[0]
