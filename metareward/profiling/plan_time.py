"""From a recipe's work to seconds by stage, memory a GPU and disk; and which assumption moves the total most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from metareward.config import Recipe
from metareward.model.config import ModelConfig
from metareward.model.flops import (
    forward_flops,
    inference_bytes,
    inference_flops,
    kv_token_bytes,
    optimizer_bytes,
    parameter_count,
    sampling_bytes,
    step_flops,
)
from metareward.model.tensor_parallel import part_config
from metareward.profiling.assumptions import Assumptions, with_values
from metareward.profiling.figures import ITEMSIZE
from metareward.profiling.machine import Machine
from metareward.profiling.plan_lengths import Lengths
from metareward.profiling.plan_work import StageWork, all_work
from metareward.training.lora import adapter_parameters
from metareward.training.memory import LargestBatch, memory_of

GIB = 2**30
STEP = 0.25
"""How far an assumption is moved to see what hangs on it."""


@dataclass(frozen=True)
class Setting:
    """What a plan is for: recipe, model, how long its texts are, GPUs (on a CPU: ranks), dtype of sampling, machine."""

    recipe: Recipe
    config: ModelConfig
    lengths: Lengths
    gpus: int
    dtype: str
    machine: Machine | None


@dataclass(frozen=True)
class StagePlan:
    """A stage with its parts in seconds of wall time; none without a machine."""

    work: StageWork
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def plan(setting: Setting, assumed: Assumptions) -> list[StagePlan]:
    """Every stage of the recipe."""
    work = all_work(setting.recipe, setting.lengths, assumed, setting.gpus)
    return [StagePlan(item, parts_of(item, setting, assumed)) for item in work]


def parts_of(work: StageWork, setting: Setting, assumed: Assumptions) -> dict[str, float]:
    """Seconds by phase of one stage."""
    if setting.machine is None:
        return {}
    train = work.stage in ("seed", "reference", "train")
    return training_parts(work, setting, assumed) if train else sampling_parts(work, setting, assumed)


def sampling_parts(work: StageWork, setting: Setting, assumed: Assumptions) -> dict[str, float]:
    machine, config, gpus = setting.machine, setting.config, setting.gpus
    assert machine is not None
    itemsize = ITEMSIZE[setting.dtype]
    # GPUs that share a model divide its passes, but all of them draw and keep the books.
    sharing = setting.recipe.sampler.tensor_parallel
    parts: dict[str, float] = {}
    for phase, passes, reached in (
        ("prefill", work.prefill, assumed.prefill_reached),
        ("decode", work.decode, assumed.decode_reached),
    ):
        flops, nbytes = inference_flops(config, passes), inference_bytes(config, passes, itemsize)
        parts[phase] = max(flops / machine.rate(setting.dtype), nbytes / machine.bandwidth) / gpus / reached
    drawn = sampling_bytes(config, work.new_tokens) / machine.bandwidth / gpus * sharing
    parts["sample"] = drawn / assumed.sample_reached
    parts["host"] = assumed.host_step * work.decode.passes / gpus * sharing
    if work.stage == "respond":
        # The judge and the meta-judge go on with the same weights.
        parts["load"] = parameter_count(config) * itemsize / sharing / assumed.load_rate
    return parts


def training_parts(work: StageWork, setting: Setting, assumed: Assumptions) -> dict[str, float]:
    """Seconds of a training stage.

    What is computed again takes its time: blocks under full activation checkpointing, and the logits of SFT. `train_reached` counts
    it as reached, also where it was measured (figures.limit_of_all), so it holds for any activation checkpointing; MFU does
    not count it. Cheap rows that selective checkpointing computes again are no products and are not counted, nor are the
    logits of pairs longer than a chunk of the head.
    """
    machine, config, gpus = setting.machine, setting.config, setting.gpus
    assert machine is not None
    adapters = adapter_parameters(config, setting.recipe.train)
    counted = (
        forward_flops(config, work.forward)
        if work.stage == "reference"
        else step_flops(
            config,
            work.forward,
            recompute_blocks=setting.recipe.train.activation_checkpointing == "full",
            recomputed_head_rows=work.forward.logit_rows if work.stage == "seed" else 0.0,
            adapter_weights=adapters // config.num_layers,
        )
    )
    rate = machine.rate(setting.recipe.train.compute_dtype)
    parameters = parameter_count(config)
    trained = adapters or parameters
    parts = {"compute": (counted.model + counted.recomputed) / rate / gpus / assumed.train_reached}
    if work.stage == "reference":
        return parts
    update = optimizer_bytes(trained) / machine.bandwidth / gpus
    parts["optimizer"] = update * work.optimizer_steps / assumed.optimizer_reached
    checkpoints = max(0, (int(work.optimizer_steps) - 1) // setting.recipe.train.checkpoint_steps)
    parts["checkpoint"] = 12.0 * trained * checkpoints / gpus / assumed.load_rate
    parts["load"] = (4.0 + ITEMSIZE[setting.recipe.save_dtype]) * parameters / assumed.load_rate
    return parts


def total_seconds(plans: list[StagePlan]) -> float:
    return sum(item.seconds for item in plans)


def total_tokens(plans: list[StagePlan]) -> float:
    """Tokens computed: prompts, next tokens and training."""
    return sum(item.work.prefill.rows + item.work.new_tokens + item.work.forward.rows for item in plans)


def sensitivities(setting: Setting, assumed: Assumptions) -> list[tuple[str, float]]:
    """(assumption, change of the total as a share when it is a quarter worse or better), the largest first.

    The total is seconds where a machine is known, else tokens computed.
    """
    total = total_tokens if setting.machine is None else total_seconds
    base = total(plan(setting, assumed))
    found = []
    for item in fields(Assumptions):
        value = getattr(assumed, item.name)
        changes = [
            total(plan(setting, with_values(assumed, {item.name: value * factor})))
            for factor in (1 - STEP, 1 + STEP)
        ]
        found.append((item.name, max(abs(change - base) for change in changes) / base if base else 0.0))
    return sorted(found, key=lambda item: -item[1])


def sampling_memory(setting: Setting) -> tuple[float, float]:
    """Bytes a GPU while sampling: (weights, key-value cache of max_running of the longest requests without sharing). A GPU's part
    of them where GPUs share a model.

    The cache takes what is free and no more than this; with less, fewer sequences run at once.
    """
    itemsize = ITEMSIZE[setting.dtype]
    recipe, lengths = setting.recipe, setting.lengths
    response = recipe.respond.max_new_tokens
    judge = lengths.judge_shared + lengths.instruction + lengths.judge_rest + response
    longest = max(lengths.prompt + response, judge + recipe.judge.max_new_tokens)
    if any(item.meta_judge for item in recipe.iteration):
        meta = lengths.meta_shared + lengths.instruction + lengths.meta_rest + response
        longest = max(longest, meta + 2 * recipe.judge.max_new_tokens + recipe.meta_judge.max_new_tokens)
    longest = min(longest, setting.config.max_context)
    part = part_config(setting.config, recipe.sampler.tensor_parallel)
    cache = recipe.sampler.max_running * longest * kv_token_bytes(part, itemsize)
    return float(parameter_count(part)) * itemsize, cache


def training_memory(setting: Setting, plans: list[StagePlan]) -> tuple[int, int]:
    """Bytes a GPU while training: (its shards of weights, gradients and moments, the peak), as a run estimates it
    before it trains, for full micro-batches of completions alone as long as the context.
    """
    settings, config = setting.recipe.train, setting.config
    tokens = settings.micro_batch_tokens
    largest = LargestBatch(tokens, tokens, tokens, min(tokens, config.max_context))
    steps = max((int(item.work.optimizer_steps) for item in plans), default=0)
    device = "cuda" if setting.machine is None else setting.machine.kind
    found = memory_of(config, settings, largest, steps, setting.gpus, device)
    return found.weights + found.gradients + found.optimizer, found.peak


def disk_bytes(setting: Setting, plans: list[StagePlan]) -> tuple[float, float]:
    """Bytes of the finished run directory, and of the checkpoints that lie beside it while a stage trains."""
    recipe = setting.recipe
    parameters = parameter_count(setting.config)
    models = (len(recipe.iteration) + recipe.seed.enabled) * parameters * ITEMSIZE[recipe.save_dtype]
    # A sampled token is about four characters of text and six of its id in JSON; a line has about 150 more.
    text = sum(10.0 * item.work.new_tokens + 150.0 * item.work.requests for item in plans)
    keeps = any(item.work.optimizer_steps > recipe.train.checkpoint_steps for item in plans)
    trained = adapter_parameters(setting.config, recipe.train) or parameters
    return models + text, (recipe.train.keep_checkpoints + 1) * 12.0 * trained if keeps else 0.0
