"""FLOPs and least bytes of what a decoder computes, counted once and here, for the sampler, the trainer, profile and plan.

Everything is a linear function of counts of tokens (`Work`), so that sums over steps give the FLOPs of all of them. A product of
[m,k] and [k,n] is 2 m k n FLOPs; the two products of its backward pass are as many each. Only matrix products count: norms,
rotary embedding, activations and softmax are below a hundredth of them. What is computed again (activation checkpointing, logits
made twice) is reported apart and is no part of MFU (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod

from metareward.model.config import ModelConfig
from metareward.model.decoder import parameter_shapes

LOGIT_BYTES = 4
"""Logits of the sampler are float32."""


@dataclass(frozen=True)
class Work:
    """What forward passes computed, summed over passes.

    passes: times that the weights were read. rows: tokens computed. logit_rows: rows that went through the head. pairs: query
    and key positions that met in attention, a causal sequence of n tokens being n (n + 1) / 2: what has to be computed, with
    shared prompts once; a kernel that computes masked pairs too does more. kv_tokens: positions of the cache that had to be read,
    a prefix shared by several rows once (sampling only). fused_rows: of logit_rows those whose head made its gradients in the
    forward pass (training only).
    """

    passes: float = 0
    rows: float = 0
    logit_rows: float = 0
    pairs: float = 0
    kv_tokens: float = 0
    fused_rows: float = 0

    @staticmethod
    def of(counts: Mapping[str, float]) -> Work:
        """From the counts of a span; others than Work's are passed over."""
        return Work(**{item.name: counts.get(item.name, 0) for item in fields(Work)})


@dataclass(frozen=True)
class Flops:
    """FLOPs by part; `recomputed` is on top of the others."""

    dense: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """What has to be computed, however it is done: the FLOPs of MFU."""
        return self.dense + self.attention + self.head


def block_weights(config: ModelConfig) -> int:
    """Weights in the matrices of one block; biases and norms are no products."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    return attention + 3 * config.hidden_size * config.intermediate_size


def projection_weights(config: ModelConfig) -> int:
    """Of a block's weights those of query, key and value."""
    return config.hidden_size * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Scores and weighted sum of all layers: two products of head_dim for every pair and head."""
    return 4.0 * pairs * config.num_layers * config.num_heads * config.head_dim


def head_flops(config: ModelConfig, rows: float) -> float:
    """Logits of so many rows."""
    return 2.0 * rows * config.hidden_size * config.vocab_size


def inference_flops(config: ModelConfig, work: Work) -> float:
    """A forward pass of the sampler, whose last block goes on with the rows that give logits alone."""
    first = projection_weights(config)
    rest = block_weights(config) - first
    whole = 2.0 * work.rows * (config.num_layers * first + (config.num_layers - 1) * rest)
    last = 2.0 * work.logit_rows * rest + head_flops(config, work.logit_rows)
    return whole + last + attention_flops(config, work.pairs)


def forward_flops(config: ModelConfig, work: Work) -> Flops:
    """A forward pass of the trainer, without gradients: all rows through all blocks, completion tokens through the head."""
    return Flops(
        2.0 * work.rows * config.num_layers * block_weights(config),
        attention_flops(config, work.pairs),
        head_flops(config, work.logit_rows),
    )


def step_flops(
    config: ModelConfig,
    work: Work,
    *,
    recompute_blocks: bool = False,
    recomputed_head_rows: float = 0,
    adapter_weights: int = 0,
) -> Flops:
    """Forward and backward of a training step: three times the forward pass with all weights trained.

    With adapters (LoRA) all but these is frozen: no product for a frozen matrix's own gradient. The gradient by the embedding
    counts as computed, though the first block then needs none.

    Args:
        work: tokens that go through the blocks and, those of completions, through the head.
        recompute_blocks: whether activation checkpointing computes every block again, all but the block's last product,
            whose output nothing needs.
        recomputed_head_rows: rows whose logits are computed a second time.
        adapter_weights: of one block's adapters; 0: all weights are trained.
    """
    once = forward_flops(config, work)
    adapters = 2.0 * work.rows * config.num_layers * adapter_weights
    recomputed = head_flops(config, recomputed_head_rows)
    if recompute_blocks:
        last = 2.0 * work.rows * config.num_layers * config.hidden_size * config.intermediate_size
        recomputed += once.dense - last + adapters + once.attention
    products = 2.0 if adapter_weights else 3.0
    return Flops(
        products * once.dense + 3.0 * adapters, 3.0 * once.attention, products * once.head, recomputed
    )


def read_weights(config: ModelConfig) -> int:
    """Weights that every pass reads: all but the rows of an embedding that is not the head too."""
    return config.num_layers * block_weights(config) + config.vocab_size * config.hidden_size


def parameter_count(config: ModelConfig) -> int:
    """Parameters, norms and biases included; a tied head counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def kv_token_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def inference_bytes(config: ModelConfig, work: Work, itemsize: int) -> float:
    """Least bytes that the sampler's passes move: weights once a pass, keys and values read and written, logits written.

    Activations between operations are left out, so real traffic is more.
    """
    weights = float(read_weights(config)) * itemsize * work.passes
    cache = kv_token_bytes(config, itemsize) * (work.kv_tokens + work.rows)
    return weights + cache + LOGIT_BYTES * config.vocab_size * work.logit_rows


def sampling_bytes(config: ModelConfig, logit_rows: float) -> float:
    """Least bytes of drawing a token from every row of logits: they are read once."""
    return float(LOGIT_BYTES) * config.vocab_size * logit_rows


def optimizer_bytes(parameters: float) -> float:
    """Bytes of an AdamW step on float32: weight, gradient and two moments read, all but the gradient written."""
    return 28.0 * parameters
