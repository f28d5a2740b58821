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
from metareward_kernels import (
    LayerStack,
    LayerWeights,
    PackedGatedLinear,
    PackedLinear,
    Segments,
    add_rms_norm,
    decoder_layers,
    linear_fp32,
    pack_bf16_weight,
    pack_gated_linear,
    pack_linear,
    paged_attention,
    rotate_and_store,
    stack_layers,
)
from metareward_kernels.attention_tiles import TileTable
from metareward_kernels.decoder_layers import runs_here
from metareward_kernels.packed_linear import has_tiles
from torch import Tensor, nn

from metareward.model.decoder import Block, Decoder
from metareward.model.rope import cos_sin, inverse_frequencies


@dataclass(frozen=True)
class Weights:
    """Weight [outputs, inputs] and bias [outputs] of one projection."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One block's projections."""

    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedGatedLinear
    down: PackedLinear


def stack(parameters: Sequence[Tensor]) -> Tensor:
    """Tensors [n_i, ...] as one [sum of n_i, ...]; they become views of it, so that their contents are held once."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


def stacked(*layers: nn.Linear) -> Weights:
    """Several projections of one input as one. The layers' parameters become views of its weights."""
    bias = None if layers[0].bias is None else stack([layer.bias for layer in layers])
    return Weights(stack([layer.weight for layer in layers]), bias)


def block_weights(block: Block) -> tuple[Weights, Weights, Weights, Weights]:
    """The four products of a block: (query, key, value), output, (gate, up), down."""
    attention, mlp = block.self_attn, block.mlp
    return (
        stacked(attention.q_proj, attention.k_proj, attention.v_proj),
        Weights(attention.o_proj.weight, attention.o_proj.bias),
        stacked(mlp.gate_proj, mlp.up_proj),
        Weights(mlp.down_proj.weight, mlp.down_proj.bias),
    )


class InferenceDecoder:
    """A decoder's weights as sampling uses them; not for weights that training has sharded.

    ``decoder`` goes on working: its parameters share memory with what is here, except that on a CPU with bf16
    arithmetic a second copy of the weights is laid out for its matrix products. Call ``prepare`` before the first
    forward and whenever the weights may have changed. In a tensor group of several ranks ``forward`` is a collective.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.group = decoder.tensor_group
        self.layers: list[Layer] = []
        self._weights: list[tuple[Weights, Weights, Weights, Weights]] = []
        self._frequencies = inverse_frequencies(decoder.config)
        self._places: tuple[int, ...] = ()
        self._key: object = None
        self._stack: LayerStack | None = None  # the layers for a call that runs them all, where there is one
        self._head: Tensor | None = None  # the output matrix, laid out for the product
        self._logits: Tensor | None = None

    def prepare(self) -> object:
        """Follow the weights as they are now; returns a key that is equal as long as they are not changed.

        Changes that go around the version counters of the tensors (``.data``) are not seen in the key.
        """
        parameters = list(self.decoder.parameters())
        if self._places != tuple(parameter.data_ptr() for parameter in parameters):
            self._weights = [block_weights(cast(Block, block)) for block in self.decoder.blocks]
            self._places = tuple(parameter.data_ptr() for parameter in parameters)
            self._frequencies = self._frequencies.to(parameters[0].device)
        key: object = object()  # inference tensors count no versions
        if not any(parameter.is_inference() for parameter in parameters):
            key = (self._places, sum(parameter._version for parameter in parameters))
        if key != self._key:
            self.layers = [
                Layer(
                    pack_linear(qkv.weight.detach(), qkv.bias),
                    pack_linear(out.weight.detach(), out.bias),
                    pack_gated_linear(gate_up.weight.detach(), gate_up.bias),
                    pack_linear(down.weight.detach(), down.bias),
                )
                for qkv, out, gate_up, down in self._weights
            ]
            self._stack = self._stacked()
            head = self.decoder.head_weight.detach()
            self._head = pack_bf16_weight(head) if has_tiles(head) else None
            self._key = key
        return key

    @property
    def at_once(self) -> bool:
        """Whether one compiled call runs all layers."""
        return runs_here(self._stack)

    def _stacked(self) -> LayerStack | None:
        if self.group.size > 1:
            return None  # the ranks' terms are added up twice a layer
        layers = []
        for layer, module in zip(self.layers, self.decoder.blocks, strict=True):
            block = cast(Block, module)
            attention, norms = block.self_attn, (block.input_layernorm, block.post_attention_layernorm)
            layers.append(
                LayerWeights(
                    norms[0].weight,
                    layer.qkv,
                    layer.out,
                    norms[1].weight,
                    layer.gate_up,
                    layer.down,
                    attention.q_norm.weight if attention.qk_norm else None,
                    attention.k_norm.weight if attention.qk_norm else None,
                )
            )
        return stack_layers(layers, self.decoder.model.norm.weight)

    def forget(self) -> None:
        """Lay the weights out anew at the next ``prepare``: they were changed in a way that their counters do not show."""
        self._key = None

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        places: Tensor,
        segments: Segments,
        key_pages: Sequence[Tensor],
        value_pages: Sequence[Tensor],
        rows: Tensor,
        tiles: TileTable | None = None,
    ) -> Tensor:
        """Logits [R, V] float32 after the rows [R] int64 of a step, on a CPU in a buffer that the next call overwrites.

        token_ids, positions, places [T] int64: inputs, positions in their sequences, and where keys and values go
        (page * page_size + slot). segments: what every row attends to, the places written here included.
        key_pages, value_pages: per layer [P, page, Hk, D]. tiles: of the segments, where Triton's attention runs.
        """
        embedded = self.decoder.model.embed_tokens(token_ids)
        cos, sin = cos_sin(positions, self._frequencies, embedded.dtype)
        # Sums of many terms: rounded to bf16 after each, they are most of what sampler and trainer differ by.
        residual = embedded.float()
        scale, eps = self.config.head_dim**-0.5, self.config.rms_norm_eps
        if self._stack is not None and self.at_once:
            last = decoder_layers(
                residual,
                cos,
                sin,
                places,
                key_pages,
                value_pages,
                segments,
                self._stack,
                rows,
                self.config.num_heads,
                eps,
                scale,
            )
        else:
            last = self._run_layers(residual, cos, sin, places, segments, key_pages, value_pages, rows, tiles)
        return linear_fp32(
            last, self.decoder.head_weight, packed=self._head, out=self._buffer(len(rows), last)
        )

    def _run_layers(
        self,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        places: Tensor,
        segments: Segments,
        key_pages: Sequence[Tensor],
        value_pages: Sequence[Tensor],
        rows: Tensor,
        tiles: TileTable | None,
    ) -> Tensor:
        """Hidden states [R, H] of the rows after all layers and the last norm, one operation after the other."""
        scale, eps = self.config.head_dim**-0.5, self.config.rms_norm_eps
        delta: Tensor | None = None
        for index, (layer, module) in enumerate(zip(self.layers, self.decoder.blocks, strict=True)):
            block, keys, values = cast(Block, module), key_pages[index], value_pages[index]
            attention = block.self_attn
            x = self._add_norm(residual, delta, block.input_layernorm.weight)
            query_norm = attention.q_norm.weight if attention.qk_norm else None
            key_norm = attention.k_norm.weight if attention.qk_norm else None
            query = rotate_and_store(layer.qkv(x), cos, sin, places, keys, values, query_norm, key_norm, eps)
            seen = paged_attention(query, keys, values, segments, scale, tiles).flatten(1)
            if index == len(self.layers) - 1:
                # Its keys and values are stored; the rest serves the logits alone.
                seen, residual = seen[rows], residual[rows]
            delta = layer.out(seen)
            x = self._add_norm(residual, delta, block.post_attention_layernorm.weight)
            delta = layer.down(layer.gate_up(x))
        assert delta is not None
        return self._add_norm(residual, delta, self.decoder.model.norm.weight)

    def _add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """residual += delta in place, and its norm; in a group every rank's delta is a term of what is added."""
        if delta is not None and self.group.size > 1:
            residual += self.group.sum(delta)
            delta = None
        return add_rms_norm(residual, delta, weight, self.config.rms_norm_eps)

    def _buffer(self, rows: int, like: Tensor) -> Tensor | None:
        """Where the logits go. On a CPU the page faults of a fresh tensor cost a third of the product."""
        if like.device.type != "cpu":
            return None
        if self._logits is None or len(self._logits) < rows:
            self._logits = like.new_empty((rows, self.config.vocab_size), dtype=torch.float32)
        return self._logits[:rows]
