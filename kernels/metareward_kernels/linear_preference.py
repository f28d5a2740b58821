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

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metareward_kernels.head_chunk import Head
from metareward_kernels.pair_chunks import plan_chunks, token_rows
from metareward_kernels.pair_losses import PairLogprobs, PairLoss

CPU_CHUNK_TOKENS = 1024
CUDA_CHUNK_TOKENS = 4096


class Preference(NamedTuple):
    """P pairs of S sequences. Only `loss` is differentiable."""

    loss: Tensor  # [] float32 (float64 for float64 inputs): sum of pair_weights * losses
    losses: Tensor  # [P] float64, as all that follow but entropy and accuracy
    logprobs: Tensor  # [S] log-prob of every sequence, summed over its tokens, in nats
    chosen_rewards: Tensor  # [P] log pi / pi_ref; beta is the loss's own and not in here
    rejected_rewards: Tensor  # [P]
    margins: Tensor  # [P] chosen_rewards - rejected_rewards
    accuracy: Tensor  # [P] float32: 1 where the margin is above 0
    entropy: (
        Tensor | None
    )  # [S] mean entropy of a sequence's tokens in nats, 0 for an empty one; where asked for


class _Problem:
    """The inputs that have no gradient, and what is found on the way."""

    def __init__(
        self,
        starts: list[int],
        pairs: list[tuple[int, int]],
        reference: Tensor,
        loss: PairLoss,
        pair_weights: Tensor,
        device: torch.device,
    ) -> None:
        self.starts, self.pairs, self.loss = starts, pairs, loss
        self.lengths = [end - begin for begin, end in pairwise(starts)]
        self.chosen = torch.tensor([pair[0] for pair in pairs], dtype=torch.int64, device=device)
        self.rejected = torch.tensor([pair[1] for pair in pairs], dtype=torch.int64, device=device)
        self.tokens = torch.tensor(self.lengths, dtype=torch.float64, device=device)
        self.reference = reference.to(device, torch.float64)
        self.pair_weights = pair_weights.to(device, torch.float64)
        self.pairs_of: list[list[int]] = [[] for _ in self.lengths]
        for p, (chosen, rejected) in enumerate(pairs):
            self.pairs_of[chosen].append(p)
            self.pairs_of[rejected].append(p)

    def record(self, logprobs: Tensor, which: Tensor | slice = slice(None)) -> PairLogprobs:
        """What the loss sees of the pairs `which`; logprobs [S]."""
        chosen, rejected = self.chosen[which], self.rejected[which]
        return PairLogprobs(
            logprobs[chosen],
            logprobs[rejected],
            self.reference[chosen],
            self.reference[rejected],
            self.tokens[chosen],
            self.tokens[rejected],
        )

    def losses(self, record: PairLogprobs) -> Tensor:
        losses = self.loss(record)
        if losses.shape != record.chosen.shape:
            raise ValueError(
                f"the loss must return one number a pair, [{record.chosen.shape[0]}], not {list(losses.shape)}"
            )
        return losses

    def coefficients(self, logprobs: Tensor, sequences: Sequence[int]) -> Tensor:
        """[len(sequences)] derivative of the weighted loss by the log-probs of whole components of sequences.

        Every sequence gathers its own terms and adds them in a fixed order: an index_add on CUDA would not.
        """
        places: dict[int, list[int]] = {s: [] for s in sequences}
        mine = sorted({p for s in sequences for p in self.pairs_of[s]})
        for i, p in enumerate(mine):
            places[self.pairs[p][0]].append(i)
            places[self.pairs[p][1]].append(len(mine) + i)
        width = max(map(len, places.values()), default=0)
        padded = [of + [2 * len(mine)] * (width - len(of)) for of in places.values()]
        which = torch.tensor(mine, dtype=torch.int64, device=logprobs.device)
        record = self.record(logprobs, which)
        with torch.enable_grad():
            chosen = record.chosen.detach().requires_grad_()
            rejected = record.rejected.detach().requires_grad_()
            losses = self.losses(record._replace(chosen=chosen, rejected=rejected))
            total = (losses * self.pair_weights[which]).sum()
        if not total.requires_grad:  # a loss that is constant here
            return torch.zeros(len(sequences), dtype=torch.float64, device=logprobs.device)
        grads = torch.autograd.grad(total, (chosen, rejected), allow_unused=True, materialize_grads=True)
        terms = torch.cat([*grads, grads[0].new_zeros(1)])
        return terms[torch.tensor(padded, dtype=torch.int64, device=terms.device)].sum(dim=1)


class _Pass:
    """One run over the tokens: log-probs of all, and the gradients that are wanted."""

    def __init__(
        self,
        problem: _Problem,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
    ) -> None:
        self.problem, self.hidden, self.targets, self.head = problem, hidden, targets, head
        self.chunk_tokens = chunk_tokens
        self.token_logprobs = torch.zeros(hidden.shape[0], dtype=head.dtype, device=hidden.device)
        self.token_entropy = torch.zeros_like(self.token_logprobs) if head.entropy else None
        self.logprobs = torch.zeros(len(problem.lengths), dtype=torch.float64, device=hidden.device)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def _keep(self, rows: slice | Tensor, logprobs: Tensor, entropy: Tensor | None) -> None:
        self.token_logprobs[rows] = logprobs
        if self.token_entropy is not None and entropy is not None:
            self.token_entropy[rows] = entropy

    def _sum(self, sequences: Sequence[int]) -> None:
        """Log-probs of sequences whose tokens are done."""
        if not sequences:
            return
        rows = token_rows(sequences, self.problem.starts, self.hidden.device)
        values = self.token_logprobs[rows].double()
        self.logprobs[torch.tensor(sequences, device=values.device)] = sum_segments(
            values, [self.problem.lengths[s] for s in sequences]
        )

    def _parts(self, sequences: Sequence[int]) -> list[slice | Tensor]:
        """The tokens of sequences, no more than a chunk at a time."""
        rows = token_rows(sequences, self.problem.starts, self.hidden.device)
        step = self.chunk_tokens
        if isinstance(rows, slice):
            return [slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]
        return list(rows.split(step))

    def forward(self, sequences: Sequence[int]) -> None:
        """Log-probs alone: one product."""
        for rows in self._parts(sequences):
            found = self.head.logprobs(self.hidden[rows], self.targets[rows])
            self._keep(rows, found.logprobs, found.entropy)
        self._sum(sequences)

    def hidden_gradient(self) -> None:
        """Log-probs and the hidden gradient, whose rows get their factors when all is known: two products."""
        everything = range(len(self.problem.lengths))
        grad, factors = self.hidden.new_zeros(0), torch.empty_like(self.token_logprobs)
        for rows in self._parts(everything):
            found, residual = self.head.residual(self.hidden[rows], self.targets[rows])
            self._keep(rows, found.logprobs, found.entropy)
            product = self.head.times_weight(residual)
            if grad.shape != self.hidden.shape:
                grad = product.new_empty(self.hidden.shape)
            grad[rows] = product
            factors[rows] = self.head.factors(residual, torch.ones_like(found.logprobs))
        self._sum(everything)
        factors *= self._of_tokens(everything, self.problem.coefficients(self.logprobs, everything))
        self.grad_hidden = (grad.view(self.hidden.shape) * factors[:, None]).to(self.hidden.dtype)

    def _of_tokens(self, sequences: Sequence[int], coefficients: Tensor) -> Tensor:
        lengths = torch.tensor([self.problem.lengths[s] for s in sequences], device=coefficients.device)
        tokens = int(sum(self.problem.lengths[s] for s in sequences))
        return coefficients.repeat_interleave(lengths, output_size=tokens).to(self.head.dtype)

    def all_gradients(self, need_hidden: bool, need_bias: bool) -> None:
        """Log-probs and the gradients of weight and bias, of hidden too where needed."""
        shape, device = self.head.weight.shape, self.hidden.device
        if need_hidden:
            self.grad_hidden = torch.zeros(self.hidden.shape, dtype=self.hidden.dtype, device=device)
        plan = plan_chunks(self.problem.lengths, self.problem.pairs, self.chunk_tokens)
        self.forward(plan.unpaired)
        total = torch.empty(shape, dtype=self.head.dtype, device=device)
        total_bias = torch.empty(shape[:1], dtype=self.head.dtype, device=device) if need_bias else None
        first = True
        for sequences in plan.together + plan.long:
            parts, known = self._parts(sequences), None
            if len(parts) > 1:  # the loss needs the last part's log-probs before the first part's gradient
                self.forward(sequences)
                known = self._of_tokens(sequences, self.problem.coefficients(self.logprobs, sequences))
            for i, rows in enumerate(parts):
                hidden = self.hidden[rows]
                found, residual = self.head.residual(hidden, self.targets[rows])
                if known is None:
                    self._keep(rows, found.logprobs, found.entropy)
                    self._sum(sequences)
                    part = self._of_tokens(sequences, self.problem.coefficients(self.logprobs, sequences))
                else:
                    part = known[i * self.chunk_tokens : i * self.chunk_tokens + hidden.shape[0]]
                factors = self.head.factors(residual, part)
                if self.grad_hidden is not None:
                    product = self.head.times_weight(residual).mul_(factors[:, None])
                    self.grad_hidden[rows] = product.to(self.hidden.dtype)
                self.head.add_weight_gradient_(residual, hidden, factors, total, total_bias, first)
                first = False
        if first:  # no pairs
            total.zero_()
            total_bias = None if total_bias is None else total_bias.zero_()
        self.grad_weight, self.grad_bias = total, total_bias


def sum_segments(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of neighbouring stretches of values, 0 for an empty one; in a fixed order."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=values.device)
    return torch.segment_reduce(values, "sum", lengths=counts, initial=0.0)


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        problem: _Problem,
        temperature: float,
        entropy: bool,
        chunk_tokens: int,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight, bias, temperature, entropy, min(chunk_tokens, hidden.shape[0]))
            run = _Pass(problem, hidden, targets, head, chunk_tokens)
            if need[1] or need[2]:
                run.all_gradients(need[0], need[2])
            elif need[0]:
                run.hidden_gradient()
            else:
                run.forward(range(len(problem.lengths)))
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
    if x.device.type == "cpu":
        return (x * factor).to(dtype)
    return torch.mul(x, factor.reshape([1] * x.dim()), out=torch.empty_like(x, dtype=dtype))


def _indices(x: Tensor, name: str, shape: str) -> list[Any]:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} {shape} must hold integers, got {x.dtype}")
    return x.tolist()


def _check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> None:
    known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if hidden.dtype not in known or weight.dtype != hidden.dtype:
        raise TypeError(
            "hidden and weight must have one dtype of float64, float32, bfloat16 and float16, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [T,H] and weight [V,H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target a token, got {list(targets.shape)} for {hidden.shape[0]} tokens")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"need a floating bias [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    if hidden.device.type not in ("cpu", "cuda") or any(
        x is not None and x.device != hidden.device for x in (weight, targets, bias)
    ):
        raise ValueError(
            f"hidden, weight, targets and bias must lie on one CPU or CUDA device, hidden is on {hidden.device}"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if targets.numel():
        low, high = torch.stack([targets.min(), targets.max()]).tolist()
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"targets span [{low}, {high}], outside the vocabulary's [0, {weight.shape[0] - 1}]"
            )


def _check_layout(cu_seqlens: Tensor, pairs: Tensor, tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    starts = _indices(cu_seqlens, "cu_seqlens", "[S+1]")
    if (
        cu_seqlens.dim() != 1
        or not starts
        or starts[0] != 0
        or starts[-1] != tokens
        or starts != sorted(starts)
    ):
        raise ValueError(
            f"cu_seqlens [S+1] must ascend from 0 to the {tokens} tokens of hidden, got {starts}"
        )
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs must be [P,2], chosen and rejected sequence of each, got {list(pairs.shape)}"
        )
    found = [(chosen, rejected) for chosen, rejected in _indices(pairs, "pairs", "[P,2]")]
    for pair in found:
        if not all(0 <= s < len(starts) - 1 for s in pair):
            raise IndexError(f"pair {pair} names a sequence outside of the {len(starts) - 1} of cu_seqlens")
        if pair[0] == pair[1]:
            raise ValueError(f"pair {pair} compares a sequence with itself; leave it out")
    return starts, found


def _check_vector(x: Tensor, name: str, size: int) -> None:
    if x.shape != (size,) or not x.is_floating_point():
        raise ValueError(f"{name} must be floating [{size}], got {x.dtype} {list(x.shape)}")
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient; detach it")


def _linear_preference(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    loss: PairLoss,
    pair_weights: Tensor | None,
    temperature: float,
    return_entropy: bool,
    chunk_tokens: int | None,
) -> Preference:
    hidden, weight, bias = inputs
    _check_inputs(hidden, weight, targets, bias, temperature)
    starts, found = _check_layout(cu_seqlens, pairs, hidden.shape[0])
    _check_vector(reference_logprobs, "reference_logprobs", len(starts) - 1)
    if pair_weights is None:
        pair_weights = torch.full((len(found),), 1.0 / max(1, len(found)), dtype=torch.float64)
    _check_vector(pair_weights, "pair_weights", len(found))
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else CUDA_CHUNK_TOKENS
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    problem = _Problem(starts, found, reference_logprobs, loss, pair_weights, hidden.device)
    need = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs)
    value, losses, logprobs, entropy = _LinearPreference.apply(
        *inputs, targets, problem, temperature, return_entropy, chunk_tokens, need
    )
    with torch.no_grad():
        record = problem.record(logprobs)
        margins = record.margin
        return Preference(
            value,
            losses,
            logprobs,
            record.chosen_ratio,
            record.rejected_ratio,
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
    chunk_tokens bounds the logits held at once, 1,024 on a CPU and 4,096 on CUDA if not given: pairs, with all that share a
    sequence with them, that are longer take a fourth product (unless the head is frozen).

    The gradients of hidden, weight and bias come in their dtypes; the weight's is summed over chunks in fp32. They are made
    by this call and kept until the backward pass: call it under no_grad where none is wanted. Differentiable once.
    Under torch.compile it is one graph break: a loss is a Python function, which no operator can take.
    Raises TypeError, ValueError or IndexError for inputs that do not fit together.
    """
    return _outside_of_graphs()(
        (hidden, weight, bias),
        targets,
        cu_seqlens,
        pairs,
        reference_logprobs,
        loss,
        pair_weights,
        temperature,
        return_entropy,
        chunk_tokens,
    )
