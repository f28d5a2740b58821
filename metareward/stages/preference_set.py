"""Actor and judge pairs of an iteration as training examples: prompt ids rendered once, completions as they were sampled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import numpy as np

from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.preference.caps import cap_judge_share
from metareward.roles.actor import actor_messages
from metareward.roles.judge import judge_messages
from metareward.run.jsonl import Line, read_jsonl
from metareward.stages.context import Context
from metareward.stages.judge import judge_template
from metareward.training.examples import Example

Messages = list[dict[str, str]]


def capped_judge_pairs(context: Context, iteration: int, actor_pairs: int) -> list[Line]:
    """The judge pairs that training uses: all, or a keyed random subset where pairs.max_judge_share says so."""
    if not context.recipe.iteration[iteration - 1].meta_judge:
        return []
    lines = read_jsonl(context.files(iteration).judge_pairs)
    keep = cap_judge_share(actor_pairs, len(lines), context.recipe.pairs.max_judge_share)
    chosen = np.random.default_rng([context.recipe.random_seed, iteration]).permutation(len(lines))[:keep]
    return [lines[index] for index in sorted(chosen.tolist())]


def pairs(context: Context, iteration: int) -> Iterator[tuple[str, str, Messages, Line, Line]]:
    """(identity, kind, prompt messages, chosen line, rejected line) of every pair; the lines have text and token_ids."""
    files = context.files(iteration)
    instructions = {line["prompt_id"]: line["prompt"] for line in read_jsonl(files.prompts)}
    responses = {(line["prompt_id"], line["response_id"]): line for line in read_jsonl(files.responses)}
    actor = read_jsonl(files.actor_pairs)
    for line in actor:
        prompt_id = line["prompt_id"]
        yield (
            json.dumps([iteration, "actor", prompt_id], ensure_ascii=False),
            "actor",
            actor_messages(instructions[prompt_id]),
            responses[prompt_id, line["chosen"]],
            responses[prompt_id, line["rejected"]],
        )
    judge = capped_judge_pairs(context, iteration, len(actor))
    if not judge:
        return
    template = judge_template(context)
    judgments = {
        (line["prompt_id"], line["response_id"], line["judgment_id"]): line
        for line in read_jsonl(files.judgments)
    }
    for line in judge:
        prompt_id, response_id = line["prompt_id"], line["response_id"]
        yield (
            json.dumps([iteration, "judge", prompt_id, response_id], ensure_ascii=False),
            "judge",
            judge_messages(template, instructions[prompt_id], responses[prompt_id, response_id]["text"]),
            judgments[prompt_id, response_id, line["chosen"]],
            judgments[prompt_id, response_id, line["rejected"]],
        )


def differ(chosen: Line, rejected: Line) -> bool:
    """Two judgments of a response can be the same text; such a pair has no gradient and teaches nothing."""
    return bool(chosen["token_ids"] != rejected["token_ids"])


def preference_examples(context: Context, iteration: int, chat: Chat, max_context: int) -> list[Example]:
    """The iteration's training examples.

    A pair is never cut: one with more than pairs.max_tokens (or the model's context) from prompt to the end of its longer
    completion is left out and counted.

    Raises:
        UserError: nothing is left to train on, with the counts that say why.
    """
    limit = min(context.recipe.pairs.max_tokens, max_context)
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    for identity, kind, messages, chosen, rejected in pairs(context, iteration):
        if not differ(chosen, rejected):
            counts[f"{kind}_identical"] += 1
            continue
        prompt = tuple(chat.render(messages))
        completions = (tuple(chosen["token_ids"]), tuple(rejected["token_ids"]))
        if len(prompt) + max(map(len, completions)) > limit:
            counts[f"{kind}_too_long"] += 1
            continue
        counts[kind] += 1
        examples.append(Example(identity, kind, prompt, completions))
    context.metrics.event("preference_set", "train", iteration, **counts)
    if not examples:
        folder = context.files(iteration).folder
        raise UserError(
            f"iteration {iteration} has no preference pairs to train on"
            f"{''.join(f', {name}: {count}' for name, count in sorted(counts.items()))}: see the dropped counts of this "
            f"iteration in {context.run.root / 'metrics.jsonl'} and the judgments in {folder}; more prompts, more "
            f"respond.samples or judge.samples, or a seed stage that teaches the judge's form will give pairs"
        )
    return examples
