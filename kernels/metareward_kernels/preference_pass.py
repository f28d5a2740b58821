"""One run of `linear_preference` over the tokens, chunk by chunk: log-probs, the loss's derivative, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from metareward_kernels.fresh_memory import fresh
from metareward_kernels.head_chunk import Head
from metareward_kernels.pair_chunks import plan_chunks, token_rows
from metareward_kernels.pair_losses import PairLogprobs, PairLoss


class Problem:
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


class Pass:
    """One run over the tokens: log-probs of all, and the gradients that are wanted."""

    def __init__(
        self,
        problem: Problem,
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

    def all_logprobs(self) -> None:
        """Log-probs of all sequences, in the chunks in which `all_gradients` computes them: a product's rounding may depend
        on its number of rows, and a reference computed by this op is to equal the policy's log-probs to the bit.
        """
        plan = plan_chunks(self.problem.lengths, self.problem.pairs, self.chunk_tokens)
        for sequences in [plan.unpaired, *plan.together, *plan.long]:
            self.forward(sequences)

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
        total = fresh(shape, self.head.dtype, device)
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
