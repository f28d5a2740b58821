"""From what a user asks `assess judge` for to the models and the options of `judge.assess`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metareward.assessment.interval import Resampling
from metareward.assessment.judging import JudgeOptions
from metareward.assessment.models import Subject, named_subject, run_subjects
from metareward.config import Recipe
from metareward.errors import UserError
from metareward.roles.templates import Role, load_template
from metareward.sampler.request import SamplingParams
from metareward.stages.sampling import sampling_params

DEFAULT_NEW_TOKENS = 96


def options_and_subjects(
    model: str | None,
    run_dir: Path | None,
    *,
    samples: int,
    comparisons: int,
    max_new_tokens: int | None,
    judge_template: Path | None,
    meta_judge_template: Path | None,
    hide_scores: bool | None,
    resamples: int,
    seed: int,
) -> tuple[list[Subject], JudgeOptions]:
    """The models, oldest first, and how to ask them: a run's are asked as the run asked them, unless the user says otherwise.

    Raises:
        UserError: a number that makes no sense, or a model, run or template that is not there.
    """
    check_numbers(samples, comparisons, resamples)
    recipe: Recipe | None = None
    if run_dir is not None:
        subjects, recipe = run_subjects(run_dir)
    else:
        assert model is not None
        subjects = [named_subject(model)]
    judging = SamplingParams(max_new_tokens=DEFAULT_NEW_TOKENS)
    comparing, hide = judging, False
    paths: dict[Role, Path | None] = {"judge": judge_template, "meta_judge": meta_judge_template}
    if recipe is not None:
        judging, comparing = sampling_params(recipe.judge), sampling_params(recipe.meta_judge)
        hide = recipe.meta_judge.hide_scores
        for role, own in (("judge", recipe.judge.template), ("meta_judge", recipe.meta_judge.template)):
            if paths[role] is None and own:  # type: ignore[index]
                paths[role] = Path(own)  # type: ignore[index]
    if max_new_tokens is not None:
        judging = replace(judging, max_new_tokens=max_new_tokens)
        comparing = replace(comparing, max_new_tokens=max_new_tokens)
    options = JudgeOptions(
        samples=samples,
        seed=seed,
        judging=judging,
        judge_template=load_template("judge", paths["judge"]),
        comparisons=comparisons,
        comparing=comparing,
        meta_judge_template=load_template("meta_judge", paths["meta_judge"]),
        hide_scores=hide if hide_scores is None else hide_scores,
        resampling=Resampling(resamples, seed=seed),
    )
    return subjects, options


def check_numbers(samples: int, comparisons: int, resamples: int) -> None:
    """Raises UserError where they make no sense."""
    if samples < 1:
        raise UserError(f"--samples is {samples}: give 1 judgment a response or more")
    if comparisons < 0 or resamples < 0:
        raise UserError(
            f"--comparisons {comparisons} --resamples {resamples}: give 0 (off) or a positive number"
        )
    if comparisons and samples < 2:
        raise UserError(
            "--comparisons compares two judgments of one response: give --samples 2 or more with it"
        )
