"""The judgments that the seed stage teaches: a short rationale, then the score that people's label gives.

Where a quality file has no rationale, one is written from what can be seen in the response: its length, its form, how many of the
instruction's key words it takes up. It never looks at the label, so nothing but the score itself carries people's opinion, and
what the model learns to say before the score is true of the response it reads.
"""

from __future__ import annotations

import math
import re

# Words too common to show that a response takes up an instruction.
COMMON = frozenset(
    [
        "a",
        "about",
        "all",
        "also",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "could",
        "do",
        "does",
        "for",
        "from",
        "give",
        "had",
        "has",
        "have",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "like",
        "make",
        "me",
        "more",
        "most",
        "my",
        "no",
        "not",
        "of",
        "on",
        "one",
        "or",
        "our",
        "please",
        "should",
        "so",
        "some",
        "tell",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "up",
        "us",
        "use",
        "want",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "would",
        "write",
        "you",
        "your",
    ]
)
WORD = re.compile(r"[^\W\d_]{2,}")
LENGTHS = (
    (3, "a few words"),
    (15, "a single short remark"),
    (40, "a short reply"),
    (90, "a paragraph"),
    (180, "a fairly full reply"),
)
LONGEST = "a long reply"


def score_of_quality(quality: float) -> int:
    """The score class, 0 to 5, of a quality label in [0, 1]: the nearest fifth, halves up."""
    return math.floor(5 * quality + 0.5)


def judgment_text(rationale: str, score: int) -> str:
    """The judgment in the form that the judge's template asks for."""
    return f"{rationale.strip()}\nScore: {score}"


def observed_rationale(instruction: str, response: str) -> str:
    """Two sentences on what can be seen of a response, at most about 35 words."""
    words = WORD.findall(response.lower())
    form = form_of(response)
    size = next((name for limit, name in LENGTHS if len(words) <= limit), LONGEST)
    taken_up = coverage(instruction, words)
    return f"The response is {size}{f' {form}' if form else ''}. {taken_up}{repetition(words)}"


def form_of(response: str) -> str:
    """What the response looks like, or nothing where it is plain text."""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    listed = sum(bool(re.match(r"(?:[-*•]|\d+[.)])\s", line)) for line in lines)
    if "```" in response:
        return "with a block of code"
    if listed >= 3:
        return f"with a list of {'several' if listed < 8 else 'many'} points"
    if len(lines) >= 3:
        return "in several paragraphs"
    return "that ends in a question" if response.rstrip().endswith("?") else ""


def coverage(instruction: str, words: list[str]) -> str:
    """How many of the instruction's key words the response takes up."""
    key = {word for word in WORD.findall(instruction.lower()) if word not in COMMON}
    if not key:
        return "The instruction has few key words to go by."
    share = len(key & set(words)) / len(key)
    if share == 0.0:
        return "It takes up none of the instruction's key words."
    if share < 0.34:
        return "It takes up few of the instruction's key words."
    return f"It takes up {'some' if share < 0.67 else 'most'} of the instruction's key words."


def repetition(words: list[str]) -> str:
    """Noted only where a long response says the same over again."""
    return " It repeats itself." if len(words) > 60 and len(set(words)) / len(words) < 0.4 else ""


def comparison_text(winner: str) -> str:
    """A comparison by the meta-judge's three considerations; `winner` is "A" or "B"."""
    loser = "B" if winner == "A" else "A"
    return (
        f"Adherence to the rubric: Judgement {winner} awards the points that the rubric allows, Judgement {loser} does not.\n"
        f"Accuracy: Judgement {winner} describes this response, Judgement {loser} does not fit it.\n"
        f"Consistency: the total of Judgement {winner} follows from its reasons.\n"
        f"Winner: Judgement {winner}"
    )
