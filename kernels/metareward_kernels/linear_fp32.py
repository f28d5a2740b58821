"""x @ weight.T of 16-bit numbers with the fp32 sums kept: the head's logits, in the sampler and in the trainer.

A bf16 logit near 20 is rounded to steps of 1/8, so log-probs from bf16 logits are off by some hundredths of a nat, and
sampler and trainer disagree. FLOP: 2TNK. Bytes: 2(TK + NK) read, 4TN written, whose page faults cost as much as a
third of the product when the result is fresh: pass `out` where a buffer can be kept.

On a CPU with AVX-512 BF16 the compiled kernel runs. It reads weights in tiles, made ready once by `pack_bf16_weight`
or on the way; a row of the result depends on that row of x and the weights alone, not on T or the number of threads.
On a GPU torch.mm has an output dtype (that path has never run on a GPU). Elsewhere the inputs are upcast, the weight
slab by slab. Not differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from metareward_kernels import dispatch

SLAB_ROWS = 4096  # weight rows upcast at a time: 9 MB at K = 576
TILE_ROWS = 48  # of the compiled kernel


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compiled(x: Tensor) -> bool:
    unsupported = None if x.dtype == torch.bfloat16 else f"the compiled op takes bfloat16, not {x.dtype}"
    return dispatch.implementation("linear_fp32", x.device.type, unsupported) == "cpp"


def _rows(x: Tensor) -> Tensor:
    """x, copied if need be, with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _upcast_in_slabs(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    wide = x.to(out.dtype)
    for start in range(0, weight.shape[0], SLAB_ROWS):
        slab = slice(start, start + SLAB_ROWS)
        out[:, slab] = F.linear(wide, weight[slab].to(out.dtype))
    return out


def _check(x: Tensor, rows: int, out: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if out is None:
        return
    if out.shape != (x.shape[0], rows) or out.dtype not in dtypes or out.device != x.device:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"out must be {names} [{x.shape[0]},{rows}] on {x.device}, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if out.numel() and (out.stride(1) != 1 or out.stride(0) < rows):
        raise ValueError("out is written in place: its rows must be contiguous and must not overlap")


def pack_bf16_weight(weight: Tensor) -> Tensor:
    """The tiles of weight [N,K] bfloat16, for `packed_bf16_linear` and `linear_fp32`; to be made anew when it changes.

    The result [ceil(N/48),ceil(K/2),48,2] bfloat16 is opaque, and as large as the weight up to padding.
    Raises TypeError or ValueError for another dtype or shape, RuntimeError where the compiled kernel cannot run
    (`implementation("linear_fp32")` tells).
    """
    if weight.dtype != torch.bfloat16:
        raise TypeError(f"weight must be bfloat16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"need weight [N,K], got {list(weight.shape)}")
    if not _compiled(weight):
        raise RuntimeError(
            f"packed weights need the compiled kernel and a CPU with AVX-512 BF16, not {weight.device}; "
            "use torch.nn.functional.linear"
        )
    return torch.ops.metareward.pack_bf16_weight_cpp.default(_rows(weight.detach()))


def packed_bf16_linear(
    x: Tensor,  # [T,K]
    packed: Tensor,
    rows: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,  # [T,N]
) -> Tensor:
    """x @ weight.T [T,N] with fp32 sums, rounded to `dtype` (float32 or bfloat16), from packed weights of N = `rows`.

    x [T,K] bfloat16 on the CPU, any strides. out: where to write, of its own dtype, contiguous rows at any distance.
    Raises TypeError, ValueError or RuntimeError for inputs that do not fit together.
    """
    if x.dtype != torch.bfloat16 or dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x must be bfloat16 and dtype float32 or bfloat16, got {x.dtype} and {dtype}")
    if x.dim() != 2 or packed.shape != (-(-rows // TILE_ROWS), (x.shape[1] + 1) // 2, TILE_ROWS, 2):
        raise ValueError(
            f"x {list(x.shape)} does not fit packed weights {list(packed.shape)} of {rows} rows; "
            "pass x [T,K] and what pack_bf16_weight made of a weight [rows,K]"
        )
    _check(x, rows, out, (torch.float32, torch.bfloat16))
    if out is None:
        out = torch.empty(x.shape[0], rows, dtype=dtype)
    torch.ops.metareward.packed_linear_cpp_.default(_rows(x), packed, out)
    return out


def linear_fp32(
    x: Tensor,  # [T,K]
    weight: Tensor,  # [N,K]
    *,
    packed: Tensor | None = None,
    out: Tensor | None = None,  # [T,N]
) -> Tensor:
    """x @ weight.T [T,N] in float32 (float64 for float64 inputs), not rounded to the inputs' dtype on the way.

    x [T,K] and weight [N,K] of one floating dtype, any strides. packed: what `pack_bf16_weight` made of the weight;
    without it the compiled kernel packs on the way, 2 % slower at T = 1024 and 10 % at 264. out: a buffer of the
    result's dtype, contiguous rows at any distance, which is written and returned.
    Raises TypeError or ValueError for inputs that do not fit together.
    """
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise TypeError(f"x and weight must have one floating dtype, got {x.dtype} and {weight.dtype}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"need x [T,K] and weight [N,K], got {list(x.shape)} and {list(weight.shape)}")
    x, weight = x.detach(), weight.detach()
    rows, dtype = weight.shape[0], _result_dtype(x.dtype)
    _check(x, rows, out, (dtype,))
    if packed is not None:
        return packed_bf16_linear(x, packed, rows, dtype=torch.float32, out=out)
    if out is None:
        out = torch.empty(x.shape[0], rows, dtype=dtype, device=x.device)
    if x.dtype == dtype:
        return torch.mm(x, weight.T, out=out)
    # cuBLAS, whatever METAREWARD_KERNELS asks of the ops that have kernels of ours.
    if x.device.type == "cuda":
        return torch.mm(x, weight.T, out_dtype=dtype, out=out)
    if _compiled(x):
        torch.ops.metareward.bf16_linear_cpp_.default(_rows(x), _rows(weight), out)
        return out
    return _upcast_in_slabs(x, weight, out)
