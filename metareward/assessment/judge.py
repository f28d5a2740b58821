"""`metareward assess judge`: a model's judgments held against people, for one model or for all that a run made."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metareward.assessment.agreement import agreement, length_dependence
from metareward.assessment.comparison_bias import comparison_bias
from metareward.assessment.judge_data import JudgeData
from metareward.assessment.judge_table import show
from metareward.assessment.judging import (
    JudgedResponse,
    JudgeOptions,
    compare_judgments,
    draw_pairs,
    judge_responses,
    mean,
)
from metareward.assessment.models import LoadedModel, Subject, free_memory_of_models, load, only_one_process
from metareward.assessment.preference_accuracy import preference_accuracy
from metareward.errors import UserError
from metareward.model.hf_files import weights_digest
from metareward.preference.bias import score_entropy
from metareward.preference.caps import score_class
from metareward.run.jsonl import check_writable, write_text

Figures = dict[str, Any]
MEANS = {
    "sampled": lambda item: item.sampled_mean,
    "expected": lambda item: item.expected_mean,
}


def assess(
    subjects: list[Subject], data: JudgeData, options: JudgeOptions, out: Path | None, about: Figures
) -> Figures:
    """Assess every subject in turn on the same data with the same random numbers; print a table with a column each.

    Args:
        subjects: loaded one after the other.
        data: labels, preferences or both.
        options: how to sample.
        out: also written as JSON, anew after every model, so that a late failure leaves what was found.
        about: where the data came from, put before the figures.

    Returns:
        {**about, the options, "models": [figures of each]}; an estimate is {"value", "interval": {"low", "high", "confidence"}}.

    Raises:
        UserError: more than one process, or no judge prompt fits a model's context.
    """
    only_one_process()
    if out is not None:
        check_writable(out)
    found: Figures = {
        **about,
        "responses": len(data.judged()),
        "preference_pairs": len(data.preferences),
        "samples": options.samples,
        "seed": options.seed,
        "judging": asdict(options.judging),
        "comparing": asdict(options.comparing),
        "hide_scores": options.hide_scores,
        "resampling": asdict(options.resampling),
        "models": [],
    }
    for subject in subjects:
        model = load(subject, options.seed)
        found["models"].append(figures_of(model, data, options))
        del model
        free_memory_of_models()
        if out is not None:
            write_text(out, json.dumps(found, indent=2) + "\n")
    show(found)
    return found


def figures_of(model: LoadedModel, data: JudgeData, options: JudgeOptions) -> Figures:
    """All figures of one model."""
    began = time.perf_counter()
    judged = judge_responses(model, data.judged(), options)
    fitting = [item for item in judged if item.judgments is not None]
    if not fitting:
        raise UserError(
            f"no judge prompt fits the context of {model.subject.name}, {model.max_context} tokens, beside "
            f"--max-new-tokens {options.judging.max_new_tokens}: lower it, or give shorter responses"
        )
    judgments = [one for item in fitting for one in item.judgments or []]
    scores = [one.score for one in judgments if one.score is not None]
    histogram = Counter(score_class(score) for score in scores)
    figures: Figures = {
        "name": model.subject.name,
        "model": str(model.subject.folder),
        "weights": weights_digest(model.subject.folder),
        "left_out_too_long": len(judged) - len(fitting),
        "judgments": len(judgments),
        "parse_rate": len(scores) / len(judgments),
        "finished_rate": mean([float(one.finished) for one in judgments]),
        "score_mean": mean(scores),
        "score_histogram": {str(score): histogram.get(score, 0) for score in range(6)},
        "score_entropy": score_entropy({float(score): count for score, count in histogram.items()}),
        "labels": label_figures(judged, data, options) if data.labelled else None,
        "preferences": preference_figures(judged, data, options) if data.preferences else None,
        "meta_judge": meta_judge_figures(model, judged, options) if options.comparisons else None,
    }
    return {**figures, "seconds": time.perf_counter() - began}


def label_figures(judged: list[JudgedResponse], data: JudgeData, options: JudgeOptions) -> Figures:
    """Agreement with people's labels and dependence on length, by sampled and by expected scores."""
    rows = judged[: len(data.labelled)]
    ids = [item.prompt_id for item in data.labelled]
    labels = [item.quality for item in data.labelled]
    lengths = [len(item.response) for item in data.labelled]
    found: Figures = {}
    for kind, score_of in MEANS.items():
        scores = [score_of(item) for item in rows]
        found[kind] = {
            **asdict(agreement(ids, labels, scores, options.resampling)),
            "length": asdict(length_dependence(ids, lengths, labels, scores, options.resampling)),
        }
    return found


def preference_figures(judged: list[JudgedResponse], data: JudgeData, options: JudgeOptions) -> Figures:
    """Accuracy on pairwise preferences, by sampled and by expected scores."""
    rows = judged[len(data.labelled) :]
    ids = [pair.prompt_id for pair in data.preferences]
    return {
        kind: asdict(
            preference_accuracy(
                ids,
                [score_of(item) for item in rows[0::2]],
                [score_of(item) for item in rows[1::2]],
                options.resampling,
            )
        )
        for kind, score_of in MEANS.items()
    }


def meta_judge_figures(model: LoadedModel, judged: list[JudgedResponse], options: JudgeOptions) -> Figures:
    """Biases of the model as meta-judge of its own judgments; fewer pairs than asked for where there are no more."""
    pairs = draw_pairs(judged, options.comparisons, options.seed)
    comparisons, too_long = compare_judgments(model, pairs, options)
    return {
        "pairs": len(pairs),
        "left_out_too_long": too_long,
        **asdict(comparison_bias(comparisons, options.resampling)),
    }
