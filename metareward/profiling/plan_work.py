"""What a recipe asks for: requests, prompt and new tokens, passes and training tokens of every stage.

The prompts are the recipe's own, rendered by the model's tokenizer; only what models will write has to be assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from metareward.config import Recipe
from metareward.model.flops import Work
from metareward.profiling.assumptions import Assumptions
from metareward.profiling.plan_lengths import Lengths, seed_examples


@dataclass(frozen=True)
class StageWork:
    """A stage of an iteration. Sampling: requests, tokens of all their prompts, those computed, new tokens, engine steps.
    Training: examples in `requests`, and `passes` micro-batches of `forward` work, over all ranks; optimizer steps."""

    stage: str
    iteration: int
    requests: float
    prompt_tokens: float = 0.0
    prefill: Work = field(default_factory=Work)
    decode: Work = field(default_factory=Work)
    new_tokens: float = 0.0
    forward: Work = field(default_factory=Work)
    epochs: float = 1.0
    optimizer_steps: float = 0.0


def all_work(recipe: Recipe, lengths: Lengths, assumed: Assumptions, gpus: int) -> list[StageWork]:
    """Every stage of the recipe, in order."""
    found = []
    if recipe.seed.enabled:
        found.append(seed_work(recipe, lengths, assumed, gpus))
    for number, settings in enumerate(recipe.iteration, 1):
        found += iteration_work(recipe, number, settings.meta_judge, lengths, assumed, gpus)
    return found


def seed_work(recipe: Recipe, lengths: Lengths, assumed: Assumptions, gpus: int) -> StageWork:
    examples, settings = seed_examples(recipe), recipe.seed
    length = lengths.seed_example + lengths.seed_target
    shared = lengths.judge_shared
    return training_work(
        "seed",
        0,
        examples,
        own=length - shared,
        shared=shared,
        pairs_per_example=causal(shared, length - shared),
        targets=lengths.seed_target,
        batch=settings.batch_examples,
        epochs=settings.epochs,
        micro_tokens=recipe.train.micro_batch_tokens,
        sharing=assumed.training_sharing,
        gpus=gpus,
    )


def iteration_work(
    recipe: Recipe, number: int, meta_judge: bool, lengths: Lengths, assumed: Assumptions, gpus: int
) -> list[StageWork]:
    prompts = recipe.prompts.per_iteration
    response = assumed.response_share * recipe.respond.max_new_tokens
    judgment = assumed.judgment_share * recipe.judge.max_new_tokens
    comparison = assumed.comparison_share * recipe.meta_judge.max_new_tokens
    responses = prompts * recipe.respond.samples
    judged = responses * assumed.judged_share
    found = [
        sampling_work(
            "respond",
            number,
            requests=responses,
            prompt=lengths.prompt,
            computed=prompts * lengths.prompt,
            new=response,
            longest=recipe.respond.max_new_tokens,
            readers=recipe.respond.samples,
            recipe=recipe,
            gpus=gpus,
        )
    ]
    judge_prompt = lengths.judge_shared + lengths.instruction + response + lengths.judge_rest
    found.append(
        sampling_work(
            "judge",
            number,
            requests=judged * recipe.judge.samples,
            prompt=judge_prompt,
            computed=lengths.judge_shared
            + prompts * lengths.instruction
            + judged * (response + lengths.judge_rest),
            new=judgment,
            longest=recipe.judge.max_new_tokens,
            readers=recipe.judge.samples,
            recipe=recipe,
            gpus=gpus,
        )
    )
    actor_pairs = prompts * assumed.actor_pair_share
    judge_pairs = 0.0
    if meta_judge:
        count = recipe.judge.samples * assumed.parsed_share
        orders = max(0.0, count * (count - 1))
        head = lengths.meta_shared + lengths.instruction + response
        found.append(
            sampling_work(
                "compare",
                number,
                requests=prompts * orders,
                prompt=head + 2 * judgment + lengths.meta_rest,
                computed=lengths.meta_shared
                + prompts * (lengths.instruction + response)
                + prompts * (count * judgment + orders * (judgment + lengths.meta_rest)),
                new=comparison,
                longest=recipe.meta_judge.max_new_tokens,
                readers=1,
                recipe=recipe,
                gpus=gpus,
            )
        )
        judge_pairs = prompts * assumed.judge_pair_share
    total = actor_pairs + judge_pairs
    actor = lengths.prompt + 2 * response
    judge = lengths.instruction + response + lengths.judge_rest + 2 * judgment
    share = actor_pairs / total if total else 0.0
    pair_context = share * actor_context(lengths.prompt, response) + (1 - share) * actor_context(
        judge_prompt, judgment
    )
    for name, epochs in (("reference", 1), ("train", recipe.train.epochs)):
        found.append(
            training_work(
                name,
                number,
                total,
                own=share * actor + (1 - share) * judge,
                shared=(1 - share) * lengths.judge_shared,
                pairs_per_example=pair_context,
                targets=2 * (share * response + (1 - share) * judgment),
                batch=recipe.train.batch_pairs,
                epochs=epochs,
                micro_tokens=recipe.train.micro_batch_tokens,
                sharing=assumed.training_sharing,
                gpus=gpus,
            )
        )
    return found


def causal(before: float, own: float) -> float:
    """Pairs of query and key positions of `own` tokens that follow `before` others."""
    return own * before + own * (own + 1) / 2


def actor_context(prompt: float, completion: float) -> float:
    """Pairs of positions of a prompt with two completions."""
    return causal(0, prompt) + 2 * causal(prompt, completion)


def sampling_work(
    stage: str,
    iteration: int,
    *,
    requests: float,
    prompt: float,
    computed: float,
    new: float,
    longest: int,
    readers: int,
    recipe: Recipe,
    gpus: int,
) -> StageWork:
    """A sampling stage. computed: prompt tokens that the prefix tree leaves to compute. readers: requests of one prompt, which
    read its pages together.

    Engine steps: with n requests on a GPU that has room for R, the slots stay full until the requests run out and then drain:
    n new / R steps and the longest less the mean; the longest alone where all run at once.
    """
    mine = requests / gpus
    room = recipe.sampler.max_running
    steps = longest if mine <= room else mine * new / room + longest - new
    steps = max(1.0, min(steps, mine * new)) if requests else 0.0
    tokens = requests * new
    together = max(1.0, min(readers, room))
    return StageWork(
        stage,
        iteration,
        requests,
        prompt_tokens=requests * prompt,
        prefill=Work(
            passes=gpus * math.ceil(computed / gpus / recipe.sampler.max_step_tokens),
            rows=computed,
            logit_rows=requests / together,
            pairs=computed * prompt / 2 if stage == "respond" else computed * prompt * 0.75,
            kv_tokens=computed,
        ),
        decode=Work(
            passes=steps * gpus,
            rows=tokens,
            logit_rows=tokens,
            pairs=tokens * (prompt + new / 2),
            kv_tokens=tokens * (prompt / together + new / 2),
        ),
        new_tokens=tokens,
    )


def training_work(
    stage: str,
    iteration: int,
    examples: float,
    *,
    own: float,
    shared: float,
    pairs_per_example: float,
    targets: float,
    batch: int,
    epochs: int,
    micro_tokens: int,
    sharing: float,
    gpus: int,
) -> StageWork:
    """A training stage: every example's own tokens, and those that prompts of a kind share: once a micro-batch for so much of
    them as `sharing` says, else once an example."""
    per_micro = max(1.0, min(micro_tokens / max(own + shared, 1.0), batch / gpus))
    micros = math.ceil(examples / per_micro) if examples else 0
    return StageWork(
        stage,
        iteration,
        examples,
        forward=Work(
            passes=micros * epochs,
            rows=(examples * own + (sharing * micros + (1 - sharing) * examples) * shared) * epochs,
            logit_rows=examples * targets * epochs,
            pairs=examples * pairs_per_example * epochs,
        ),
        epochs=epochs,
        optimizer_steps=0.0 if stage == "reference" else math.ceil(examples / batch) * epochs,
    )
