"""A bf16 linear layer for CPU inference whose weight is laid out once, not again at every call.

On a CPU with AVX-512 BF16 the compiled product of `linear_fp32` reads tiles made once. Where there are matrix units
(AMX), which it does not use, oneDNN's product does, with the weight in oneDNN's own blocks: torch reaches that
layout only through operators with a leading underscore (its own compiler's), so a weight is packed so only where they
exist and pass a trial. Elsewhere this is F.linear, and says so.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from metareward_kernels.dispatch import ENVIRONMENT_VARIABLE, implementation
from metareward_kernels.fused_rows import silu_mul
from metareward_kernels.linear_fp32 import pack_bf16_weight, packed_bf16_linear


def _pack(weight: Tensor) -> Tensor:
    # Without a number of rows oneDNN picks a layout that serves all; measured, it is as fast as one made for a batch.
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def why_not_packed(weight: Tensor) -> str | None:
    """What keeps a weight [N,K] from being packed here (a phrase), or None."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "torch":
        return f"{ENVIRONMENT_VARIABLE}=torch"
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return f"only bfloat16 on the CPU is packed, not {weight.dtype} on {weight.device.type}"
    if weight.numel() == 0:
        return "the weight is empty"
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 arithmetic on this CPU"
        trial = _packed_linear(weight.new_ones(1, 16), _pack(weight.new_ones(16, 16)), None)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} has no packed linear operator: {error}"
    return None if bool((trial == 16.0).all()) else "a trial of the packed linear operator gave wrong numbers"


def has_tiles(weight: Tensor) -> bool:
    """Whether the compiled product is the one for this weight."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.numel() == 0:
        return False
    if torch.cpu._is_amx_tile_supported():
        return False
    return implementation("linear_fp32") == "cpp"


class PackedLinear:
    """x [..., K] -> x @ weight.T + bias [..., N]; made by `pack_linear`. Not differentiable.

    A copy of the weight of that moment: pack again after a change. implementation: "cpp" for the compiled product,
    "onednn", or "torch" for F.linear; reason: why it is not packed, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._shape = tuple(weight.shape)
        self._bias = None if bias is None else bias.detach()
        self.reason: str | None = None
        if has_tiles(weight):
            self.implementation = "cpp"
            self._weight = pack_bf16_weight(weight.detach())
            return
        self.reason = why_not_packed(weight)
        self.implementation = "onednn" if self.reason is None else "torch"
        self._weight = _pack(weight.detach()) if self.reason is None else weight.detach()

    @property
    def tiles(self) -> Tensor | None:
        """The weight as the compiled product takes it, where that is all there is to the layer."""
        return self._weight if self.implementation == "cpp" and self._bias is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError for an x that does not fit the weight, TypeError for another dtype."""
        if x.shape[-1] != self._shape[1]:
            raise ValueError(f"x {list(x.shape)} does not fit a weight {list(self._shape)}")
        if x.dtype != self._weight.dtype:
            raise TypeError(f"x is {x.dtype}, the weight {self._weight.dtype}")
        if self.implementation == "torch":
            return F.linear(x, self._weight, self._bias)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self._shape[0])
        if self.implementation == "onednn":
            return _packed_linear(x, self._weight, self._bias)
        rows = x.reshape(-1, self._shape[1])
        if self._bias is None:
            out = packed_bf16_linear(rows, self._weight, self._shape[0])
        else:  # rounded once, after the sum
            wide = packed_bf16_linear(rows, self._weight, self._shape[0], dtype=torch.float32)
            out = wide.add_(self._bias).to(x.dtype)
        return out.view(*x.shape[:-1], self._shape[0])

    def __repr__(self) -> str:
        return f"PackedLinear({list(self._shape)}, {self.implementation})"


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack weight [N,K] (and bias [N]) for inference where that is possible; see `PackedLinear`.

    Costs a copy of the weight. Raises ValueError for other shapes, TypeError for a bias of another dtype.
    """
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"need weight [N,K] and bias [N], got {list(weight.shape)} and {None if bias is None else list(bias.shape)}"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"weight and bias differ in dtype: {weight.dtype} and {bias.dtype}")
    return PackedLinear(weight, bias)


class PackedGatedLinear:
    """x [..., K] -> silu(x @ gate.T) * (x @ up.T) [..., I]; made by `pack_gated_linear`. Not differentiable.

    Where the compiled product runs, the activation is part of it and the two products are not rounded in between;
    elsewhere `silu_mul` follows one product. implementation and reason: as of `PackedLinear`.
    """

    def __init__(self, gate_up: Tensor, bias: Tensor | None = None) -> None:
        self._size, self._inputs = gate_up.shape[0] // 2, gate_up.shape[1]
        self._tiles: Tensor | None = None
        self._linear: PackedLinear | None = None
        if bias is None and has_tiles(gate_up):
            halves = gate_up.detach().split(self._size)
            self._tiles = torch.stack([pack_bf16_weight(half) for half in halves], dim=1)
            self.implementation, self.reason = "cpp", None
            return
        self._linear = pack_linear(gate_up, bias)
        self.implementation, self.reason = self._linear.implementation, self._linear.reason

    @property
    def fused(self) -> bool:
        """Whether the activation is part of the product."""
        return self._tiles is not None

    @property
    def tiles(self) -> Tensor | None:
        """Gate and up as the compiled product takes them, where it runs."""
        return self._tiles

    @property
    def outputs(self) -> int:
        """I, the width of the result."""
        return self._size

    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError for an x that does not fit the weight, TypeError for another dtype."""
        if self._tiles is None:
            assert self._linear is not None
            both = self._linear(x)
            return silu_mul(both.view(-1, both.shape[-1])).view(*x.shape[:-1], self._size)
        if x.dtype != torch.bfloat16:
            raise TypeError(f"x is {x.dtype}, the weight torch.bfloat16")
        if x.shape[-1] != self._inputs:
            raise ValueError(f"x {list(x.shape)} does not fit a weight [{2 * self._size}, {self._inputs}]")
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        out = x.new_empty(len(rows), self._size)
        torch.ops.metareward.packed_gated_linear_cpp_.default(rows, self._tiles, out)
        return out.view(*x.shape[:-1], self._size)

    def __repr__(self) -> str:
        return f"PackedGatedLinear({self._size}, {self.implementation})"


def pack_gated_linear(gate_up: Tensor, bias: Tensor | None = None) -> PackedGatedLinear:
    """Pack gate and up [2I,K], gate first (and bias [2I]), for inference; see `PackedGatedLinear`.

    Costs a copy of the weight. Raises ValueError for other shapes, TypeError for a bias of another dtype.
    """
    if (
        gate_up.dim() != 2
        or gate_up.shape[0] % 2 != 0
        or (bias is not None and bias.shape != gate_up.shape[:1])
    ):
        raise ValueError(
            f"need gate_up [2I,K] and bias [2I], got {list(gate_up.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    if bias is not None and bias.dtype != gate_up.dtype:
        raise TypeError(f"weight and bias differ in dtype: {gate_up.dtype} and {bias.dtype}")
    return PackedGatedLinear(gate_up, bias)
