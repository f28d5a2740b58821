"""The row passes of the head as CUDA C++ kernels (csrc/cuda): twins of `head_rows`, for float32, bfloat16 and float16.

Never run on a GPU, so off by default: only METAREWARD_KERNELS=cuda selects them, and only then is _CUDA.so loaded.
`logprob_rows` reads a logit once, `logit_gradient_rows_` reads and writes it once, `softmax_residual_rows_` does both
and reads it twice, once from the cache; 5 to 8 fp32 instructions a logit and pass.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def _logprob_rows_fake(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows if entropy else 0, dtype=torch.float32),
    )


def _softmax_residual_rows_fake(
    logits: Tensor, targets: Tensor, temperature: float, scale: float, entropy: bool, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _logprob_rows_fake(logits, targets, temperature, entropy)


def _logit_gradient_rows_fake(
    logits: Tensor, targets: Tensor, lse: Tensor, coefficient: Tensor, temperature: float, out: Tensor | None
) -> None:
    return None


@cache
def load_library() -> str | None:
    """Load _CUDA.so once a process; the reason why it is not there, or None when it is."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_CUDA.*"))
    if not found:
        return (
            f"no CUDA library in {folder}; build with "
            "`METAREWARD_CUDA=on pip install --no-build-isolation -e .` in the source folder"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:  # built for another torch, or a file cut short
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    torch.library.register_fake("metareward::logprob_rows_cuda", _logprob_rows_fake)
    torch.library.register_fake("metareward::softmax_residual_rows_cuda_", _softmax_residual_rows_fake)
    torch.library.register_fake("metareward::logit_gradient_rows_cuda_", _logit_gradient_rows_fake)
    return None


def logprob_rows(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    temperature: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob of each row's target, log-sum-exp and, where asked for, entropy: [C] float32 each.

    logits [C,V] contiguous, on CUDA; targets [C] int64, NaN for one outside [0, V): the GPU is not waited for.
    A row of -inf alone, or one that holds NaN or +inf, gives NaN. A row's result does not depend on the other rows.
    """
    logprobs, lse, entropies = torch.ops.metareward.logprob_rows_cuda(
        logits, targets.contiguous(), temperature, entropy
    )
    return logprobs, lse, entropies if entropy else None


def softmax_residual_rows_(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    temperature: float,
    entropy: bool,
    out: Tensor | None,  # [C,V]
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`logprob_rows`, and scale (onehot - softmax(logits / temperature)) over the logits, or in `out`, in one launch.

    Tensors as in `logprob_rows` and `logit_gradient_rows_`; logits stay as they are where `out` is given. The second
    read of a row is meant to be served by the cache: csrc/cuda/softmax_residual_rows.cu.
    """
    logprobs, lse, entropies = torch.ops.metareward.softmax_residual_rows_cuda_(
        logits, targets.contiguous(), temperature, scale, entropy, out
    )
    return logprobs, lse, entropies if entropy else None


def logit_gradient_rows_(
    logits: Tensor,  # [C,V]
    targets: Tensor,  # [C]
    lse: Tensor,  # [C]
    coefficient: Tensor,  # [C]
    temperature: float,
    out: Tensor | None,  # [C,V]
) -> Tensor:
    """coefficient (onehot - p) / temperature over the logits, or into `out`, bfloat16 or float16 of float32 logits.

    logits [C,V] and out contiguous, on CUDA; lse and coefficient [C] float32. A row whose target is outside [0, V) is
    NaN. Returns the tensor that was written.
    """
    torch.ops.metareward.logit_gradient_rows_cuda_(
        logits, targets.contiguous(), lse.contiguous(), coefficient.contiguous(), temperature, out
    )
    return logits if out is None else out
