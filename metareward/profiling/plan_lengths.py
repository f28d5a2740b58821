"""How long a recipe's texts are, in tokens: its own prompts, labels and templates, rendered by the model's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal, TypeVar

from metareward.config import Recipe
from metareward.model.chat import Chat
from metareward.roles.actor import actor_messages
from metareward.roles.judge import judge_messages
from metareward.roles.meta_judge import meta_judge_messages
from metareward.roles.seed_judgment import comparison_text
from metareward.roles.templates import load_template
from metareward.run.inputs import LabelledResponse, read_prompts, read_quality
from metareward.stages.seed import balanced, build
from metareward.training.packing import common_prefix

T = TypeVar("T")

SEEN = 64
"""Prompts and labelled responses that are rendered to know how long they are."""


@dataclass(frozen=True)
class Lengths:
    """Tokens, means over the recipe's own files. A judge prompt is `judge_shared` tokens that all begin with, the
    instruction, the response and `judge_rest`; a meta-judge prompt likewise, with two judgments behind the response. The seed
    stage's judgments have prompts of `seed_prompt` tokens, its comparisons of `taught_prompt`."""

    prompt: float
    instruction: float
    judge_shared: float
    judge_rest: float
    meta_shared: float
    meta_rest: float
    prompt_shared: float = 0.0
    seed_prompt: float = 0.0
    seed_target: float = 0.0
    taught_prompt: float = 0.0
    taught_target: float = 0.0


def measure_lengths(recipe: Recipe, chat: Chat) -> Lengths:
    """Render the recipe's prompts and templates."""
    pool = read_prompts(recipe.prompts.file)
    texts = [item.prompt for item in evenly(pool, SEEN)]
    judge_text = template_of("judge", recipe.judge.template)
    meta_text = template_of("meta_judge", recipe.meta_judge.template)
    instruction = mean(len(chat.encode_completion(text)) - 1 for text in texts)
    judged = [tuple(chat.render(judge_messages(judge_text, text, "x"))) for text in texts]
    compared = [tuple(chat.render(meta_judge_messages(meta_text, text, "x", "y", "z"))) for text in texts]
    judge_shared, meta_shared = common_prefix(judged), common_prefix(compared)
    asked = [tuple(chat.render(actor_messages(text))) for text in texts]
    seed = seed_lengths(recipe, chat, judge_text, meta_text) if recipe.seed.enabled else {}
    return Lengths(
        prompt=mean(map(len, asked)),
        prompt_shared=common_prefix(asked),
        instruction=instruction,
        judge_shared=judge_shared,
        judge_rest=max(0.0, mean(map(len, judged)) - judge_shared - instruction),
        meta_shared=meta_shared,
        meta_rest=max(0.0, mean(map(len, compared)) - meta_shared - instruction),
        **seed,
    )


def template_of(name: Literal["judge", "meta_judge"], path: str) -> str:
    return load_template(name, Path(path) if path else None)


def seed_lengths(recipe: Recipe, chat: Chat, judge_text: str, meta_text: str) -> dict[str, float]:
    """Mean tokens of the seed stage's judgments and comparisons, of prompt and target."""
    shown = [build(item) for item in evenly(read_quality(recipe.seed.file), SEEN)]
    judged = [judge_messages(judge_text, item.source.prompt, item.source.response) for item in shown]
    compared = [
        meta_judge_messages(meta_text, own.source.prompt, own.source.response, own.text, other.text)
        for own, other in zip(shown, [*shown[1:], *shown[:1]], strict=True)
    ]
    return {
        "seed_prompt": mean(len(chat.render(messages)) for messages in judged),
        "seed_target": mean(len(chat.encode_completion(item.text)) for item in shown),
        "taught_prompt": mean(len(chat.render(messages)) for messages in compared),
        "taught_target": len(chat.encode_completion(comparison_text("A"))),
    }


def seed_examples(recipe: Recipe) -> tuple[int, int]:
    """Judgments and comparisons that the seed stage will be taught."""
    labelled: list[LabelledResponse] = read_quality(recipe.seed.file)
    judgments = balanced([build(item) for item in labelled], recipe.seed, recipe.random_seed)
    return len(judgments), recipe.seed.meta_judge_examples


def evenly(items: list[T], count: int) -> list[T]:
    """At most `count` of the items, at even distances."""
    step = max(1, len(items) // count)
    return items[::step][:count]
