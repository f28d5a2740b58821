"""The prompts that models are compared on, with their difficulty where the file has it."""

from __future__ import annotations

import math
from pathlib import Path

from metareward.errors import UserError
from metareward.run.inputs import Prompt, identity_of, locate, read_lines, read_prompts, text_of


def read_prompt_set(path: Path, limit: int) -> tuple[list[Prompt], dict[str, float] | None]:
    """The first `limit` prompts (0: all), and the "difficulty" of each by prompt id; None where no line has one.

    Raises:
        UserError: a line is wrong, or only some lines have a difficulty.
    """
    prompts = read_prompts(str(path))[: limit or None]
    located = locate(str(path))
    difficulty: dict[str, float] = {}
    without: int | None = None
    for number, line in read_lines(located):
        value = line.get("difficulty")
        if value is None:
            without = number if without is None else without
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f'{located}, line {number} needs a finite number in "difficulty", not {value!r}')
        difficulty[identity_of(line, "prompt_id", text_of(located, number, line, "prompt"))] = float(value)
    if difficulty and without is not None:
        raise UserError(
            f'{located}, line {without} has no "difficulty" while others have: give it on every line or on none'
        )
    return prompts, difficulty or None
