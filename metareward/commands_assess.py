"""The commands of `metareward assess`, one function a command; see `cli`."""

from __future__ import annotations

from pathlib import Path

from metareward.errors import UserError


def assess() -> None:
    """`judge`: hold a model's judgments against people."""


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


def one_of(model: str | None, run_dir: Path | None) -> None:
    if (model is None) == (run_dir is None):
        raise UserError("give either --model, a model directory or hub id, or --run-dir, a run")
