"""What can be known to fail before hours of work: files, templates, tokenizer, batch sizes. Reads, writes nothing."""

from __future__ import annotations

from pathlib import Path

from metareward.config import JudgeSettings, MetaJudgeSettings, Recipe, RespondSettings
from metareward.errors import UserError
from metareward.model.hf_files import read_config
from metareward.model.locate import locate_model
from metareward.model.tensor_parallel import check_tensor_parallel
from metareward.roles.templates import load_template
from metareward.run import ranks
from metareward.run.inputs import draw_prompts, read_prompts, read_quality
from metareward.stages.context import Context
from metareward.stages.judge import judge_template
from metareward.stages.out_of_memory import check_memory_snapshot
from metareward.stages.respond import render_prompts
from metareward.training.compiled import check_compiler
from metareward.training.examples import check_batch
from metareward.training.lora import check_lora
from metareward.training.sharded import check_shard_within


def preflight(context: Context) -> None:
    """Raise the UserError that a later stage would raise, now. A collective."""
    recipe = context.recipe
    check_batch(recipe.train.batch_pairs, ranks.world_size(), "train.batch_pairs")
    if recipe.seed.enabled:
        check_batch(recipe.seed.batch_examples, ranks.world_size(), "seed.batch_examples")
    check_shard_within(recipe.train.shard_within, ranks.world_size())
    check_lora(recipe.train)
    check_compiler(recipe.train, ranks.device())
    check_memory_snapshot(recipe.logging, ranks.device())
    ranks.on_first(lambda: check_files(context))


def check_files(context: Context) -> None:
    """Files and model of the recipe. On rank 0 alone, so nothing in here may be a collective."""
    recipe = context.recipe
    pool = read_prompts(recipe.prompts.file)
    if recipe.seed.enabled:
        read_quality(recipe.seed.file)
    judge_template(context)
    load_template("meta_judge", Path(recipe.meta_judge.template) if recipe.meta_judge.template else None)
    policy = locate_model(recipe.model.name)
    check_tensor_parallel(recipe.sampler.tensor_parallel, ranks.world_size(), read_config(policy))
    chat, max_context = context.chat(policy), context.max_context(policy)
    for name, settings in sampling_sections(recipe):
        if settings.max_new_tokens >= max_context:
            raise UserError(
                f"{name}.max_new_tokens = {settings.max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{max_context} tokens: lower it"
            )
    for iteration in range(1, len(recipe.iteration) + 1):
        if not context.files(iteration).prompts.is_file():
            drawn = draw_prompts(pool, recipe.prompts.per_iteration, iteration, recipe.random_seed)
            render_prompts(chat, ((item.prompt_id, item.prompt) for item in drawn), max_context, recipe)


def sampling_sections(
    recipe: Recipe,
) -> list[tuple[str, RespondSettings | JudgeSettings | MetaJudgeSettings]]:
    """The sections of the sampling stages that the recipe has."""
    found: list[tuple[str, RespondSettings | JudgeSettings | MetaJudgeSettings]] = [
        ("respond", recipe.respond),
        ("judge", recipe.judge),
    ]
    if any(item.meta_judge for item in recipe.iteration):
        found.append(("meta_judge", recipe.meta_judge))
    return found
