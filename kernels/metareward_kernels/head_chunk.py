"""A head's forward pass and gradients on a chunk of C tokens, each token's gradient known up to one factor.

The gradient of a log-prob by its logits is onehot - p, and a loss of summed log-probs only gives each row a factor. So the
residual onehot - p is made, and rounded, as soon as the row's log-sum-exp is known; the factor is applied to rows of
the hidden gradient, and to the hidden states before the weight gradient. Three products, and one pass over the logits.

bf16 on a CPU with AVX-512 BF16: `csrc/cpu/linear_softmax.cpp`, which holds exponentials (bf16) and no logits. Otherwise:
PyTorch's products around `head_rows`. CPU logits are in fp32; CUDA logits in the inputs' dtype, and over them the
residual (that path has never run on a GPU).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metareward_kernels import dispatch
from metareward_kernels.fresh_memory import fresh
from metareward_kernels.head_rows import (
    RowLogprobs,
    accumulation_dtype,
    logprob_rows,
    softmax_residual_rows_,
)
from metareward_kernels.linear_fp32 import linear_fp32

PANEL = 64  # vocabulary entries of a panel of the compiled kernel
SLAB_ROWS = 16384  # rows of the weight's gradient at a time where it is summed outside of the product
HALF_SCALE = 256.0  # of float16 residuals: most probabilities lie below its normal numbers


class Residual(NamedTuple):
    """scale * rows = onehot - p of a chunk."""

    rows: Tensor  # [C,V], or panels [ceil(V/64),C,64] from the compiled kernel
    scale: Tensor | float  # [C] float32, or one for all rows


class Head:
    """Weight, bias and temperature of a head, with buffers for chunks of up to `rows` tokens. No autograd."""

    def __init__(
        self,
        weight: Tensor,  # [V,H]
        bias: Tensor | None,  # [V]
        temperature: float,
        entropy: bool,
        rows: int,
    ) -> None:
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.temperature, self.entropy = temperature, entropy
        self.dtype = accumulation_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.panels = runs_compiled(weight)
        self._rows = rows
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, dtype: torch.dtype, rows: int) -> Tensor:
        """[rows,V] of a buffer that is kept: fresh memory costs as much as arithmetic."""
        if name not in self._buffers:
            vocabulary = self.weight.shape[0]
            if name == "panels":
                vocabulary = -(-vocabulary // PANEL) * PANEL
            self._buffers[name] = fresh([self._rows * vocabulary], dtype, self.weight.device)
        if name == "panels":
            size = -(-self.weight.shape[0] // PANEL) * PANEL * rows
            return self._buffers[name][:size].view(-1, rows, PANEL)
        return self._buffers[name][: rows * self.weight.shape[0]].view(rows, -1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[C,V] with bias: fp32 (float64 for float64) on the CPU, the inputs' dtype on CUDA."""
        if hidden.device.type == "cuda":
            logits = self._buffer("logits", hidden.dtype, hidden.shape[0])
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            logits = self._buffer("logits", self.dtype, hidden.shape[0])
            linear_fp32(hidden, self.weight, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def _linear_softmax(
        self, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> tuple[RowLogprobs, Tensor]:
        logprobs, lse, entropy, scale = torch.ops.metareward.linear_softmax_cpp_(
            hidden, self.weight, self.bias, targets.contiguous(), self.temperature, self.entropy, out
        )
        return RowLogprobs(logprobs, lse, entropy if self.entropy else None), scale

    def logprobs(self, hidden: Tensor, targets: Tensor) -> RowLogprobs:
        """One product. hidden [C,H], C at most the head's rows; targets [C]."""
        if self.panels:
            return self._linear_softmax(_rows(hidden), targets, None)[0]
        return logprob_rows(self._logits(hidden), targets, self.temperature, self.entropy)

    def residual(self, hidden: Tensor, targets: Tensor) -> tuple[RowLogprobs, Residual]:
        """One product; what it returns is in the head's buffers, until the next call."""
        if self.panels:
            panels = self._buffer("panels", torch.bfloat16, hidden.shape[0])
            found, scale = self._linear_softmax(_rows(hidden), targets, panels)
            return found, Residual(panels, scale)
        logits = self._logits(hidden)
        out = (
            None if logits.dtype == hidden.dtype else self._buffer("residual", hidden.dtype, hidden.shape[0])
        )
        factor = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        found = softmax_residual_rows_(logits, targets, self.temperature, self.entropy, out, factor)
        return found, Residual(logits if out is None else out, 1.0 / factor)

    def times_weight(self, residual: Residual) -> Tensor:
        """residual.rows @ weight [C,H], unscaled; float32 from the compiled kernel, else the weight's dtype."""
        if not self.panels:
            return residual.rows @ self.weight
        out = torch.empty(residual.rows.shape[1], self.weight.shape[1])
        torch.ops.metareward.panels_times_weight_cpp_(residual.rows, self.weight, out)
        return out

    def factors(self, residual: Residual, coefficient: Tensor) -> Tensor:
        """[C] by which residual.rows are the gradient of sum(coefficient * logprobs) by the logits."""
        return (coefficient * residual.scale / self.temperature).to(self.dtype)

    def add_weight_gradient_(
        self,
        residual: Residual,
        hidden: Tensor,
        factors: Tensor,
        total: Tensor,
        total_bias: Tensor | None,
        first: bool,
    ) -> None:
        """total [V,H] (+)= residual.rows.T @ (factors * hidden), total_bias [V] (+)= residual.rows.T @ factors.

        Both totals are in fp32 (float64); `first` overwrites them.
        """
        if self.panels:
            torch.ops.metareward.add_panels_times_hidden_cpp_(
                residual.rows, _rows(hidden), factors, not first, total, total_bias
            )
            return
        if total_bias is not None:
            if first:
                total_bias.zero_()
            for part in _slabs(total_bias.shape[0]):
                total_bias[part] += residual.rows[:, part].to(self.dtype).T @ factors
        if total.dtype == hidden.dtype:
            total.addmm_(residual.rows.T, factors[:, None] * hidden, beta=0.0 if first else 1.0)
            return
        # Factors of a mean over many pairs are small: in units of the largest they stay inside of float16.
        unit = factors.abs().amax().clamp_min(torch.finfo(factors.dtype).tiny)
        scaled = ((factors / unit)[:, None] * hidden).to(hidden.dtype).T
        if first:
            total.zero_()
        for part in _slabs(total.shape[0]):
            total[part] += linear_fp32(residual.rows[:, part].T, scaled).mul_(unit)


def runs_compiled(weight: Tensor) -> bool:
    """Whether the compiled kernel runs. It takes bf16 of an even width on the CPU."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.shape[1] % 2 != 0:
        return False
    return dispatch.implementation("linear_softmax") == "cpp"


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _slabs(rows: int) -> list[slice]:
    return [slice(start, min(start + SLAB_ROWS, rows)) for start in range(0, rows, SLAB_ROWS)]
