"""`metareward assess judge`: judgments of labelled responses, held against the labels."""

from __future__ import annotations

import json as json_library
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metareward.assessment.agreement import agreement, length_dependence
from metareward.assessment.expected_score import expected_scores, score_cue, score_place
from metareward.config import SamplerSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.hf_files import weights_digest
from metareward.model.locate import locate_model
from metareward.preference.bias import score_entropy
from metareward.preference.caps import score_class
from metareward.roles.judge import judge_messages, parse_score
from metareward.roles.templates import load_template
from metareward.run import ranks
from metareward.run.inputs import read_quality
from metareward.run.jsonl import check_writable, write_text
from metareward.run.progress import progress_bar
from metareward.sampler.engine import Engine
from metareward.sampler.request import Completion, Request, SamplingParams
from metareward.stages.context import load_engine

Prompts = list[tuple[int, ...]]


def assess(
    model: str, data: Path, samples: int, limit: int, max_new_tokens: int, seed: int, out: Path | None
) -> dict[str, Any]:
    """Judge every labelled response `samples` times and report agreement with the labels; see the command's help.

    On one process. Prints a table, writes `out` as JSON where it is given, and returns the same figures.
    """
    began = time.perf_counter()
    if samples < 1 or max_new_tokens < 1 or limit < 0:
        raise UserError(
            f"--samples {samples} --max-new-tokens {max_new_tokens} --limit {limit}: give at least 1 sample and 1 token, and "
            f"a limit of 0 (all) or more"
        )
    if ranks.world_size() > 1:
        raise UserError("metareward assess runs on one process: start it without torchrun")
    if out is not None:
        check_writable(out)
    labelled = read_quality(str(data))[: limit or None]
    folder = ranks.on_first(lambda: locate_model(model))
    chat = Chat.load(folder)
    engine = load_engine(folder, chat, SamplerSettings(), seed)
    template = load_template("judge")
    room = engine.decoder.config.max_context - max_new_tokens
    prompts: Prompts = []
    for item in labelled:
        prompts.append(tuple(chat.render(judge_messages(template, item.prompt, item.response))))
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting:
        raise UserError(
            f"no judge prompt of {data} fits the model's context of {engine.decoder.config.max_context} tokens beside "
            f"--max-new-tokens {max_new_tokens}: lower it, or give shorter responses"
        )
    judgments = sample_judgments(engine, prompts, fitting, samples, max_new_tokens)
    texts = {index: [chat.decode(item.token_ids) for item in found] for index, found in judgments.items()}
    scores = {index: [parse_score(text) for text in found] for index, found in texts.items()}
    expected = expect(engine, chat, prompts, judgments, texts)
    sampled_means = [
        mean([score for score in scores.get(index, []) if score is not None])
        for index in range(len(labelled))
    ]
    expected_means = [mean(expected.get(index, [])) for index in range(len(labelled))]
    ids, labels = [item.prompt_id for item in labelled], [item.quality for item in labelled]
    readable = [score for found in scores.values() for score in found if score is not None]
    histogram = Counter(score_class(score) for score in readable)
    figures: dict[str, Any] = {
        "model": str(folder),
        "weights": weights_digest(folder),
        "data": str(data),
        "responses": len(labelled),
        "left_out_too_long": len(labelled) - len(fitting),
        "judgments": samples * len(fitting),
        "samples": samples,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": seed,
        "parse_rate": len(readable) / max(1, samples * len(fitting)),
        "finished_rate": mean([float(item.finished) for found in judgments.values() for item in found]),
        "sampled": asdict(agreement(ids, labels, sampled_means)),
        "expected": asdict(agreement(ids, labels, expected_means)),
        "length": asdict(
            length_dependence([len(item.response) for item in labelled], labels, expected_means)
        ),
        "score_histogram": {str(score): histogram.get(score, 0) for score in range(6)},
        "score_entropy": score_entropy({float(score): count for score, count in histogram.items()}),
        "seconds": time.perf_counter() - began,
    }
    show(figures)
    if out is not None:
        write_text(out, json_library.dumps(figures, indent=2) + "\n")
    return figures


def sample_judgments(
    engine: Engine, prompts: Prompts, fitting: list[int], samples: int, max_new_tokens: int
) -> dict[int, list[Completion]]:
    """Index of the response -> its judgments, in the order of their samples."""
    names = {f"assess/{index}/{sample}": (index, sample) for index in fitting for sample in range(samples)}
    requests = (Request(name, prompts[index]) for name, (index, _) in names.items())
    found: dict[int, dict[int, Completion]] = {index: {} for index in fitting}
    with progress_bar("judge", len(names), "judgments") as bar:
        for completion in engine.generate(requests, SamplingParams(max_new_tokens=max_new_tokens)):
            index, sample = names[completion.identity]
            found[index][sample] = completion
            bar.update()
    return {index: [by_sample[sample] for sample in sorted(by_sample)] for index, by_sample in found.items()}


def expect(
    engine: Engine,
    chat: Chat,
    prompts: Prompts,
    judgments: dict[int, list[Completion]],
    texts: dict[int, list[str]],
) -> dict[int, list[float]]:
    """Index of the response -> the expected score of each of its judgments."""
    found: dict[int, list[float]] = {}
    cue = score_cue(chat)
    with progress_bar("expected score", len(judgments), "responses") as bar:
        for index, completions in judgments.items():
            places = [
                score_place(chat, cue, text, completion.token_ids)
                for text, completion in zip(texts[index], completions, strict=True)
            ]
            found[index] = expected_scores(engine.decoder, prompts[index], places, ranks.device())
            bar.update()
    return found


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"Judge against people: {figures['responses']} responses, {figures['samples']} judgments each"
    )
    table.add_column("figure")
    table.add_column("sampled", justify="right")
    table.add_column("expected", justify="right")
    sampled, expected = figures["sampled"], figures["expected"]
    for name, label in (
        ("scored", "responses with a score"),
        ("spearman", "Spearman"),
        ("pairwise", "pairwise agreement"),
    ):
        table.add_row(label, *(format_figure(side[name]) for side in (sampled, expected)))
    table.add_row("readable judgments", f"{figures['parse_rate']:.1%}", "")
    if figures["left_out_too_long"]:
        table.add_row("left out as too long", str(figures["left_out_too_long"]), "")
    for name, label in (
        ("label", "Spearman of length with labels"),
        ("score", "Spearman of length with scores"),
        ("partial", "Spearman with labels, length taken out"),
    ):
        table.add_row(label, "", format_figure(figures["length"][name]))
    table.add_row(
        "score histogram 0..5", " ".join(str(count) for count in figures["score_histogram"].values()), ""
    )
    Console(width=110).print(table)


def format_figure(value: float | int | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
