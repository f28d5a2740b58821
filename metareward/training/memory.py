"""How much memory training will take, before it takes it: bytes of one rank, by what they are for.

Formulas over sizes, not measurements: what PyTorch keeps for the backward pass as this decoder is written, and the largest of what
comes and goes. The largest micro-batch is taken from the examples. Has been held against measured peaks on a CPU, not on a
GPU yet; an allocator's fragments and a process's own libraries are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from metareward_kernels import dispatch
from metareward_kernels.linear_preference import chunk_size

from metareward.config import TrainSettings
from metareward.model.config import ModelConfig
from metareward.model.decoder import parameter_shapes
from metareward.training.examples import Example
from metareward.training.lora import adapter_parameters

FLOAT = 4  # bytes of a float32: master weights, gradients, optimizer state, residual stream
# The compiled attention's backward pass: float32 sums of dQ for each stretch of so many keys, for so many stretches at most.
STRETCH_KEYS, STRETCHES = 512, 10


@dataclass(frozen=True)
class LargestBatch:
    """The largest micro-batch of a rank. tokens: computed; targets: completion tokens; keys: of prompt and completion, for every
    completion that shares its prompt; longest: of prompt and completion, the most that a query sees."""

    tokens: int
    targets: int
    keys: int
    longest: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    weights, gradients, optimizer: this rank's shards, in float32. copy: of a checkpoint that is being written, where main
    memory is the device's. gathered: whole weights of the units at work, and whole gradients before they are reduced.
    activations: kept for the backward pass. work: of one layer, or of the head, while it is computed. update: what AdamW needs
    besides.
    """

    weights: int
    gradients: int
    optimizer: int
    copy: int
    gathered: int
    activations: int
    work: int
    update: int

    @property
    def peak(self) -> int:
        passing = max(self.gathered + self.activations + self.work, self.update)
        return self.weights + self.gradients + self.optimizer + self.copy + passing

    def sentence(self) -> str:
        """The figures for the log, in GB of 10^9 bytes."""
        parts = {name: value for name, value in vars(self).items() if name != "update"}
        told = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())
        return f"training needs about {self.peak / 1e9:.2f} GB a process ({told})"


def largest_batch(examples: Sequence[Example], budget: int, per_rank: int) -> LargestBatch:
    """The longest examples that fit into `budget` tokens, at most `per_rank` of them; one longer than the budget stands alone."""
    longest = sorted(examples, key=lambda example: -example.tokens)[:per_rank]
    total = sum(example.tokens for example in longest)
    tokens = max(longest[0].tokens, min(budget, total))
    targets = sum(example.target_tokens for example in longest)
    keys = sum(
        len(example.prompt) + len(part)
        for example in longest
        for part in example.completions
        if len(example.completions) > 1
    )
    seen = max(len(example.prompt) + max(map(len, example.completions)) for example in examples)
    return LargestBatch(tokens, -(-targets * tokens // total), -(-keys * tokens // total), seen)


def compiled(op: str, device_type: str) -> bool:
    """Whether the compiled implementation of an op of metareward_kernels will run."""
    return device_type == "cpu" and dispatch.implementation(op) == "cpp"


def estimate_memory(
    config: ModelConfig,
    settings: TrainSettings,
    examples: Sequence[Example],
    batch: int,
    world_size: int,
    device_type: str,
) -> MemoryEstimate:
    """The estimate for the model of `config` on `world_size` ranks; `batch`: examples an optimizer step, over all of them."""
    largest = largest_batch(examples, settings.micro_batch_tokens, math.ceil(batch / world_size))
    steps = settings.epochs * math.ceil(len(examples) / batch)
    return memory_of(config, settings, largest, steps, world_size, device_type)


def memory_of(
    config: ModelConfig,
    settings: TrainSettings,
    largest: LargestBatch,
    steps: int,
    world_size: int,
    device_type: str,
) -> MemoryEstimate:
    """The estimate for so many optimizer steps, none of whose micro-batches is larger than `largest`."""
    shapes = parameter_shapes(config).values()
    parameters = sum(math.prod(shape) for shape in shapes)
    shard = math.ceil(parameters / (settings.shard_within or world_size))
    adapters = adapter_parameters(config, settings)
    trained = math.ceil(adapters / (settings.shard_within or world_size)) if adapters else shard
    bytes_ = 2 if settings.compute_dtype == "bfloat16" else FLOAT
    in_place = compiled("segment_attention", device_type)
    layer = kept_by_layer(config, largest, bytes_, in_place)
    kept = {
        "none": layer,
        "selective": kept_selectively(config, largest, bytes_),
        "full": FLOAT * config.hidden_size * largest.tokens,
    }[settings.activation_checkpointing]
    again = 0 if settings.activation_checkpointing == "none" else layer
    head_rows = min(chunk_size(torch.device(device_type)), largest.targets)
    copied = settings.async_checkpoints and device_type == "cpu" and steps > settings.checkpoint_steps
    return MemoryEstimate(
        weights=FLOAT * (shard + (trained if adapters else 0)),
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        copy=3 * FLOAT * trained if copied else 0,
        gathered=gathered(config, parameters, bytes_, frozen=adapters > 0),
        activations=config.num_layers * kept + rows_of_head(config, largest, bytes_),
        work=max(
            again + layer_backward(config, largest, bytes_, in_place),
            head_rows * config.vocab_size * logit_bytes(bytes_, device_type),
        ),
        # The square roots of the second moments, of all weights together.
        update=FLOAT * trained,
    )


def kept_by_layer(config: ModelConfig, batch: LargestBatch, bytes_: int, in_place: bool) -> int:
    """Bytes that one block keeps for its backward pass."""
    hidden, queries, keys = attention_sizes(config)
    # Each norm: its input and its quotient in float32, its result in the compute dtype.
    norms = 2 * (2 * FLOAT + bytes_) * hidden
    if config.qk_norm:
        norms += 2 * FLOAT * (queries + keys)
    mlp = 4 * bytes_ * config.intermediate_size
    return batch.tokens * (norms + mlp) + kept_by_attention(config, batch, bytes_, in_place)


def kept_by_attention(config: ModelConfig, batch: LargestBatch, bytes_: int, in_place: bool) -> int:
    """Bytes of attention's inputs and results in one block. in_place: the compiled op, which reads keys where they lie."""
    _, queries, keys = attention_sizes(config)
    if in_place:
        # Queries and keys after the rotation, values, results, and a log-sum-exp a query head.
        return batch.tokens * (2 * bytes_ * (queries + keys) + FLOAT * config.num_heads)
    # Queries after the rotation, the results of every segment and these side by side; keys and values for every query head,
    # and for every segment below a prompt anew.
    return 3 * bytes_ * queries * batch.tokens + 2 * bytes_ * queries * (batch.tokens + batch.keys)


def kept_selectively(config: ModelConfig, batch: LargestBatch, bytes_: int) -> int:
    """Bytes that one block keeps where it keeps its input and the outputs of products and attention."""
    hidden, queries, keys = attention_sizes(config)
    products = queries + 2 * keys + hidden + 2 * config.intermediate_size
    return batch.tokens * (FLOAT * (hidden + config.num_heads) + bytes_ * (products + queries))


def layer_backward(config: ModelConfig, batch: LargestBatch, bytes_: int, in_place: bool) -> int:
    """Bytes that come and go while one block is differentiated: gradients of its widest part and of the residual stream."""
    hidden, queries, keys = attention_sizes(config)
    attention = 3 * bytes_ * queries
    if in_place:
        stretches = min(STRETCHES, -(-batch.longest // STRETCH_KEYS))
        attention = bytes_ * (2 * queries + 2 * keys) + FLOAT * queries * stretches
    return batch.tokens * (max(3 * bytes_ * config.intermediate_size, attention) + 3 * FLOAT * hidden)


def logit_bytes(bytes_: int, device_type: str) -> int:
    """Bytes of one logit of a chunk of the head and its gradient (metareward_kernels.linear_preference)."""
    if device_type != "cpu" or (bytes_ < FLOAT and compiled("linear_softmax", device_type)):
        return bytes_
    return FLOAT + (bytes_ if bytes_ < FLOAT else 0)


def rows_of_head(config: ModelConfig, batch: LargestBatch, bytes_: int) -> int:
    """The final norm's input, quotient and result, and the gradient of the result, at the completion rows."""
    return batch.targets * config.hidden_size * (2 * FLOAT + 2 * bytes_)


def gathered(config: ModelConfig, parameters: int, bytes_: int, frozen: bool = False) -> int:
    """Whole weights and gradients of the units at work: the head (or the embedding tied to it) and two blocks.

    The head's weight is in the compute dtype; its gradient is there in float32, as it was summed over rows, in the compute dtype,
    as autograd hands it on, and in float32 again, as it is reduced. A block: its weights, those of the next, and its
    gradient in both dtypes. Frozen weights have no gradients.
    """
    head = config.vocab_size * config.hidden_size
    others = parameters - head * (1 if config.tie_word_embeddings else 2)
    block = others // config.num_layers
    if frozen:
        return bytes_ * (head + 2 * block)
    return head * (2 * bytes_ + 2 * FLOAT) + block * (3 * bytes_ + FLOAT)


def attention_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """(channels of the residual stream, of all query heads, of all key heads)"""
    return config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
