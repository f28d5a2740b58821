"""What can be known to fail before hours of work: files, templates, tokenizer, batch sizes. Reads, writes nothing."""

from __future__ import annotations

from pathlib import Path

from metareward.roles.templates import load_template
from metareward.run import ranks
from metareward.run.inputs import read_prompts, read_quality
from metareward.stages.context import Context
from metareward.stages.judge import judge_template
from metareward.training.examples import check_batch


def preflight(context: Context) -> None:
    """Raise the UserError that a later stage would raise, now. A collective."""
    recipe = context.recipe
    check_batch(recipe.train.batch_pairs, ranks.world_size(), "train.batch_pairs")
    if recipe.seed.enabled:
        check_batch(recipe.seed.batch_examples, ranks.world_size(), "seed.batch_examples")
    ranks.on_first(lambda: check_files(context))


def check_files(context: Context) -> None:
    """Files and model of the recipe, on rank 0."""
    recipe = context.recipe
    read_prompts(recipe.prompts.file)
    if recipe.seed.enabled:
        read_quality(recipe.seed.file)
    judge_template(context)
    load_template("meta_judge", Path(recipe.meta_judge.template) if recipe.meta_judge.template else None)
    policy = context.policy(0)
    context.chat(policy)
    context.max_context(policy)
