"""The decoder-only transformer of the Llama family, on packed tokens and with attention handed in.

Tokens lie in one row [T] with no batch dimension and no padding. How a query finds its keys is the
caller's: training passes causal attention over packed sequences, sampling passes attention over cache
pages, and the rest of the model is the same code. Parameter names are those of the Hugging Face
checkpoints, so that no renaming stands between a file and a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metareward.model.config import ModelConfig
from metareward.model.recompute import Recompute, recomputed
from metareward.model.rope import cos_sin, inverse_frequencies, rotate
from metareward.model.tensor_parallel import ALONE, TensorGroup

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q [T, Hq, D], k [T, Hk, D], v [T, Hk, D]) -> [T, Hq, D]; q and k come after the rotary
embedding.
"""
CompiledBlock = Callable[["Block", Tensor, Tensor, Tensor, Attend, Recompute], Tensor]
"""`Block.run`, compiled; see metareward.training.compiled."""


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[targets]: hidden [R, H], weight [V, H], targets [R] int64 -> [R]
    float32.
    """
    from metareward_kernels import linear_logprob

    return linear_logprob(hidden, weight, targets)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds; a tied head is not among them."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; reduces in fp32 and returns the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Attention(nn.Module):
    """Projections, the optional norm of each query and key head (Qwen3), rotary embedding, attention,
    output projection.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        query = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        out = attend(self.layer, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """One layer: hidden [T, H] -> [T, H]. The unit of sharding and of activation checkpointing."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.intermediate_size = config.intermediate_size
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        recompute: Recompute = "none",
        compiled: CompiledBlock | None = None,
    ) -> Tensor:
        # What FSDP does around a block stays outside of what is compiled.
        run = Block.run if compiled is None else compiled
        return run(self, hidden, cos, sin, attend, recompute)

    def run(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, recompute: Recompute = "none"
    ) -> Tensor:
        """What the block computes."""
        # Checkpointing sits inside the block: a sharded block is then gathered once for its recomputation
        # and backward.
        return recomputed(recompute, self.intermediate_size, self._compute, hidden, cos, sin, attend)

    def _compute(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Head(nn.Module):
    """The untied output matrix [V, H]: logits [R, V], or with targets [R] their log-probs [R] float32.

    A module called through `__call__`, so that it can be a sharding unit of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return (
            F.linear(hidden, self.weight) if targets is None else token_logprobs(hidden, self.weight, targets)
        )


class Trunk(nn.Module):
    """A container that gives the parameters the `model.` prefix of the checkpoints; Decoder calls its
    members.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The model. `activation_checkpointing` says what each block keeps for the backward pass (recompute.py); `compiled_block`
    is what all blocks run through, where they are compiled.

    In a `tensor_group` of several ranks this is one rank's part, and `config` has the part's sizes (tensor_parallel.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: Recompute = "none"
        self.compiled_block: CompiledBlock | None = None
        self.tensor_group: TensorGroup = ALONE
        self.model = Trunk(config)
        self.lm_head = None if config.tie_word_embeddings else Head(config)
        # Not a buffer: `.to(bfloat16)` would round it and a meta-device start would lose it.
        self._frequencies = {torch.device("cpu"): inverse_frequencies(config)}

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers, in order."""
        return cast("Iterable[Block]", self.model.layers)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Run the packed tokens through the model.

        token_ids [T] int64, positions [T] int64 (counted from 0 in each sequence). `rows` [R] int64 (or [T]
        bool) picks positions before the final norm. Returns the normed hidden states [R, H] in the model's
        dtype, or with `targets` [R] int64 the log-probs [R] float32 of those tokens after the picked
        positions. The head is computed within forward, where sharded weights are gathered.
        """
        embedded = self.model.embed_tokens(token_ids)
        cos, sin = cos_sin(positions, self._frequencies_on(embedded.device), embedded.dtype)
        # The residual stream is a sum of many terms: rounded to bf16 after each, it is a third of what the log-probs
        # of sampler and trainer differ by.
        hidden = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        for block in self.model.layers:
            hidden = block(hidden, cos, sin, attend, self.activation_checkpointing, self.compiled_block)
        hidden = self.model.norm(hidden if rows is None else hidden[rows])
        if targets is None:
            return hidden
        if self.lm_head is not None:
            return self.lm_head(hidden, targets)
        return token_logprobs(hidden, self.model.embed_tokens.weight, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] in the model's dtype from the hidden states [R, H] that forward returned; not for
        sharded weights.
        """
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, H]: the embedding's when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _frequencies_on(self, device: torch.device) -> Tensor:
        if device not in self._frequencies:
            self._frequencies[device] = self._frequencies[torch.device("cpu")].to(device)
        return self._frequencies[device]
