"""Judgments of a response for the benchmark's comparisons: different, of a realistic length, ending in a score.

Put together from sentences on the five points of the rubric and from the response's own words. They stand in for
sampled judgments, so that the prompts do not depend on a model.
"""

from __future__ import annotations

import random
import re

from metareward.model.chat import Chat
from metareward.roles.seed_judgment import judgment_text

TOKENS = (60, 120)
OPENINGS = (
    "Reading the response against the rubric, I go through the points in turn.",
    "I looked at how much of the request the response really takes up.",
    "The user asked for something specific, and that is what I measured.",
    "Overall the response is easy to follow, so the points turn on its content.",
    "My main question was whether a user could act on this answer.",
    "Point by point, this is what I found.",
    "At first sight the answer looks complete; a closer look is needed.",
    "Judged by the rubric alone, the following holds.",
    "The answer has strengths and gaps, which I weigh one at a time.",
    "To be fair to the response I read it twice.",
    "What matters here is substance rather than length.",
)
# For every point of the rubric: said where it is met, said where it is not.
POINTS = (
    ("It stays on the subject of the instruction.", "Much of it has no bearing on the instruction."),
    ("It covers a large part of what was asked.", "Large parts of the request go unanswered."),
    ("A user would be helped by it in practice.", "A user would still have to look elsewhere."),
    (
        "It is well organised, direct, and written as an assistant should write.",
        "Its order is loose, and some sentences could be dropped without loss.",
    ),
    (
        "It shows expert knowledge, with nothing superfluous.",
        "It shows little insight beyond common knowledge.",
    ),
)
REMARKS = (
    "The statement \u201c{words}\u201d carries most of the weight here.",
    "I noted \u201c{words}\u201d in particular.",
    "The part that says \u201c{words}\u201d could be made clearer.",
    "By contrast, \u201c{words}\u201d adds little.",
    "It is to the point where it says \u201c{words}\u201d.",
)


def different_judgments(
    response: str, count: int, chat: Chat, lengths: tuple[int, int] = TOKENS
) -> list[str]:
    """So many judgments of `response`, no two alike, each of so many tokens (least, most)."""
    draw = random.Random(f"judgments of {response}")
    openings = draw.sample(OPENINGS, len(OPENINGS))
    found: dict[str, None] = {}
    while len(found) < count:
        found[one_judgment(openings[len(found) % len(openings)], response, chat, draw, lengths)] = None
    return list(found)


def one_judgment(
    opening: str, response: str, chat: Chat, draw: random.Random, lengths: tuple[int, int]
) -> str:
    score = draw.randint(0, 5)
    met = set(draw.sample(range(len(POINTS)), score))
    points = [met_text if index in met else unmet for index, (met_text, unmet) in enumerate(POINTS)]
    sentences = [opening, *points]
    low, high = lengths
    wanted = draw.randint(low + 5, high - 15)
    words = re.findall(r"\S+", response)
    for remark in draw.sample(REMARKS, len(REMARKS)):
        if tokens(sentences, score, chat) >= wanted:
            break
        start = draw.randrange(max(1, len(words) - 6))
        # After the opening and before the last point: quotations are spread over the text.
        longer = list(sentences)
        longer.insert(
            draw.randint(1, len(sentences) - 1), remark.format(words=" ".join(words[start : start + 6]))
        )
        if tokens(longer, score, chat) <= high:
            sentences = longer
    while tokens(sentences, score, chat) > high:
        sentences.pop()
    return judgment_text(" ".join(sentences), score)


def tokens(sentences: list[str], score: int, chat: Chat) -> int:
    """Length of the judgment, its end-of-turn token not counted."""
    return len(chat.encode_completion(judgment_text(" ".join(sentences), score))) - 1
