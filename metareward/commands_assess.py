"""The commands of `metareward assess`, one function a command; see `cli`."""

from __future__ import annotations

from pathlib import Path

import tyro

from metareward.errors import UserError


def assess() -> None:
    """`judge`: hold a model's judgments against people; `responses`: win rate over another model; `annotations`: AlpacaEval's."""


def assess_judge(
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    data: Path | None = None,
    preferences: Path | None = None,
    samples: int = 4,
    comparisons: int = 0,
    limit: int = 0,
    max_new_tokens: int | None = None,
    judge_template: Path | None = None,
    meta_judge_template: Path | None = None,
    hide_scores: bool | None = None,
    resamples: int = 2000,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Hold a model's judgments against people's quality labels, their pairwise preferences, or both.

    Reports the share of readable judgments and the histogram of scores; Spearman's and Kendall's correlation with the labels,
    pairwise agreement within a prompt, exact classes, dependence on length; accuracy on preferences; and with --comparisons the
    biases of the model as meta-judge. By sampled judgments (their mean score) and by expected score (the score tokens'
    probabilities). Intervals come from resampling whole prompts. docs/assessment.md explains every figure.

    Args:
        model: A model directory or hub id.
        run_dir: Instead of --model: a run, whose seed and iterations are assessed alike, a column each, with the run's templates
            and limits.
        data: JSONL of {prompt, response, quality in [0, 1]}.
        preferences: JSONL of {prompt, chosen, rejected}.
        samples: Judgments a response.
        comparisons: Pairs of its own judgments that the model also compares, each in both orders; it needs 2 samples or more.
        limit: Use only the first so many lines of each file; 0 for all.
        max_new_tokens: Limit of a judgment and of a comparison. Default: the run's; 96 with --model.
        judge_template: Another judge prompt. Default: the run's; the packaged one with --model.
        meta_judge_template: Another meta-judge prompt. Default: the same.
        hide_scores: Take the verdict line out of the judgments before they are compared. Default: as the run; no with --model.
        resamples: Draws of prompts for the intervals; 0 for no intervals.
        seed: Of the sampling and the resampling.
        json: Also write the figures to this file.
    """
    from metareward.assessment.judge import assess
    from metareward.assessment.judge_data import read_judge_data
    from metareward.assessment.judge_options import options_and_subjects
    from metareward.run.jsonl import check_writable
    from metareward.run.ranks import with_ranks

    one_of(model, run_dir)
    if json is not None:
        check_writable(json)

    def work() -> None:
        found = read_judge_data(data, preferences, limit)
        subjects, options = options_and_subjects(
            model,
            run_dir,
            samples=samples,
            comparisons=comparisons,
            max_new_tokens=max_new_tokens,
            judge_template=judge_template,
            meta_judge_template=meta_judge_template,
            hide_scores=hide_scores,
            resamples=resamples,
            seed=seed,
        )
        about = {
            "run": str(run_dir) if run_dir else None,
            "data": str(data) if data else None,
            "preferences_file": str(preferences) if preferences else None,
            "limit": limit,
        }
        assess(subjects, found, options, json, about)

    with_ranks(work)


def assess_responses(
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    baseline: str,
    judge: str,
    prompts: Path,
    limit: int = 0,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    judge_max_new_tokens: int = 256,
    judge_template: Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
    json: Path | None = None,
    annotations: Path | None = None,
) -> None:
    """Win rate of a model over a baseline on a prompt set, judged by a model of your choice in both orders.

    Each model answers every prompt once. The judge compares the two responses twice, with the positions exchanged, at temperature
    0: a win in both orders counts 1, a loss in both 0, a verdict that changes with the order 1/2; a prompt with an unreadable
    verdict is left out and counted. Reports the win rate, AlpacaEval 2's length-controlled win rate, intervals from resampling
    prompts, and lengths. It needs scikit-learn: pip install metareward[assess].

    Args:
        model: A model directory or hub id.
        run_dir: Instead of --model: a run, whose seed and iterations are compared alike, a column each.
        baseline: The model to compare with: a directory or hub id.
        judge: The model that compares: a directory or hub id.
        prompts: JSONL of {prompt}; with a number "difficulty" on every line, it enters the length-controlled win rate.
        limit: Use only the first so many prompts; 0 for all.
        temperature: Of the responses; 0 is greedy.
        top_p: Of the responses.
        max_new_tokens: Limit of a response.
        judge_max_new_tokens: Limit of a verdict with its reasons.
        judge_template: Another prompt; it needs {instruction}, {response_a} and {response_b}.
        resamples: Draws of prompts for the intervals; 0 for no intervals.
        seed: Of the sampling and the resampling.
        json: Also write the figures to this file.
        annotations: Also write every comparison to this file, in the form of AlpacaEval's annotations.json.
    """
    from metareward.assessment.compare_responses import ResponseOptions
    from metareward.assessment.compare_responses import assess as compare
    from metareward.assessment.interval import Resampling
    from metareward.assessment.models import named_subject, run_subjects
    from metareward.assessment.prompt_set import read_prompt_set
    from metareward.roles.templates import load_template
    from metareward.run.ranks import with_ranks
    from metareward.sampler.request import SamplingParams

    one_of(model, run_dir)
    not_negative(limit=limit, resamples=resamples)

    def work() -> None:
        items, difficulty = read_prompt_set(prompts, limit)
        options = ResponseOptions(
            SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
            SamplingParams(temperature=0.0, max_new_tokens=judge_max_new_tokens),
            load_template("response_judge", judge_template),
            seed,
            Resampling(resamples, seed=seed),
            difficulty,
        )
        subjects = run_subjects(run_dir)[0] if run_dir is not None else [named_subject(str(model))]
        compare(subjects, named_subject(baseline), named_subject(judge), items, options, json, annotations)

    with_ranks(work)


def assess_annotations(
    file: tyro.conf.Positional[Path],
    *,
    difficulty: Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Win rate and length-controlled win rate of every model in AlpacaEval's annotations.json, with intervals.

    The figure is close to AlpacaEval's own, not equal to it: docs/assessment.md says where they differ. It needs scikit-learn: pip
    install metareward[assess].

    Args:
        file: What alpaca_eval, or `metareward assess responses --annotations`, wrote.
        difficulty: CSV of index and difficulty with a header, such as AlpacaEval's instruction_difficulty.csv.
        resamples: Draws of prompts for the intervals; 0 for no intervals.
        seed: Of the resampling.
        json: Also write the figures to this file.
    """
    from metareward.assessment.annotations import assess_file
    from metareward.assessment.interval import Resampling
    from metareward.run.jsonl import check_writable

    not_negative(resamples=resamples)
    if json is not None:
        check_writable(json)
    assess_file(file, difficulty, Resampling(resamples, seed=seed), json)


def one_of(model: str | None, run_dir: Path | None) -> None:
    if (model is None) == (run_dir is None):
        raise UserError("give either --model, a model directory or hub id, or --run-dir, a run")


def not_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise UserError(f"--{name} is {number}: give 0 or a positive number")
