"""Shapes of the compiled ops for fake tensors, so that torch.compile and torch.library.opcheck can trace them.

Their schemas are in csrc/ops.cpp; this is registered once, after the library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metareward_kernels.segment_gradient import register_gradient


def _floats(like: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device=like.device)


def _keyed_uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    return torch.empty(keys.shape, dtype=torch.float64, device=keys.device)


def _paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_ids: Tensor,
    page_starts: Tensor,
    lengths: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    limits: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        torch.empty(rows, dtype=torch.int64, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
    )


def _logprob_rows(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
    )


def _logprob_entropy_rows(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return tuple(_floats(logits, logits.shape[0]) for _ in range(3))


def _add_logit_sums(
    logits: Tensor, targets: Tensor, first: int, temperature: float, entropy: bool, sums: Tensor
) -> None:
    return None


def _softmax_residual_rows(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool, out: Tensor | None
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return _floats(logits, rows), _floats(logits, rows), _floats(logits, rows if entropy else 0)


def _linear_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    out: Tensor | None,
) -> tuple[Tensor, ...]:
    rows = hidden.shape[0]
    return (
        _floats(hidden, rows),
        _floats(hidden, rows),
        _floats(hidden, rows if entropy else 0),
        _floats(hidden, rows),
    )


def _panels_times_weight(panels: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


def _add_panels_times_hidden(
    panels: Tensor,
    hidden: Tensor,
    coefficient: Tensor,
    accumulate: bool,
    out: Tensor,
    bias_out: Tensor | None,
) -> None:
    return None


def _scaled_bf16(x: Tensor, factor: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


def _logit_gradient_rows(
    logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, temperature: float, out: Tensor | None
) -> None:
    return None


def _add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)


def _rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    kv_heads, dim = key_pages.shape[2:]
    return torch.empty(
        (qkv.shape[0], qkv.shape[1] // dim - 2 * kv_heads, dim), dtype=qkv.dtype, device=qkv.device
    )


def _silu_mul(gate_up: Tensor) -> Tensor:
    return torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)


def _pack_bf16_weight(weight: Tensor) -> Tensor:
    rows, width = weight.shape
    return weight.new_empty((rows + 47) // 48, (width + 1) // 2, 48, 2)


def _segment_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, parents: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
    )


def _segment_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    parents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return query, key, value


def _linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


def _decoder_layers(
    residual: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_pages: list[Tensor],
    value_pages: list[Tensor],
    page_ids: Tensor,
    page_starts: Tensor,
    lengths: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    limits: Tensor,
    weights: list[Tensor],
    head_norms: list[Tensor],
    norm: Tensor,
    logit_rows: Tensor,
    query_heads: int,
    intermediate: int,
    eps: float,
    scale: float,
) -> Tensor:
    return norm.new_empty(logit_rows.shape[0], residual.shape[1])


def register() -> None:
    """Attach the fake implementations, and what autograd is to know, to the ops of the loaded library."""
    register_gradient()
    torch.library.register_fake("metareward::keyed_uniforms_cpp", _keyed_uniforms)
    torch.library.register_fake("metareward::paged_attention_cpp", _paged_attention)
    torch.library.register_fake("metareward::sample_tokens_cpp", _sample_tokens)
    torch.library.register_fake("metareward::logprob_rows_cpp", _logprob_rows)
    torch.library.register_fake("metareward::logprob_entropy_rows_cpp", _logprob_entropy_rows)
    torch.library.register_fake("metareward::add_logit_sums_cpp_", _add_logit_sums)
    torch.library.register_fake("metareward::softmax_residual_rows_cpp_", _softmax_residual_rows)
    torch.library.register_fake("metareward::logit_gradient_rows_cpp_", _logit_gradient_rows)
    torch.library.register_fake("metareward::linear_softmax_cpp_", _linear_softmax)
    torch.library.register_fake("metareward::panels_times_weight_cpp_", _panels_times_weight)
    torch.library.register_fake("metareward::add_panels_times_hidden_cpp_", _add_panels_times_hidden)
    torch.library.register_fake("metareward::scaled_bf16_cpp", _scaled_bf16)
    torch.library.register_fake("metareward::add_rms_norm_cpp_", _add_rms_norm)
    torch.library.register_fake("metareward::rotate_and_store_cpp_", _rotate_and_store)
    torch.library.register_fake("metareward::silu_mul_cpp", _silu_mul)
    torch.library.register_fake("metareward::pack_bf16_weight_cpp", _pack_bf16_weight)
    torch.library.register_fake("metareward::packed_linear_cpp_", _linear_into)
    torch.library.register_fake("metareward::packed_gated_linear_cpp_", _linear_into)
    torch.library.register_fake("metareward::segment_attention_cpp", _segment_attention)
    torch.library.register_fake("metareward::segment_attention_backward_cpp", _segment_attention_backward)
    torch.library.register_fake("metareward::bf16_linear_cpp_", _linear_into)
    torch.library.register_fake("metareward::decoder_layers_cpp_", _decoder_layers)
