"""What people said, to hold a judge against: quality labels, and pairs of responses of which one was preferred."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metareward.errors import UserError
from metareward.run.inputs import (
    LabelledResponse,
    identity_of,
    locate,
    read_lines,
    read_quality,
    text_of,
)


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, of which people preferred `chosen`."""

    prompt_id: str
    prompt: str
    pair_id: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Judged:
    """A response that the judge is asked about; (source, prompt_id, response_id) is its identity."""

    source: str
    prompt_id: str
    prompt: str
    response_id: str
    response: str


def read_preferences(path: Path) -> list[PreferencePair]:
    """JSONL of {prompt, chosen, rejected}, all strings, in file order; a prompt_id and pair_id are taken where a line has them.

    Raises:
        UserError: naming the line that is wrong, or repeats an earlier one.
    """
    located = locate(str(path))
    found: dict[tuple[str, str], tuple[int, PreferencePair]] = {}
    for number, line in read_lines(located):
        prompt, chosen, rejected = (
            text_of(located, number, line, name) for name in ("prompt", "chosen", "rejected")
        )
        if chosen == rejected:
            raise UserError(
                f"{located}, line {number} has the same text as chosen and rejected: remove the line"
            )
        prompt_id = identity_of(line, "prompt_id", prompt)
        pair_id = identity_of(line, "pair_id", f"{chosen}\0{rejected}")
        if (prompt_id, pair_id) in found:
            first = found[prompt_id, pair_id][0]
            raise UserError(f"{located}, line {number} repeats the pair of line {first}: remove one of them")
        found[prompt_id, pair_id] = number, PreferencePair(prompt_id, prompt, pair_id, chosen, rejected)
    return [pair for _, pair in found.values()]


@dataclass(frozen=True)
class JudgeData:
    """The files that a judge is held against; either may be missing, not both."""

    labelled: list[LabelledResponse]
    preferences: list[PreferencePair]

    def judged(self) -> list[Judged]:
        """Every response to judge: labelled ones, then chosen and rejected ones."""
        found = [
            Judged("labels", item.prompt_id, item.prompt, item.response_id, item.response)
            for item in self.labelled
        ]
        for pair in self.preferences:
            for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                found.append(Judged(f"preferences/{side}", pair.prompt_id, pair.prompt, pair.pair_id, text))
        return found


def read_judge_data(labels: Path | None, preferences: Path | None, limit: int) -> JudgeData:
    """Both files, of each its first `limit` lines; 0 for all.

    Raises:
        UserError: neither is given, one is wrong, or `limit` is negative.
    """
    if limit < 0:
        raise UserError(f"--limit is {limit}: give 0 (all lines) or a positive number")
    if labels is None and preferences is None:
        raise UserError("give --data with people's labels, --preferences with pairs, or both")
    return JudgeData(
        read_quality(str(labels))[: limit or None] if labels else [],
        read_preferences(preferences)[: limit or None] if preferences else [],
    )
