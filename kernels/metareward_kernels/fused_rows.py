"""What lies between the matrix products of a decoder layer, for inference: residual and norm, rotary embedding and the
write to the cache, gated activation.

Each is bound by memory; plain PyTorch makes 3 to 12 passes where one is enough. Elements read and written per token:
add_rms_norm 2H + 2H, rotate_and_store twice (Hq + 2 Hk) D, silu_mul 3I. Arithmetic is fp32 (fp64 for fp64) and each
result is rounded once. Not differentiable.

These run several times a layer, so nothing stands between a call and its kernel: the compiled op, whose schema says
what it writes, the Triton launcher, or plain PyTorch. A Python custom op around them would cost 20 us a call, 2 ms a
step of 30 layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metareward_kernels import dispatch


def _chosen(op: str, x: Tensor) -> str:
    return dispatch.implementation(
        op, x.device.type, lambda implementation: dispatch.unsupported_dtype(implementation, x.dtype)
    )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """x, copied if need be, with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension of x, which is in the compute dtype already."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight


def add_rms_norm_torch(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The PyTorch path of `add_rms_norm`."""
    if delta is not None:
        residual += delta
    return _normed(residual.to(_compute_dtype(residual.dtype)), weight, eps).to(weight.dtype)


def add_rms_norm(
    residual: Tensor,  # [T,H]
    delta: Tensor | None,  # [T,H]
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:
    """residual += delta in place (delta None: nothing is added); returns its RMS norm times weight, [T,H].

    residual [T,H] with a contiguous last dimension, delta [T,H] and weight [H], all of one floating dtype, or a float32
    residual with delta and weight of 16 bits: then nothing of the residual is rounded to bf16. The result has the
    weight's dtype. The norm is that of the residual as it is stored, so the result is that of an addition and a norm
    done apart.
    Raises TypeError or ValueError for inputs that do not fit together.
    """
    if residual.dtype != weight.dtype and not (
        residual.dtype == torch.float32 and weight.dtype.itemsize == 2
    ):
        raise TypeError(
            f"residual and weight differ in dtype: {residual.dtype} and {weight.dtype}; "
            "only a float32 residual goes with a weight of 16 bits"
        )
    if delta is not None and delta.dtype != weight.dtype:
        raise TypeError(f"delta and weight differ in dtype: {delta.dtype} and {weight.dtype}")
    if residual.dim() != 2 or (delta is not None and delta.shape != residual.shape):
        raise ValueError(
            "need residual and delta [T,H] of one shape, got "
            f"{list(residual.shape)} and {None if delta is None else list(delta.shape)}"
        )
    if weight.shape != residual.shape[1:]:
        raise ValueError(f"need weight [{residual.shape[1]}], got {list(weight.shape)}")
    if residual.shape[1] > 1 and residual.stride(1) != 1:
        raise ValueError(
            "the last dimension of the residual, which is written in place, must be contiguous; "
            "pass residual.contiguous()"
        )
    chosen = _chosen("add_rms_norm", weight)
    if chosen == "cpp":
        delta = None if delta is None else _rows(delta)
        return torch.ops.metareward.add_rms_norm_cpp_.default(residual, delta, weight.contiguous(), eps)
    if chosen == "triton":
        from metareward_kernels.triton_fused_rows import add_rms_norm_triton

        return add_rms_norm_triton(residual, delta, weight, eps)
    return add_rms_norm_torch(residual, delta, weight, eps)


def rotate_and_store_torch(
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
    """The PyTorch path of `rotate_and_store`."""
    page, kv_heads, dim = key_pages.shape[1:]
    heads = qkv.reshape(qkv.shape[0], qkv.shape[1] // dim, dim)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    rotated = []
    for x, weight in ((query, q_norm_weight), (key, k_norm_weight)):
        x = x.to(_compute_dtype(qkv.dtype))
        if weight is not None:
            x = _normed(x, weight, eps)
        rotated.append(torch.addcmul(x * cos, x.roll(dim // 2, dims=-1), sin.to(x.dtype)).to(qkv.dtype))
    where = (slots // page, slots % page)
    key_pages.index_put_(where, rotated[1])
    value_pages.index_put_(where, value)
    return rotated[0]


def _check_slots(slots: Tensor, key_pages: Tensor) -> None:
    capacity = key_pages.shape[0] * key_pages.shape[1]
    if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= capacity):
        raise IndexError(
            f"slots span [{int(slots.min())}, {int(slots.max())}], outside the cache's [0, {capacity - 1}]"
        )


def rotate_and_store(
    qkv: Tensor,  # [T,(Hq+2Hk)*D]
    cos: Tensor,  # [T,1,D]
    sin: Tensor,  # [T,1,D]
    slots: Tensor,  # [T]
    key_pages: Tensor,  # [P,page,Hk,D]
    value_pages: Tensor,  # [P,page,Hk,D]
    q_norm_weight: Tensor | None = None,  # [D]
    k_norm_weight: Tensor | None = None,  # [D]
    eps: float = 1e-6,
) -> Tensor:
    """Rotate a layer's queries and keys (rotary embedding) and write its keys and values to the cache.

    qkv [T,(Hq+2Hk)*D]: each token's query heads, then key heads, then value heads. cos and sin [T,1,D] in qkv's dtype
    or float32, the first half of sin negated: channels i and i + D/2 form a pair, D even. slots [T] int64, distinct
    but where nobody reads: page * page_size + offset. key_pages, value_pages [P,page,Hk,D] in qkv's dtype, any
    strides but a contiguous last dimension, are written in place. q_norm_weight, k_norm_weight [D] in qkv's
    dtype: an RMS norm of each head before its rotation (Qwen3). Returns the queries [T,Hq,D] in qkv's dtype.
    Raises TypeError, ValueError or (on the CPU) IndexError for inputs that do not fit together.
    """
    same = [key_pages, value_pages, *(w for w in (q_norm_weight, k_norm_weight) if w is not None)]
    if any(x.dtype != qkv.dtype for x in same):
        raise TypeError(
            f"qkv, pages and norm weights differ in dtype: {[qkv.dtype, *(x.dtype for x in same)]}"
        )
    if cos.dtype != sin.dtype or cos.dtype not in (qkv.dtype, torch.float32):
        raise TypeError(f"cos and sin must be {qkv.dtype} or float32, got {cos.dtype} and {sin.dtype}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    if qkv.dim() != 2 or key_pages.dim() != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            "need qkv [T,(Hq+2Hk)*D] and key_pages, value_pages [P,page,Hk,D], got "
            f"{list(qkv.shape)}, {list(key_pages.shape)}, {list(value_pages.shape)}"
        )
    tokens, (kv_heads, dim) = qkv.shape[0], key_pages.shape[2:]
    if dim == 0 or dim % 2 or qkv.shape[1] % dim or qkv.shape[1] // dim <= 2 * kv_heads:
        raise ValueError(
            f"qkv {list(qkv.shape)} does not hold query, key and value heads for pages {list(key_pages.shape)}; "
            "D must be even"
        )
    if cos.shape != (tokens, 1, dim) or sin.shape != cos.shape or slots.shape != (tokens,):
        raise ValueError(
            f"need cos, sin [{tokens},1,{dim}] and slots [{tokens}], got "
            f"{list(cos.shape)}, {list(sin.shape)} and {list(slots.shape)}"
        )
    if any(w is not None and w.shape != (dim,) for w in (q_norm_weight, k_norm_weight)):
        raise ValueError(f"q_norm_weight and k_norm_weight must be [{dim}]")
    if key_pages.stride(3) != 1 or value_pages.stride(3) != 1:
        raise ValueError("the last dimension of key_pages and value_pages must be contiguous")
    chosen = _chosen("rotate_and_store", qkv)
    if chosen == "cpp":
        try:
            return torch.ops.metareward.rotate_and_store_cpp_.default(
                _rows(qkv),
                cos.contiguous(),
                sin.contiguous(),
                slots.contiguous(),
                key_pages,
                value_pages,
                None if q_norm_weight is None else q_norm_weight.contiguous(),
                None if k_norm_weight is None else k_norm_weight.contiguous(),
                eps,
            )
        except RuntimeError:  # the stable ABI knows no IndexError
            _check_slots(slots, key_pages)
            raise
    if qkv.device.type == "cpu":  # elsewhere the check would wait for the device at every layer
        _check_slots(slots, key_pages)
    if chosen == "triton":
        from metareward_kernels.triton_fused_rows import rotate_and_store_triton

        return rotate_and_store_triton(
            qkv, cos, sin, slots, key_pages, value_pages, q_norm_weight, k_norm_weight, eps
        )
    return rotate_and_store_torch(
        qkv, cos, sin, slots, key_pages, value_pages, q_norm_weight, k_norm_weight, eps
    )


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """The PyTorch path of `silu_mul`."""
    gate, up = gate_up.to(_compute_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T,2I] = [gate, up], a floating dtype: [T,I].

    Raises TypeError or ValueError for another dtype or shape.
    """
    if not gate_up.is_floating_point():
        raise TypeError(f"gate_up must be of a floating dtype, got {gate_up.dtype}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"need gate_up [T,2I], got {list(gate_up.shape)}")
    chosen = _chosen("silu_mul", gate_up)
    if chosen == "cpp":
        return torch.ops.metareward.silu_mul_cpp.default(_rows(gate_up))
    if chosen == "triton":
        from metareward_kernels.triton_fused_rows import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_torch(gate_up)
