"""The preference loss of token log-probs: sequence sums, log ratios, loss and rewards of each pair, one gradient a token.

On CUDA a fused Triton kernel each way (triton_dpo_loss.py), without waiting for the device. Elsewhere plain PyTorch on
`pair_losses`, which is the kernels' oracle and holds the only copy of the formulas outside of them: fp64 sums, checked indices.
4 T bytes read, 4 T written backward: where the log-probs come from a head, `linear_preference` needs no such op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metareward_kernels import dispatch, pair_losses

LOSSES = ("sigmoid", "ipo", "hinge")


class DpoLoss(NamedTuple):
    """S sequences, P pairs. Differentiable: losses and logprobs. Rewards are held constant, as is the reference."""

    losses: Tensor  # [P]
    logprobs: Tensor  # [S] sums over the sequences' tokens
    chosen_rewards: Tensor  # [P] beta log pi / pi_ref
    rejected_rewards: Tensor  # [P]
    margins: Tensor  # [P] chosen_rewards - rejected_rewards


def _check_values(tokens: int, cu_seqlens: Tensor, pairs: Tensor) -> None:
    rises = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or not rises:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens")
    sequences = len(cu_seqlens) - 1
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= sequences):
        raise IndexError(
            f"pairs name sequences [{int(pairs.min())}, {int(pairs.max())}] of [0, {sequences - 1}]"
        )


@torch.library.custom_op("metareward::sequence_sums", mutates_args=())
def _sequence_sums(logprobs: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """[S] sums in fp64, rounded once. An op, so that values can be checked under torch.compile as well."""
    _check_values(len(logprobs), cu_seqlens, pairs)
    sums = torch.segment_reduce(logprobs.double(), "sum", offsets=cu_seqlens.long(), initial=0.0)
    return sums.to(logprobs.dtype)


@_sequence_sums.register_fake
def _(logprobs: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    return torch.empty(cu_seqlens.shape[0] - 1, dtype=logprobs.dtype, device=logprobs.device)


def _sums_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.tokens = inputs[0].shape[0]


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    tokens = torch.arange(ctx.tokens, device=grad.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return grad[sequence], None, None


_sequence_sums.register_autograd(_sums_backward, setup_context=_sums_context)


@torch.library.custom_op("metareward::dpo_loss", mutates_args=())
def _dpo_loss(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    beta: float,
    loss: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernels: the fields of `DpoLoss`, and d loss / d log ratio [P]."""
    from metareward_kernels.triton_dpo_loss import dpo_loss_triton

    return dpo_loss_triton(logprobs, cu_seqlens, pairs, reference_logprobs, beta, loss, label_smoothing)


@_dpo_loss.register_fake
def _(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    beta: float,
    loss: str,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def vector(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.float32, device=logprobs.device)

    count = pairs.shape[0]
    return (
        vector(count),
        vector(cu_seqlens.shape[0] - 1),
        vector(count),
        vector(count),
        vector(count),
        vector(count),
    )


@torch.library.custom_op("metareward::dpo_loss_backward", mutates_args=())
def _dpo_loss_backward(
    grad_losses: Tensor, grad_sums: Tensor, slopes: Tensor, cu_seqlens: Tensor, pairs: Tensor, tokens: int
) -> Tensor:
    from metareward_kernels.triton_dpo_loss import dpo_loss_backward_triton

    return dpo_loss_backward_triton(grad_losses, grad_sums, slopes, cu_seqlens, pairs, tokens)


@_dpo_loss_backward.register_fake
def _(
    grad_losses: Tensor, grad_sums: Tensor, slopes: Tensor, cu_seqlens: Tensor, pairs: Tensor, tokens: int
) -> Tensor:
    return torch.empty(tokens, dtype=torch.float32, device=slopes.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, cu_seqlens, pairs = inputs[:3]
    ctx.save_for_backward(output[5], cu_seqlens, pairs)
    ctx.tokens = logprobs.shape[0]
    ctx.mark_non_differentiable(*output[2:])


def _backward(
    ctx: Any, grad_losses: Tensor, grad_sums: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.metareward.dpo_loss_backward(grad_losses, grad_sums, *ctx.saved_tensors, ctx.tokens)
    return gradient, None, None, None, None, None, None


_dpo_loss.register_autograd(_backward, setup_context=_setup_context)


def _pair_loss(loss: str, beta: float, label_smoothing: float) -> pair_losses.PairLoss:
    if loss == "sigmoid":
        return lambda pairs: pair_losses.dpo(pairs, beta=beta, label_smoothing=label_smoothing)
    formula: Callable[..., Tensor] = {"ipo": pair_losses.ipo, "hinge": pair_losses.hinge}[loss]
    return lambda pairs: formula(pairs, beta=beta)


def _dpo_loss_torch(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    beta: float,
    pair_loss: pair_losses.PairLoss,
) -> DpoLoss:
    sums = _sequence_sums(logprobs, cu_seqlens, pairs)
    lengths = cu_seqlens.diff()
    sides = [part[pairs[:, side]] for part in (sums, reference_logprobs, lengths) for side in (0, 1)]
    record = pair_losses.PairLogprobs(*sides)
    chosen_rewards = beta * record.chosen_ratio.detach()
    rejected_rewards = beta * record.rejected_ratio.detach()
    return DpoLoss(
        pair_loss(record), sums, chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards
    )


def _implementation(device: str, dtype: torch.dtype) -> str:
    def unsupported(which: str) -> str | None:
        return None if dtype == torch.float32 else f"the Triton kernel takes float32, not {dtype}"

    return dispatch.implementation("dpo_loss", device, unsupported)


def _check(logprobs: Tensor, cu_seqlens: Tensor, pairs: Tensor, reference_logprobs: Tensor) -> None:
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprobs must be float32 or float64, got {logprobs.dtype}; pass logprobs.float()")
    if reference_logprobs.dtype != logprobs.dtype:
        raise TypeError(
            f"reference_logprobs must be {logprobs.dtype} as logprobs are, got {reference_logprobs.dtype}"
        )
    for name, part in (("cu_seqlens", cu_seqlens), ("pairs", pairs)):
        if part.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {part.dtype}")
        if part.device != logprobs.device:
            raise ValueError(f"logprobs are on {logprobs.device}, {name} on {part.device}; move one of them")
    if reference_logprobs.device != logprobs.device:
        raise ValueError(
            f"logprobs are on {logprobs.device}, reference_logprobs on {reference_logprobs.device}; move one of them"
        )
    if logprobs.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"need logprobs [T] and cu_seqlens [S+1], got {list(logprobs.shape)} and {list(cu_seqlens.shape)}"
        )
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"need pairs [P,2] of (chosen, rejected) sequences, got {list(pairs.shape)}")
    sequences = cu_seqlens.shape[0] - 1
    if reference_logprobs.dim() != 1 or reference_logprobs.shape[0] != sequences:
        raise ValueError(
            f"need one reference log-prob a sequence, got {list(reference_logprobs.shape)} for {sequences} sequences"
        )
    if sequences == 0 and pairs.shape[0] > 0:
        raise IndexError(f"{pairs.shape[0]} pairs, but no sequences that they could name")


def dpo_loss(
    logprobs: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    pairs: Tensor,  # [P,2]
    reference_logprobs: Tensor,  # [S]
    *,
    beta: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> DpoLoss:
    """Loss and rewards of pairs of packed sequences, from their tokens' log-probs.

    logprobs [T] float32 (or float64, in PyTorch), sequence after sequence, in nats; cu_seqlens [S+1] int32 or int64, where each
    begins, rising from 0 to T; pairs [P,2] int32 or int64: the sequences chosen and rejected; reference_logprobs [S] in
    logprobs' dtype: the sequences' sums under the reference policy. loss: "sigmoid" (DPO; label_smoothing in [0, 0.5)), "ipo" or
    "hinge", as in `pair_losses`. Any strides. A sequence may be empty, in no pair, or in several: the gradients that its pairs
    ask for are added in a fixed order. Two runs are bitwise equal.
    Returns `DpoLoss`; averaging is the caller's.
    Raises TypeError or ValueError for other dtypes, shapes or settings; off CUDA also ValueError for cu_seqlens that do not
    rise to T and IndexError for a pair outside [0, S). The CUDA kernel does not wait for the device to say so: it reads
    nothing outside, and such a pair's loss is NaN.
    """
    _check(logprobs, cu_seqlens, pairs, reference_logprobs)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if not beta > 0.0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f'label_smoothing works with loss="sigmoid" only, not {loss!r}; set it to 0')
    reference_logprobs = reference_logprobs.detach()
    if _implementation(logprobs.device.type, logprobs.dtype) == "triton":
        found = _dpo_loss(
            logprobs, cu_seqlens, pairs, reference_logprobs, float(beta), loss, float(label_smoothing)
        )
        return DpoLoss(*found[:5])
    pair_loss = _pair_loss(loss, beta, label_smoothing)
    return _dpo_loss_torch(logprobs, cu_seqlens, pairs, reference_logprobs, beta, pair_loss)
