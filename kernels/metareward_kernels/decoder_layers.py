"""All layers of a decoder in one call, for inference on a CPU with AVX-512 BF16.

What a layer does is the ops of `fused_rows`, `packed_linear` and `paged_attention`, one after the other; called one by
one from Python, eight a layer, they leave all threads but one idle in between. The numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.fused_rows import _check_slots
from metareward_kernels.packed_linear import PackedGatedLinear, PackedLinear
from metareward_kernels.paged_attention import Segments, _check_indices


class LayerWeights(NamedTuple):
    """One layer: norms [H] in bfloat16, packed products, and the norms [D] of query and key heads (Qwen3) or None."""

    input_norm: Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: Tensor
    gate_up: PackedGatedLinear
    down: PackedLinear
    query_norm: Tensor | None
    key_norm: Tensor | None


class LayerStack(NamedTuple):
    """The weights of all layers as the compiled op takes them; made by `stack_layers`."""

    weights: list[Tensor]
    head_norms: list[Tensor]
    norm: Tensor
    intermediate: int


def stack_layers(layers: Sequence[LayerWeights], norm: Tensor) -> LayerStack | None:
    """What `decoder_layers` runs on, or None where it cannot: a product without tiles or with a bias, or no layers.

    norm [H]: the norm after the last layer. Tensors are shared, not copied.
    """
    weights, head_norms = [], []
    for layer in layers:
        tiles = [layer.qkv.tiles, layer.out.tiles, layer.gate_up.tiles, layer.down.tiles]
        norms = [layer.query_norm, layer.key_norm]
        if any(part is None for part in tiles) or (norms[0] is None) != (norms[1] is None):
            return None
        qkv, out, gate_up, down = tiles
        weights += [layer.input_norm, qkv, out, layer.post_norm, gate_up, down]
        head_norms += [part for part in norms if part is not None]
    if not weights or len(head_norms) not in (0, 2 * len(layers)):
        return None
    parts = [part.detach() for part in weights if part is not None]
    return LayerStack(parts, [part.detach() for part in head_norms], norm.detach(), layers[0].gate_up.outputs)


def runs_here(stack: LayerStack | None) -> bool:
    """Whether `decoder_layers` is the way to go: there is a stack, and METAREWARD_KERNELS does not say otherwise."""
    return stack is not None and dispatch.implementation("decoder_layers") == "cpp"


def decoder_layers(
    residual: Tensor,  # [T,H]
    cos: Tensor,  # [T,1,D]
    sin: Tensor,  # [T,1,D]
    slots: Tensor,  # [T]
    key_pages: Sequence[Tensor],  # layers x [P,page,Hk,D]
    value_pages: Sequence[Tensor],  # layers x [P,page,Hk,D]
    segments: Segments,
    stack: LayerStack,
    logit_rows: Tensor,  # [R]
    query_heads: int,
    eps: float,
    scale: float,
) -> Tensor:
    """Hidden states [R,H] bfloat16 of rows ``logit_rows`` after all layers and the last norm.

    residual [T,H] float32, contiguous: the embedded inputs; overwritten. cos, sin, slots and the pages, bfloat16, are
    those of `rotate_and_store`, segments and scale those of `paged_attention`; the pages of all layers have the same
    strides. Keys and values of all T tokens are written; the last layer's output is computed for logit_rows alone.
    Not differentiable. Only where `runs_here`. Raises RuntimeError or IndexError for inputs that do not fit together.
    """
    try:
        return torch.ops.metareward.decoder_layers_cpp_.default(
            residual,
            cos.contiguous(),
            sin.contiguous(),
            slots.contiguous(),
            list(key_pages),
            list(value_pages),
            *(part.contiguous() for part in segments),
            stack.weights,
            stack.head_norms,
            stack.norm,
            logit_rows.contiguous(),
            query_heads,
            stack.intermediate,
            eps,
            scale,
        )
    except RuntimeError:  # the stable ABI knows no IndexError
        _check_slots(slots, key_pages[0])
        _check_indices(residual, key_pages[0], segments)
        raise
