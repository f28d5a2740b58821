"""The collapse guard: figures of a judge and of a meta-judge held against the recipe's [guard], as soon as a stage gives them.

Read from the stage's file each time, so that going on after a stop meets the same answer until a setting is changed.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from metareward.config import GuardSettings
from metareward.errors import UserError
from metareward.preference.collapse import Breach, Measured, breaches, position_bias
from metareward.run import ranks
from metareward.run.figures import JudgmentFigures, comparison_figures, judgment_figures
from metareward.run.jsonl import read_jsonl
from metareward.stages.context import Context

logger = logging.getLogger("metareward")

GUARDED = ("judge", "compare")
"""The stages that give a figure with a limit."""


def guard(context: Context, iteration: int, stage: str) -> None:
    """Hold what `stage` gave against the limits; the event "guard" goes to metrics.jsonl. A collective.

    Raises:
        UserError: a limit is passed and guard.action is "stop".
    """
    if stage in GUARDED:
        ranks.on_first(lambda: check(context, iteration, stage))


def check(context: Context, iteration: int, stage: str) -> None:
    settings = context.recipe.guard
    measured = measure(context, iteration, stage)
    passed = breaches(measured, settings)
    context.metrics.event(
        "guard",
        stage,
        iteration,
        **{item.name: item.value for item in measured},
        observations={item.name: item.observations for item in measured},
        passed=[asdict(item) for item in passed],
        action=settings.action,
    )
    if not passed:
        return
    what = f"iteration {iteration}: {'; '.join(item.sentence() for item in passed)}"
    if settings.action == "stop":
        raise UserError(f"{what}: {way_on(passed)}")
    trains_judge = context.recipe.iteration[iteration - 1].meta_judge
    logger.warning("%s: %s", what, consequence(settings, trains_judge))


def way_on(passed: list[Breach]) -> str:
    """What a run that the guard stopped can be told."""
    limits = " and ".join(f"--guard.{item.setting.replace('_', '-')}" for item in passed)
    return (
        'stopped, as guard.action = "stop" says, and nothing is lost; `metareward run` with the same recipe goes on from here with '
        f"--guard.action warn, with --guard.action drop_judge_pairs, or with another {limits}"
    )


def consequence(settings: GuardSettings, trains_judge: bool) -> str:
    """What a passed limit leads to, where the run goes on."""
    if settings.action == "warn":
        return 'the run goes on, as guard.action = "warn" says'
    if not trains_judge:
        return "this iteration has no judge pairs to drop, so the run goes on"
    return 'this iteration trains without judge pairs, as guard.action = "drop_judge_pairs" says'


def drops_judge_pairs(context: Context, iteration: int) -> bool:
    """Whether the guard takes an iteration's judge pairs out: by its judge's figures or by its meta-judge's."""
    settings = context.recipe.guard
    return settings.action == "drop_judge_pairs" and any(
        breaches(measure(context, iteration, stage), settings) for stage in GUARDED
    )


def measure(context: Context, iteration: int, stage: str) -> list[Measured]:
    """The figures that `stage` gives, from its file and, for the drift, from that of iteration 1."""
    if stage == "judge":
        own = judged(context, iteration)
        first = own if iteration == 1 else judged(context, 1)
        drift = (
            own.score_mean - first.score_mean
            if own.score_mean is not None and first.score_mean is not None
            else None
        )
        return [
            Measured("parse_rate", own.parse_rate, own.judgments),
            Measured("score_entropy", own.entropy, own.readable),
            Measured("mean_drift", drift, min(own.readable, first.readable)),
        ]
    files = context.files(iteration)
    judgments = read_jsonl(files.judgments, without=["token_ids", "text"])
    found = comparison_figures(read_jsonl(files.comparisons), judgments)
    return [
        Measured("position_preference", position_bias(found.first_preference), found.decided),
        Measured("higher_score_preference", found.higher_score_preference, found.unequal),
    ]


def judged(context: Context, iteration: int) -> JudgmentFigures:
    return judgment_figures(read_jsonl(context.files(iteration).judgments, without=["token_ids"]))
