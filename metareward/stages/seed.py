"""Stage 0: evaluation fine-tuning (EFT). Judge examples from people's quality labels, then SFT on them (appendix A.1)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from metareward.config import SeedSettings
from metareward.errors import UserError
from metareward.preference.caps import cap_score_class
from metareward.roles.judge import judge_messages
from metareward.roles.meta_judge import meta_judge_messages
from metareward.roles.seed_judgment import (
    comparison_text,
    judgment_text,
    observed_rationale,
    score_of_quality,
)
from metareward.roles.templates import load_template
from metareward.run import ranks
from metareward.run.inputs import LabelledResponse, read_quality
from metareward.run.jsonl import Line, read_jsonl, write_jsonl
from metareward.stages.context import Context
from metareward.stages.judge import judge_template
from metareward.stages.train import drop_checkpoints, is_trained, run_training, training_set
from metareward.stages.training_memory import check_training_memory
from metareward.training.examples import Example, check_batch
from metareward.training.objectives import sft_objective
from metareward.training.sharded import load_sharded


@dataclass(frozen=True)
class SeedJudgment:
    """A labelled response with the judgment that it should get."""

    source: LabelledResponse
    score: int
    text: str


def seed(context: Context) -> None:
    """quality file -> seed/examples.jsonl, seed/model/. A collective."""
    files, settings = context.run.seed, context.recipe.seed
    if not settings.enabled or is_trained(files):
        return
    context.spans.mark("data")
    context.release()
    check_batch(settings.batch_examples, ranks.world_size(), "seed.batch_examples")
    ranks.on_first(lambda: write_examples(context))
    policy = context.policy(0)
    examples = load_examples(context, policy)
    training = replace(
        context.recipe.train,
        epochs=settings.epochs,
        batch_pairs=settings.batch_examples,
        learning_rate=settings.learning_rate,
    )
    data = training_set(context, 0, examples, training)
    check_training_memory(context, 0, "seed", policy, data, training)
    context.spans.mark("load")
    adapter_seed = (context.recipe.random_seed, 0)
    decoder = load_sharded(policy, training, ranks.device(), ranks.world_size(), adapter_seed)
    context.spans.mark("data")
    run_training(context, 0, "seed", policy, decoder, data, sft_objective(), training)


def write_examples(context: Context) -> None:
    """seed/examples.jsonl: messages and target text of every example, so that what was taught can be read."""
    final = context.run.seed.folder / "examples.jsonl"
    if final.is_file():
        return
    settings, random_seed = context.recipe.seed, context.recipe.random_seed
    labelled = [build(item) for item in read_quality(settings.file)]
    judgments = balanced(labelled, settings, random_seed)
    template = judge_template(context)
    lines: list[Line] = [
        {
            "kind": "judge",
            "prompt_id": item.source.prompt_id,
            "response_id": item.source.response_id,
            "score": item.score,
            "messages": judge_messages(template, item.source.prompt, item.source.response),
            "target": item.text,
        }
        for item in judgments
    ]
    lines += comparison_lines(context, judgments)
    counts = {str(score): sum(item.score == score for item in judgments) for score in range(6)}
    context.metrics.event(
        "examples",
        "seed",
        0,
        judgments=len(judgments),
        comparisons=len(lines) - len(judgments),
        scores=counts,
    )
    final.parent.mkdir(parents=True, exist_ok=True)
    # Checkpoints from before the examples belong to others: somebody had them made anew.
    drop_checkpoints(context.run.seed.training)
    write_jsonl(final, lines)


def build(item: LabelledResponse) -> SeedJudgment:
    score = score_of_quality(item.quality)
    rationale = (item.rationale or "").strip() or observed_rationale(item.prompt, item.response)
    return SeedJudgment(item, score, judgment_text(rationale, score))


def balanced(judgments: list[SeedJudgment], settings: SeedSettings, random_seed: int) -> list[SeedJudgment]:
    """The judgments that are taught: no score class has more than `max_class_share` (paper: the most frequent score is
    thinned), then at most `max_examples`, drawn class by class in turn so that the balance stays."""
    kept = cap_score_class(
        [float(item.score) for item in judgments], settings.max_class_share, seed=random_seed
    )
    if not settings.max_examples:
        return [judgments[index] for index in kept]
    classes: dict[int, list[int]] = defaultdict(list)
    for place in np.random.default_rng([random_seed, 2]).permutation(len(kept)):
        classes[judgments[kept[place]].score].append(kept[place])
    # The first of every class, then the second of every class, and so on.
    in_turn = [
        index
        for row in zip_longest(*(classes[score] for score in sorted(classes)))
        for index in row
        if index is not None
    ]
    return [judgments[index] for index in sorted(in_turn[: settings.max_examples])]


def comparison_lines(context: Context, judgments: list[SeedJudgment]) -> list[Line]:
    """Comparisons of a response's own judgment with that of another response to the same prompt, two or more points away.

    The own judgment is the better one; it is shown first in every other example, so that position teaches nothing.
    """
    settings = context.recipe.meta_judge
    wanted = context.recipe.seed.meta_judge_examples
    if not wanted:
        return []
    template = load_template("meta_judge", Path(settings.template) if settings.template else None)
    by_prompt: dict[str, list[SeedJudgment]] = defaultdict(list)
    for item in judgments:
        by_prompt[item.source.prompt_id].append(item)
    pairs = [
        (own, other)
        for group in by_prompt.values()
        for own in group
        for other in group
        if abs(own.score - other.score) >= 2 and own.text != other.text
    ]
    if not pairs:
        raise UserError(
            f"seed.meta_judge_examples = {wanted}, but {context.recipe.seed.file} has no prompt with responses two or more "
            f"points apart: set it to 0, or give such labels"
        )
    order = np.random.default_rng([context.recipe.random_seed, 1]).permutation(len(pairs))[:wanted]
    lines: list[Line] = []
    for turn, index in enumerate(order):
        own, other = pairs[index]
        first, second = (own, other) if turn % 2 == 0 else (other, own)
        messages = meta_judge_messages(
            template,
            own.source.prompt,
            own.source.response,
            first.text,
            second.text,
            hide_scores=settings.hide_scores,
        )
        lines.append(
            {
                "kind": "meta_judge",
                "prompt_id": own.source.prompt_id,
                "response_id": own.source.response_id,
                "other_response_id": other.source.response_id,
                "winner": "first" if turn % 2 == 0 else "second",
                "messages": messages,
                "target": comparison_text("A" if turn % 2 == 0 else "B"),
            }
        )
    return lines


def load_examples(context: Context, policy: Path) -> list[Example]:
    """Training examples; one longer than pairs.max_tokens or the model's context is left out and counted."""
    chat = context.chat(policy)
    limit = min(context.recipe.pairs.max_tokens, context.max_context(policy))
    examples: list[Example] = []
    too_long = 0
    for number, line in enumerate(read_jsonl(context.run.seed.folder / "examples.jsonl")):
        prompt, completion = (
            tuple(chat.render(line["messages"])),
            tuple(chat.encode_completion(line["target"])),
        )
        if len(prompt) + len(completion) > limit:
            too_long += 1
            continue
        identity = json.dumps(["seed", number, line["prompt_id"], line["response_id"]], ensure_ascii=False)
        examples.append(Example(identity, line["kind"], prompt, (completion,)))
    context.metrics.event("left_out", "seed", 0, prompts_too_long=too_long)
    if not examples:
        raise UserError(
            f"no seed example fits pairs.max_tokens = {context.recipe.pairs.max_tokens}: raise it, or give a seed.file "
            f"with shorter responses"
        )
    return examples
