"""Files that users bring: prompts and quality labels, every line checked and every mistake named by file and line."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from metareward.errors import UserError
from metareward.recipe_files import STARTER

# JSON can spell what UTF-8 cannot: the first half of an emoji that something cut in two.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    prompt: str


@dataclass(frozen=True)
class LabelledResponse:
    """A response with people's quality label in [0, 1], and a rationale where the file has one."""

    prompt_id: str
    prompt: str
    response_id: str
    response: str
    quality: float
    rationale: str | None


def locate(name: str) -> Path:
    """Path of an input file; "starter:prompts" and "starter:quality" are in the package."""
    if name.startswith(STARTER):
        path = Path(str(resources.files("metareward") / "starter" / f"{name.removeprefix(STARTER)}.jsonl"))
        if not path.is_file():
            raise UserError(f"there is no packaged set {name}: use starter:prompts or starter:quality")
        return path
    if not Path(name).is_file():
        raise UserError(f"there is no file {name}: give the path of a JSONL file")
    return Path(name)


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from None
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number} is not UTF-8: save the file as UTF-8") from None
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is not valid JSON ({error}): mend or remove that line"
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, line {number} is not a JSON object: every line must be one, such as "
                '{"prompt": "..."}'
            )
        if HALF_CHARACTER.search(json.dumps(value, ensure_ascii=False)):
            raise UserError(
                f"{path}, line {number} has half a character (a lone surrogate such as \\ud83d): mend or remove that line"
            )
        found.append((number, value))
    if not found:
        raise UserError(f"{path} has no lines: give a file with one JSON object a line")
    return found


def text_of(path: Path, number: int, line: dict[str, Any], name: str) -> str:
    """A field that must be a string with something in it."""
    value = line.get(name)
    if not isinstance(value, str):
        problem = "has no field" if name not in line else "needs a string in the field"
        raise UserError(f'{path}, line {number} {problem} "{name}": add it or remove the line')
    if not value.strip():
        raise UserError(f'{path}, line {number} has an empty "{name}": fill it in or remove the line')
    return value


def identity_of(line: dict[str, Any], name: str, text: str) -> str:
    """The line's own id, or one made from the text, so that it does not depend on the order of the lines."""
    value = line.get(name)
    return str(value) if value not in (None, "") else hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(name: str) -> list[Prompt]:
    """The prompt pool, in file order.

    A quality file, whose lines have a "response", gives each of its prompts once; elsewhere an id that comes twice is
    an error.
    """
    path = locate(name)
    pool: dict[str, tuple[int, Prompt]] = {}
    for number, line in read_lines(path):
        prompt = text_of(path, number, line, "prompt")
        prompt_id = identity_of(line, "prompt_id", prompt)
        if prompt_id in pool:
            first, known = pool[prompt_id]
            if "response" not in line or known.prompt != prompt:
                if "prompt_id" not in line:
                    raise UserError(
                        f"{path}, line {number} repeats the prompt of line {first}: remove one of them"
                    )
                raise UserError(
                    f'{path}, line {number} has the prompt_id "{prompt_id}" of line {first}: '
                    f"give every prompt an id of its own"
                )
            continue
        pool[prompt_id] = (number, Prompt(prompt_id, prompt))
    return [prompt for _, prompt in pool.values()]


def read_quality(name: str) -> list[LabelledResponse]:
    """Labelled responses, in file order."""
    path = locate(name)
    found: list[LabelledResponse] = []
    prompts: dict[str, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for number, line in read_lines(path):
        prompt = text_of(path, number, line, "prompt")
        response = text_of(path, number, line, "response")
        quality = line.get("quality")
        if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not 0.0 <= quality <= 1.0:
            raise UserError(f'{path}, line {number} needs a number from 0 to 1 in "quality", not {quality!r}')
        rationale = line.get("rationale")
        if rationale is not None and not isinstance(rationale, str):
            raise UserError(
                f'{path}, line {number} needs a string in "rationale"; leave it out if there is none'
            )
        prompt_id = identity_of(line, "prompt_id", prompt)
        response_id = identity_of(line, "response_id", response)
        if prompts.setdefault(prompt_id, prompt) != prompt:
            raise UserError(
                f'{path}, line {number} has another prompt under the prompt_id "{prompt_id}": '
                "give every prompt an id of its own"
            )
        if (prompt_id, response_id) in seen:
            raise UserError(
                f'{path}, line {number} has the response_id "{response_id}" of line {seen[prompt_id, response_id]}: '
                f"give every response of a prompt an id of its own"
            )
        seen[prompt_id, response_id] = number
        found.append(LabelledResponse(prompt_id, prompt, response_id, response, float(quality), rationale))
    return found


def draw_prompts(pool: list[Prompt], count: int, iteration: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration, drawn from a shuffled pool that is shuffled anew each time it runs out.

    A pure function of (pool, count, iteration, seed). No prompt comes again before all have been used, and none comes twice
    within one iteration.

    Raises:
        UserError: the pool has fewer than `count` prompts.
    """
    if count > len(pool):
        raise UserError(
            f"prompts.per_iteration = {count} but the prompt file has {len(pool)}: set it to {len(pool)} or less"
        )
    waiting: list[int] = []
    drawn: list[int] = []
    rounds = 0
    for _ in range(iteration):
        drawn, waiting = waiting[:count], waiting[count:]
        if len(drawn) < count:
            order = np.random.default_rng([seed, rounds]).permutation(len(pool)).tolist()
            rounds += 1
            # What closes the old round must not open the new one within the same iteration.
            closing = set(drawn)
            fresh = [index for index in order if index not in closing][: count - len(drawn)]
            opening = set(fresh)
            waiting = [index for index in order if index not in opening]
            drawn += fresh
    return [pool[index] for index in drawn]
