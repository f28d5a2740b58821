"""`metareward assess responses`: how often a judge prefers a model's responses to a baseline's, in both orders."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metareward.assessment.annotations import Annotation, show, summarise, write_annotations
from metareward.assessment.interval import Resampling
from metareward.assessment.length_controlled import regression
from metareward.assessment.models import LoadedModel, Subject, free_memory_of_models, load, only_one_process
from metareward.assessment.win_rate import preference_of_orders
from metareward.errors import UserError
from metareward.model.hf_files import weights_digest
from metareward.roles.actor import actor_messages
from metareward.roles.response_judge import parse_better_response, response_judge_messages
from metareward.run.inputs import Prompt
from metareward.run.jsonl import check_writable, write_text
from metareward.sampler.request import SamplingParams

Figures = dict[str, Any]
FEW_READABLE = 0.5
"""A smaller share of readable verdicts is told apart from the table."""


@dataclass(frozen=True)
class ResponseOptions:
    """How models are compared; `difficulty` by prompt id, where it is known of every prompt."""

    responding: SamplingParams
    judging: SamplingParams
    judge_template: str
    seed: int
    resampling: Resampling
    difficulty: Mapping[str, float] | None


@dataclass(frozen=True)
class Response:
    text: str
    finished: bool


def assess(
    subjects: Sequence[Subject],
    baseline: Subject,
    judge: Subject,
    prompts: Sequence[Prompt],
    options: ResponseOptions,
    out: Path | None,
    annotations_file: Path | None,
) -> Figures:
    """Win rate of every subject over the baseline. Both answer each prompt once; the judge reads both responses in both orders.

    Args:
        subjects: one model, or those of a run.
        baseline: what they are compared with; it answers once for all of them.
        judge: the model that compares.
        prompts: what they answer.
        options: how.
        out: also written as JSON.
        annotations_file: also every comparison, in the form of AlpacaEval's annotations.json.

    Returns:
        the settings and, under "models", the figures of each subject; see `annotations.summarise`.

    Raises:
        UserError: more than one process, a prompt that does not fit a model, or no scikit-learn.
    """
    only_one_process()
    for path in (out, annotations_file):
        if path is not None:
            check_writable(path)
    # Asked for before the sampling that would be lost.
    regression()
    began = time.perf_counter()
    baseline_responses = responses_of(baseline, prompts, options)
    responses = {subject.name: responses_of(subject, prompts, options) for subject in subjects}
    model = load(judge, options.seed)
    annotations: list[Annotation] = []
    counts: dict[str, Figures] = {}
    for subject in subjects:
        found, counts[subject.name] = compare(
            model, subject.name, baseline.name, prompts, responses[subject.name], baseline_responses, options
        )
        annotations += found
    del model
    free_memory_of_models()
    if annotations_file is not None:
        write_annotations(annotations_file, annotations)
    models = []
    for subject in subjects:
        own = [item for item in annotations if item.generator_2 == subject.name]
        models.append(
            {
                "name": subject.name,
                "model": str(subject.folder),
                "weights": weights_digest(subject.folder),
                **counts[subject.name],
                **summarise(own, options.resampling),
            }
        )
    figures: Figures = {
        "baseline": baseline.name,
        "judge": judge.name,
        "judge_weights": weights_digest(judge.folder),
        "prompts": len(prompts),
        "seed": options.seed,
        "responding": asdict(options.responding),
        "judging": asdict(options.judging),
        "resampling": asdict(options.resampling),
        "models": models,
        "seconds": time.perf_counter() - began,
    }
    if out is not None:
        write_text(out, json.dumps(figures, indent=2) + "\n")
    show(models, f"Responses against {baseline.name}, judged by {judge.name}", options.resampling.confidence)
    for item in models:
        if item["readable"] is not None and item["readable"] < FEW_READABLE:
            print(
                f"{item['name']}: only {item['readable']:.0%} of the judge's verdicts could be read, so the figures rest on few "
                "prompts: choose a larger --judge, or raise --judge-max-new-tokens if its verdicts are cut off"
            )
    return figures


def responses_of(
    subject: Subject, prompts: Sequence[Prompt], options: ResponseOptions
) -> dict[str, Response]:
    """prompt_id -> the subject's response. An unfinished one is kept as it is, as a user would see it.

    The random numbers are keyed by prompt alone, so that two models with equal weights answer alike.
    """
    model = load(subject, options.seed)
    room = model.max_context - options.responding.max_new_tokens
    rendered = {}
    for item in prompts:
        prompt = tuple(model.chat.render(actor_messages(item.prompt)))
        if len(prompt) > room:
            raise UserError(
                f'the prompt "{item.prompt_id}" has {len(prompt)} tokens and at most {room} fit {subject.name} beside '
                f"--max-new-tokens {options.responding.max_new_tokens}: shorten or remove it, or lower --max-new-tokens"
            )
        rendered[identity("respond", item.prompt_id)] = prompt
    found = model.complete(rendered, options.responding, f"{subject.name}: respond", "responses")
    responses = {}
    for item in prompts:
        completion = found[identity("respond", item.prompt_id)]
        responses[item.prompt_id] = Response(model.chat.decode(completion.token_ids), completion.finished)
    del model
    free_memory_of_models()
    return responses


def identity(*words: str) -> str:
    return json.dumps(["assess responses", *words], ensure_ascii=False)


def compare(
    judge: LoadedModel,
    name: str,
    baseline: str,
    prompts: Sequence[Prompt],
    own: Mapping[str, Response],
    other: Mapping[str, Response],
    options: ResponseOptions,
) -> tuple[list[Annotation], Figures]:
    """The judge's preferences on every prompt, and counts of what came of its verdicts.

    Equal responses are a tie without being asked about.
    """
    room = judge.max_context - options.judging.max_new_tokens
    requests: dict[str, tuple[int, ...]] = {}
    too_long: set[str] = set()
    for item in prompts:
        texts = own[item.prompt_id].text, other[item.prompt_id].text
        if texts[0] == texts[1]:
            continue
        for order, (first, second) in (("first", texts), ("second", texts[::-1])):
            messages = response_judge_messages(options.judge_template, item.prompt, first, second)
            requests[identity("judge", name, item.prompt_id, order)] = tuple(judge.chat.render(messages))
        both = [identity("judge", name, item.prompt_id, order) for order in ("first", "second")]
        if any(len(requests[key]) > room for key in both):
            too_long.add(item.prompt_id)
            for key in both:
                del requests[key]
    found = judge.complete(requests, options.judging, f"{name}: judge", "comparisons")
    winners = {
        key: parse_better_response(judge.chat.decode(completion.token_ids))
        for key, completion in found.items()
    }
    annotations = []
    for item in prompts:
        key = item.prompt_id
        preference: float | None
        if own[key].text == other[key].text:
            preference = 0.5
        elif key in too_long:
            preference = None
        else:
            preference = preference_of_orders(
                winners[identity("judge", name, key, "first")],
                winners[identity("judge", name, key, "second")],
            )
        difficulty = None if options.difficulty is None else options.difficulty[key]
        annotations.append(
            Annotation(
                item.prompt,
                other[key].text,
                own[key].text,
                baseline,
                name,
                judge.subject.name,
                preference,
                difficulty,
            )
        )
    readable = [winner for winner in winners.values() if winner is not None]
    return annotations, {
        "verdicts": len(winners),
        "readable": len(readable) / len(winners) if winners else None,
        "first_position_wins": readable.count("first") / len(readable) if readable else None,
        "equal_responses": sum(own[item.prompt_id].text == other[item.prompt_id].text for item in prompts),
        "left_out_too_long": len(too_long),
        "unfinished": sum(not response.finished for response in own.values()),
        "baseline_unfinished": sum(not response.finished for response in other.values()),
    }
