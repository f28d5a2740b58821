"""The decoder's forward pass without gradients, for sampling: the same weights, fewer and fused operations.

Query, key and value projections are one matrix product, gate and up another; the norms, the rotary embedding and the
gated activation are one pass each over their rows. Keys and values go to the pages of a cache and attention reads
them there. Parity with ``Decoder.forward`` is tested on every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from metareward_kernels import Segments, add_rms_norm, paged_attention, rotate_and_store, silu_mul
from torch import Tensor, nn

from metareward.model.decoder import Block, Decoder
from metareward.model.rope import cos_sin, inverse_frequencies


@dataclass(frozen=True)
class Linear:
    """x [T, inputs] -> x @ weight.T + bias [T, outputs]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """One block's operations."""

    block: Block
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


def stack(parameters: Sequence[Tensor]) -> Tensor:
    """Tensors [n_i, ...] as one [sum of n_i, ...]; they become views of it, so that their contents are held once."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


def stacked(layers: Sequence[nn.Linear]) -> Linear:
    """Several projections of one input as one. The layers' parameters become views of its weights."""
    bias = None if layers[0].bias is None else stack([layer.bias for layer in layers])
    return Linear(stack([layer.weight for layer in layers]), bias)


def single(layer: nn.Linear) -> Linear:
    return Linear(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


class InferenceDecoder:
    """A decoder's weights as sampling uses them; not for sharded weights.

    ``decoder`` goes on working: its parameters share memory with what is here. Call ``prepare`` before the first
    forward and whenever the weights may have changed.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.layers: list[Layer] = []
        self._frequencies = inverse_frequencies(decoder.config)
        self._places: tuple[int, ...] = ()

    def prepare(self) -> object:
        """Follow the weights as they are now; returns a key that is equal as long as they are not changed.

        Changes that go around the version counters of the tensors (``.data``) are not seen in the key.
        """
        parameters = list(self.decoder.parameters())
        if self._places != tuple(parameter.data_ptr() for parameter in parameters):
            self.layers = [self._layer(cast(Block, block)) for block in self.decoder.blocks]
            self._places = tuple(parameter.data_ptr() for parameter in parameters)
            self._frequencies = self._frequencies.to(parameters[0].device)
        if any(parameter.is_inference() for parameter in parameters):
            return object()  # they count no versions
        return self._places, sum(parameter._version for parameter in parameters)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        places: Tensor,
        segments: Segments,
        key_pages: Sequence[Tensor],
        value_pages: Sequence[Tensor],
        rows: Tensor,
    ) -> Tensor:
        """Logits [R, V] in the model's dtype after the rows [R] int64 of a step.

        token_ids, positions, places [T] int64: inputs, positions in their sequences, and where keys and values go
        (page * page_size + slot). segments: what every row attends to, the places written here included.
        key_pages, value_pages: per layer [P, page, Hk, D].
        """
        config, trunk = self.config, self.decoder.model
        residual = trunk.embed_tokens(token_ids)
        cos, sin = cos_sin(positions, self._frequencies, residual.dtype)
        scale, eps = config.head_dim**-0.5, config.rms_norm_eps
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            block, keys, values = layer.block, key_pages[index], value_pages[index]
            attention = block.self_attn
            x = add_rms_norm(residual, delta, block.input_layernorm.weight, eps)
            norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.qk_norm else (None, None)
            query = rotate_and_store(layer.qkv(x), cos, sin, places, keys, values, *norms, eps)
            delta = layer.out(paged_attention(query, keys, values, segments, scale).flatten(1))
            x = add_rms_norm(residual, delta, block.post_attention_layernorm.weight, eps)
            delta = layer.down(silu_mul(layer.gate_up(x)))
        assert delta is not None
        last = add_rms_norm(residual[rows], delta[rows], trunk.norm.weight, eps)
        return F.linear(last, self.decoder.head_weight)

    def _layer(self, block: Block) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            block,
            qkv=stacked([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=single(attention.o_proj),
            gate_up=stacked([mlp.gate_proj, mlp.up_proj]),
            down=single(mlp.down_proj),
        )
