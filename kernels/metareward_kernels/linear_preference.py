"""A preference loss and all its gradients straight from hidden states, in three matrix products.

Eager training holds [T,V] logits, their log-softmax and two gradients of it: 8 GB each at T = 16,384, V = 128,256. Chunked
heads avoid that by computing logits twice, four products or five. Here whole pairs are packed into a chunk. Each row's
onehot - softmax is made and rounded right after its log-sum-exp, before the loss is known, because the loss gives the row
one factor only, which goes onto the rows of the two gradient products (`head_chunk.py`).

FLOP: 6THV (logits and two gradients); 4THV with a frozen head or frozen hidden states, 2THV under no_grad, 8THV for the
tokens of pairs longer than a chunk. Bytes beyond inputs and gradients, for a chunk of C tokens: 2CV in bf16 on a CPU with
AVX-512 BF16, where logits are never stored; else 4CV in fp32, 6CV for 16-bit inputs; 2CV on CUDA; and the weight's
gradient in fp32, 4VH. Gradients are computed by the forward call and scaled in the backward pass.
The CUDA path has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metareward_kernels.fresh_memory import fresh
from metareward_kernels.head_chunk import Head
from metareward_kernels.pair_losses import PairLoss
from metareward_kernels.preference_inputs import check_layout, check_tensors, check_vector
from metareward_kernels.preference_pass import Pass, Problem, sum_segments

CPU_CHUNK_TOKENS = 576
CUDA_CHUNK_TOKENS = 4096


def chunk_size(device: torch.device) -> int:
    """Tokens of a chunk on this device where the caller does not say."""
    return CPU_CHUNK_TOKENS if device.type == "cpu" else CUDA_CHUNK_TOKENS


class Preference(NamedTuple):
    """P pairs of S sequences. Only `loss` is differentiable."""

    loss: Tensor  # [] float32 (float64 for float64 inputs): sum of pair_weights * losses
    losses: Tensor  # [P] float64, as all that follow but entropy and accuracy
    logprobs: Tensor  # [S] log-prob of every sequence, summed over its tokens, in nats
    chosen_rewards: Tensor  # [P] beta log pi / pi_ref, as `dpo_loss` returns them
    rejected_rewards: Tensor  # [P]
    margins: Tensor  # [P] chosen_rewards - rejected_rewards
    accuracy: Tensor  # [P] float32: 1 where the margin is above 0
    entropy: Tensor | None  # [S] mean of a sequence's tokens in nats, 0 for an empty one; where asked for


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        problem: Problem,
        temperature: float,
        entropy: bool,
        chunk_tokens: int,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight, bias, temperature, entropy, min(chunk_tokens, hidden.shape[0]))
            run = Pass(problem, hidden, targets, head, chunk_tokens)
            if need[1] or need[2]:
                run.all_gradients(need[0], need[2])
            elif need[0]:
                run.hidden_gradient()
            else:
                run.all_logprobs()
            losses = problem.losses(problem.record(run.logprobs)).double()
        loss = (losses * problem.pair_weights).sum().to(head.dtype)
        ctx.save_for_backward(run.grad_hidden, run.grad_weight if need[1] else None, run.grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.compiled = head.panels
        mean = torch.empty(0)
        if run.token_entropy is not None:
            mean = sum_segments(run.token_entropy.double(), problem.lengths) / problem.tokens.clamp_min(1.0)
        ctx.mark_non_differentiable(losses, run.logprobs, mean)
        return loss, losses, run.logprobs, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if x is None else _scaled(x, grad, dtype, ctx.compiled)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
    """x times a number, multiplied in x's precision and rounded once: [V,H] has no temporary copy if it can be helped."""
    if compiled and (x.dtype, dtype) == (torch.float32, torch.bfloat16):
        return torch.ops.metareward.scaled_bf16_cpp(x, float(factor))
    if x.device.type == "cpu" and x.dtype != dtype:
        return (x * factor).to(dtype)
    return torch.mul(x, factor.reshape([1] * x.dim()), out=fresh(x.shape, dtype, x.device))


def _linear_preference(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    loss: PairLoss,
    pair_weights: Tensor | None,
    beta: float,
    temperature: float,
    return_entropy: bool,
    chunk_tokens: int | None,
) -> Preference:
    hidden, weight, bias = inputs
    check_tensors(hidden, weight, targets, bias, temperature)
    starts, found = check_layout(cu_seqlens, pairs, hidden.shape[0])
    check_vector(reference_logprobs, "reference_logprobs", len(starts) - 1)
    if pair_weights is None:
        pair_weights = torch.full((len(found),), 1.0 / max(1, len(found)), dtype=torch.float64)
    check_vector(pair_weights, "pair_weights", len(found))
    if chunk_tokens is None:
        chunk_tokens = chunk_size(hidden.device)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if not beta > 0.0:
        raise ValueError(
            f"beta must be positive, got {beta}; it scales the rewards alone, the loss has its own"
        )
    problem = Problem(starts, found, reference_logprobs, loss, pair_weights, hidden.device)
    need = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs)
    value, losses, logprobs, entropy = _LinearPreference.apply(
        *inputs, targets, problem, temperature, return_entropy, chunk_tokens, need
    )
    with torch.no_grad():
        record = problem.record(logprobs)
        chosen_rewards, rejected_rewards = beta * record.chosen_ratio, beta * record.rejected_ratio
        margins = chosen_rewards - rejected_rewards
        return Preference(
            value,
            losses,
            logprobs,
            chosen_rewards,
            rejected_rewards,
            margins,
            (margins > 0).float(),
            entropy if return_entropy else None,
        )


@cache
def _outside_of_graphs() -> Callable[..., Preference]:
    """The whole call, not traced by torch.compile. Made on the first call: it imports torch._dynamo."""
    return torch.compiler.disable(_linear_preference, reason="a loss is a Python function")


def linear_preference(
    hidden: Tensor,  # [T,H]
    weight: Tensor,  # [V,H]
    targets: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    pairs: Tensor,  # [P,2]
    reference_logprobs: Tensor,  # [S]
    loss: PairLoss,
    *,
    beta: float = 1.0,
    pair_weights: Tensor | None = None,  # [P]
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> Preference:
    """sum over pairs of pair_weight * loss(pair), with log-probs under softmax((hidden @ weight.T + bias) / temperature).

    hidden [T,H] and weight [V,H] of one dtype (float64, float32, bfloat16, float16), targets [T] int64 in [0, V), any
    strides; sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1] of them. An empty sequence has log-prob 0. cu_seqlens and
    pairs (sequences of the chosen and the rejected completion) are read on the CPU: from CUDA each costs a
    synchronisation, as the check of targets does. A sequence may be in several pairs, or in none: then it gets no gradient.
    loss: any function of `PairLogprobs` in PyTorch, one number a pair that depends on that pair alone; it is called with
    float64 vectors, once a chunk for its derivative and once for the result. pair_weights: 1/P each if not given.
    beta: that of the loss, which is a function and cannot be asked. It enters the rewards alone, DPO's implicit
    beta log pi / pi_ref (arXiv 2305.18290, section 5); 1 leaves them bare log ratios.
    chunk_tokens bounds the logits held at once, 576 on a CPU and 4,096 on CUDA if not given: pairs, with all that share a
    sequence with them, that are longer take a fourth product (unless the head is frozen).

    The gradients of hidden, weight and bias come in their dtypes; the weight's is summed over chunks in fp32. They are made
    by this call and kept until the backward pass: call it under no_grad where none is wanted (the log-probs are then computed in
    the same chunks, with the same rounding). Differentiable once.
    Under torch.compile it is one graph break: a loss is a Python function, which no operator can take.
    Raises TypeError, ValueError or IndexError for inputs that do not fit together; IndexError for a target outside the
    vocabulary on a GPU too, unlike the other head ops (see `metareward_kernels`).
    """
    return _outside_of_graphs()(
        (hidden, weight, bias),
        targets,
        cu_seqlens,
        pairs,
        reference_logprobs,
        loss,
        pair_weights,
        beta,
        temperature,
        return_entropy,
        chunk_tokens,
    )
