"""What a recipe asks for: requests, prompt and new tokens, passes and training tokens of every stage.

The prompts are the recipe's own, rendered by the model's tokenizer; only what models will write has to be assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from metareward.config import Recipe, TrainSettings
from metareward.model.flops import Work
from metareward.profiling.assumptions import Assumptions
from metareward.profiling.plan_lengths import Lengths, seed_examples
from metareward.training.packing import SMALLEST_SHARED


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


@dataclass(frozen=True)
class Kind:
    """Training examples of a kind; the rest is of one example: tokens that all prompts of the kind begin with, other tokens,
    pairs of positions that meet in attention if nothing is shared with other examples, completion tokens."""

    examples: float
    shared: float
    own: float
    positions: float
    targets: float

    @property
    def tokens(self) -> float:
        return self.shared + self.own


def all_work(recipe: Recipe, lengths: Lengths, assumed: Assumptions, gpus: int) -> list[StageWork]:
    """Every stage of the recipe, in order."""
    found = []
    if recipe.seed.enabled:
        found.append(seed_work(recipe, lengths, gpus))
    for number, settings in enumerate(recipe.iteration, 1):
        found += iteration_work(recipe, number, settings.meta_judge, lengths, assumed, gpus)
    return found


def seed_work(recipe: Recipe, lengths: Lengths, gpus: int) -> StageWork:
    judgments, comparisons = seed_examples(recipe)
    kinds = [
        Kind(
            judgments,
            lengths.judge_shared,
            lengths.seed_prompt + lengths.seed_target - lengths.judge_shared,
            causal(0, lengths.seed_prompt + lengths.seed_target),
            lengths.seed_target,
        ),
        Kind(
            comparisons,
            lengths.meta_shared,
            lengths.taught_prompt + lengths.taught_target - lengths.meta_shared,
            causal(0, lengths.taught_prompt + lengths.taught_target),
            lengths.taught_target,
        ),
    ]
    return training_work("seed", 0, kinds, recipe.seed.batch_examples, recipe.seed.epochs, recipe.train, gpus)


def iteration_work(
    recipe: Recipe, number: int, meta_judge: bool, lengths: Lengths, assumed: Assumptions, gpus: int
) -> list[StageWork]:
    prompts = recipe.prompts.per_iteration
    response = assumed.response_share * recipe.respond.max_new_tokens
    judgment = assumed.judgment_share * recipe.judge.max_new_tokens
    comparison = assumed.comparison_share * recipe.meta_judge.max_new_tokens
    responses = prompts * recipe.respond.samples
    judged = responses * assumed.judged_share
    engines = gpus // recipe.sampler.tensor_parallel
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
            engines=engines,
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
            engines=engines,
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
                engines=engines,
            )
        )
        judge_pairs = prompts * assumed.judge_pair_share
    kinds = [
        pair_kind(actor_pairs, lengths.prompt_shared, lengths.prompt, response),
        pair_kind(judge_pairs, lengths.judge_shared, judge_prompt, judgment),
    ]
    for name, epochs in (("reference", 1), ("train", recipe.train.epochs)):
        found.append(training_work(name, number, kinds, recipe.train.batch_pairs, epochs, recipe.train, gpus))
    return found


def causal(before: float, own: float) -> float:
    """Pairs of query and key positions of `own` tokens that follow `before` others."""
    return own * before + own * (own + 1) / 2


def pair_kind(examples: float, shared: float, prompt: float, completion: float) -> Kind:
    """Preference pairs: a prompt, computed once, and two completions."""
    positions = causal(0, prompt) + 2 * causal(prompt, completion)
    return Kind(examples, shared, prompt + 2 * completion - shared, positions, 2 * completion)


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
    engines: int,
) -> StageWork:
    """A sampling stage. computed: prompt tokens that the prefix tree leaves to compute. readers: requests of one prompt, which
    read its pages together. engines: GPUs, or groups of them that share a model.

    Engine steps: with n requests in an engine that has room for R, the slots stay full until the requests run out and then drain:
    n new / R steps and the longest less the mean; the longest alone where all run at once.
    """
    mine = requests / engines
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
            passes=engines * math.ceil(computed / engines / recipe.sampler.max_step_tokens),
            rows=computed,
            logit_rows=requests / together,
            pairs=computed * prompt / 2 if stage == "respond" else computed * prompt * 0.75,
            kv_tokens=computed,
        ),
        decode=Work(
            passes=steps * engines,
            rows=tokens,
            logit_rows=tokens,
            pairs=tokens * (prompt + new / 2),
            kv_tokens=tokens * (prompt / together + new / 2),
        ),
        new_tokens=tokens,
    )


def training_work(
    stage: str, iteration: int, kinds: list[Kind], batch: int, epochs: int, settings: TrainSettings, gpus: int
) -> StageWork:
    """A training stage, with `kinds` in the order in which a batch has them.

    A batch is cut into micro-batches by the tokens of its examples; what a kind's prompts begin with is computed once in every
    micro-batch that has the kind.
    """
    kinds = [kind for kind in kinds if kind.examples]
    examples = sum(kind.examples for kind in kinds)
    if not examples:
        return StageWork(stage, iteration, 0.0)
    batches = math.ceil(examples / batch)
    # Of one rank in one step.
    mine = examples / batches / gpus
    all_tokens = sum(kind.examples * kind.tokens for kind in kinds)
    micros = math.ceil(mine / max(1, int(settings.micro_batch_tokens * examples / all_tokens)))
    rows = positions = targets = start = 0.0
    for kind in kinds:
        stop = start + kind.examples * kind.tokens / all_tokens
        # Micro-batches that the kind has a part of; never more than it has examples. Rounding must not make one more of them.
        parts = math.ceil(micros * stop - 1e-9) - math.floor(micros * start + 1e-9)
        times = min(batches * gpus * parts, kind.examples)
        shared = kind.shared if kind.shared >= SMALLEST_SHARED else 0.0
        rows += kind.examples * (kind.tokens - shared) + times * shared
        positions += kind.examples * (kind.positions - causal(0, shared)) + times * causal(0, shared)
        targets += kind.examples * kind.targets
        start = stop
    return StageWork(
        stage,
        iteration,
        examples,
        forward=Work(
            passes=batches * gpus * micros * epochs,
            rows=rows * epochs,
            logit_rows=targets * epochs,
            pairs=positions * epochs,
        ),
        epochs=epochs,
        optimizer_steps=0.0 if stage == "reference" else batches * epochs,
    )
