"""The files of AlpacaEval, Arena-Hard and MT-Bench: their questions read, their answers put into the form they read.

What each harness reads was taken from its own code: alpaca-eval 0.6.6, FastChat (fschat) 0.2.36, arena-hard-auto v0.1 and v2.0.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metareward.assessment.annotations import read_json_list
from metareward.errors import UserError
from metareward.run.inputs import read_lines

Benchmark = Literal["alpaca-eval", "arena-hard", "mt-bench"]
Line = dict[str, Any]

# FastChat's, by category of MT-Bench; every other category has MT_BENCH_TEMPERATURE.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
MT_BENCH_TEMPERATURE = 0.7
DEFAULT_TEMPERATURES = {"alpaca-eval": 0.7, "arena-hard": 0.0}


@dataclass(frozen=True)
class Question:
    """`turns`: what the user says, one after the other. `identity`: the harness's id, or the instruction. `line`: as in the file.
    `temperature`: the harness's default for it."""

    identity: str
    turns: tuple[str, ...]
    line: Line
    temperature: float


def read_questions(benchmark: Benchmark, path: Path) -> list[Question]:
    """The questions in file order.

    Raises:
        UserError: the file is not that benchmark's, or has one question twice.
    """
    if benchmark == "alpaca-eval" and path.suffix != ".jsonl":
        lines = [(number, line) for number, line in enumerate(read_json_list(path), 1)]
    else:
        if not path.is_file():
            raise UserError(f"there is no file {path}: give the questions file of the benchmark")
        lines = list(read_lines(path))
    found: dict[str, Question] = {}
    for number, line in lines:
        question = as_question(benchmark, line, f"{path}, entry {number}")
        if question.identity in found:
            raise UserError(f"{path}, entry {number} is the question {question.identity!r} again: remove it")
        found[question.identity] = question
    return list(found.values())


def as_question(benchmark: Benchmark, line: Any, where: str) -> Question:
    """Raises UserError where it lacks what the benchmark's questions have."""
    if not isinstance(line, dict):
        raise UserError(f"{where} is not a JSON object: give the questions file of {benchmark}")
    if benchmark == "alpaca-eval":
        text = line.get("instruction")
        if not isinstance(text, str):
            raise UserError(f'{where} has no text in "instruction": give AlpacaEval\'s alpaca_eval.json')
        return Question(text, (text,), line, DEFAULT_TEMPERATURES[benchmark])
    if benchmark == "arena-hard" and "uid" in line:
        if not isinstance(line.get("prompt"), str):
            raise UserError(f'{where} has no text in "prompt": give Arena-Hard v2.0\'s question.jsonl')
        return Question(str(line["uid"]), (line["prompt"],), line, DEFAULT_TEMPERATURES[benchmark])
    turns = line.get("turns")
    said = turns if isinstance(turns, list) else []
    contents: list[Any] = said
    if benchmark == "arena-hard":
        contents = [turn.get("content") if isinstance(turn, dict) else None for turn in said]
    if "question_id" not in line or not contents or not all(isinstance(text, str) for text in contents):
        raise UserError(
            f'{where} has no "question_id" with texts in "turns": give {benchmark}\'s question.jsonl'
        )
    if benchmark == "arena-hard":
        temperature = DEFAULT_TEMPERATURES[benchmark]
    else:
        temperature = TEMPERATURES.get(str(line.get("category", "")), MT_BENCH_TEMPERATURE)
    return Question(str(line["question_id"]), tuple(contents), line, temperature)


def alpaca_eval_outputs(
    name: str, questions: Sequence[Question], answers: Sequence[Sequence[str]]
) -> list[Line]:
    """model_outputs.json: `instruction`, `output`, `generator`, and what else the question had (`dataset`)."""
    return [
        {**question.line, "instruction": question.turns[0], "output": turns[0], "generator": name}
        for question, turns in zip(questions, answers, strict=True)
    ]


def answer_lines(
    benchmark: Benchmark,
    name: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    time: float,
    tokens_of: Callable[[str], int],
) -> list[Line]:
    """Lines of model_answer/NAME.jsonl, in the order of the question ids, as the harnesses sort them.

    FastChat has turns as texts, Arena-Hard v0.1 as {content, token_len}, v2.0 a list of messages under another id. v0.1's
    show_result.py stops without a token count. What style control reads besides is added by a program of the harness.

    Args:
        time: seconds since 1970, the answers' time stamp.
        tokens_of: counts the tokens of an answer.
    """
    lines: list[tuple[Any, Line]] = []
    for question, turns in zip(questions, answers, strict=True):
        answer_id = uuid.uuid5(uuid.NAMESPACE_URL, f"metareward/{benchmark}/{name}/{question.identity}").hex
        if "uid" in question.line and benchmark == "arena-hard":
            own = question.line["uid"]
            messages = [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": turns[0]}},
            ]
            line = {"uid": own, "ans_id": answer_id, "model": name, "messages": messages, "tstamp": time}
        else:
            own = question.line["question_id"]
            said: list[Any] = list(turns)
            if benchmark == "arena-hard":
                said = [{"content": text, "token_len": tokens_of(text)} for text in turns]
            line = {
                "question_id": own,
                "answer_id": answer_id,
                "model_id": name,
                "choices": [{"index": 0, "turns": said}],
                "tstamp": time,
            }
        lines.append((own, line))
    numbers = all(isinstance(own, int) for own, _ in lines)
    return [line for _, line in sorted(lines, key=lambda item: item[0] if numbers else str(item[0]))]
