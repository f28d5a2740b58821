"""`metareward export answers`: a model's answers to a benchmark's questions, in the file that the harness reads."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from metareward.assessment.benchmarks import (
    Benchmark,
    Question,
    alpaca_eval_outputs,
    answer_lines,
    read_questions,
)
from metareward.assessment.models import LoadedModel, load, named_subject, only_one_process
from metareward.errors import UserError
from metareward.roles.templates import Message
from metareward.run.jsonl import check_writable, write_jsonl, write_text
from metareward.sampler.request import SamplingParams


def export(
    model: str,
    benchmark: Benchmark,
    questions_file: Path,
    out: Path,
    name: str,
    params: SamplingParams,
    own_temperatures: bool,
    limit: int,
    seed: int,
) -> Path:
    """Answer the questions and write the answers; returns the file.

    Args:
        model: a directory or hub id.
        benchmark: whose form.
        questions_file: the harness's file.
        out: folder of the file.
        name: the model's name for the harness; empty: the last part of `model`.
        params: how to sample; its temperature is the questions' own where `own_temperatures` says so.
        limit: only the first questions; 0: all.
        seed: of the sampling.

    Raises:
        UserError: the questions or the name are wrong, nothing fits the context, or `out` cannot be written to.
    """
    only_one_process()
    if limit < 0:
        raise UserError(f"--limit is {limit}: give 0 (all questions) or a positive number")
    name = name or Path(model).name
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"--name {name!r} must do as a file name: leave out slashes and a leading dot")
    questions = read_questions(benchmark, questions_file)[: limit or None]
    final = out / ("model_outputs.json" if benchmark == "alpaca-eval" else f"{name}.jsonl")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out} ({error.strerror}): give another --out") from None
    check_writable(final)
    loaded = load(named_subject(model), seed)
    answers, too_long = answer(loaded, benchmark, questions, params, own_temperatures)
    if too_long == sum(map(len, answers)):
        raise UserError(
            f"no question of {questions_file} fits the model's context of {loaded.max_context} tokens beside --max-new-tokens "
            f"{params.max_new_tokens}: lower it"
        )
    if benchmark == "alpaca-eval":
        outputs = alpaca_eval_outputs(name, questions, answers)
        write_text(final, json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
    else:

        def tokens_of(text: str) -> int:
            # Without the end-of-turn id.
            return len(loaded.chat.encode_completion(text)) - 1

        write_jsonl(final, answer_lines(benchmark, name, questions, answers, time.time(), tokens_of))
    print(f"wrote the answers of {name} to {len(questions)} questions to {final}")
    if too_long:
        print(
            f"{too_long} turns have an empty answer: with --max-new-tokens {params.max_new_tokens} they do not fit the model's "
            f"context of {loaded.max_context} tokens; lower it, or expect those questions to be lost"
        )
    return final


def answer(
    model: LoadedModel,
    benchmark: str,
    questions: Sequence[Question],
    params: SamplingParams,
    own_temperatures: bool,
) -> tuple[list[list[str]], int]:
    """The answers to every turn of every question, and how many turns did not fit the context and have an empty one.

    A turn's random numbers are keyed by benchmark, question and turn.
    """
    said: list[list[str]] = [[] for _ in questions]
    too_long = 0
    for turn in range(max(len(question.turns) for question in questions)):
        by_temperature: dict[float, dict[str, tuple[int, ...]]] = {}
        places: dict[str, int] = {}
        for index, question in enumerate(questions):
            if turn >= len(question.turns):
                continue
            prompt = tuple(model.chat.render(conversation(question.turns[: turn + 1], said[index])))
            if len(prompt) > model.max_context - params.max_new_tokens:
                said[index].append("")
                too_long += 1
                continue
            name = json.dumps(["export answers", benchmark, question.identity, turn], ensure_ascii=False)
            temperature = question.temperature if own_temperatures else params.temperature
            by_temperature.setdefault(temperature, {})[name] = prompt
            places[name] = index
        for temperature, prompts in sorted(by_temperature.items()):
            label = f"{benchmark}, turn {turn + 1}, temperature {temperature:g}"
            found = model.complete(prompts, replace(params, temperature=temperature), label, "answers")
            for name, completion in found.items():
                said[places[name]].append(model.chat.decode(completion.token_ids).strip())
    return said, too_long


def conversation(users: Sequence[str], assistant: Sequence[str]) -> list[Message]:
    """User and assistant in turn, up to where the assistant answers the last user turn."""
    messages: list[Message] = []
    for turn, text in enumerate(users):
        messages.append({"role": "user", "content": text})
        if turn < len(users) - 1:
            messages.append({"role": "assistant", "content": assistant[turn]})
    return messages
