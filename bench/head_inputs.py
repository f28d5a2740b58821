"""What the head benchmarks run on: hidden states, a head, targets, and whole pairs that fill the tokens exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metareward.errors import UserError

# Lengths of the completions, in tokens.
SHORTEST, LONGEST = 60, 200
# References are zero: a peer without a reference model takes none. A margin is then hundreds of nats, the difference
# of two lengths times log V; a small beta keeps every pair's sigmoid, and so its gradient, alive.
BETA = 0.002
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """T tokens, H hidden units, V words."""

    tokens: int
    hidden: int
    vocabulary: int

    def product_flop(self) -> int:
        """FLOP of one matrix product of the head."""
        return 2 * self.tokens * self.hidden * self.vocabulary


class Inputs(NamedTuple):
    """Made once a cell and given to every method. The sequences are chosen, rejected, chosen, rejected ..."""

    hidden: Tensor  # [T,H] requires grad
    weight: Tensor  # [V,H] requires grad
    targets: Tensor  # [T] int64
    upstream: Tensor  # [T] fp32, random gradient of the log-probs
    lengths: list[int]  # of the S sequences
    cu_seqlens: Tensor  # [S+1] int64, on the CPU
    pairs: Tensor  # [P,2] int64, indices of (chosen, rejected)
    reference_logprobs: Tensor  # [S] fp32, zeros

    @property
    def padded_tokens(self) -> int:
        """Positions of the [S, longest] batch that holds the same sequences padded."""
        return len(self.lengths) * max(self.lengths)


def check_shape(shape: Shape) -> None:
    """Raises UserError for sizes that hold no pair or are not positive."""
    if shape.tokens < 2 * SHORTEST:
        raise UserError(f"--tokens {shape.tokens} holds no pair of completions: give {2 * SHORTEST} or more")
    for name, size in (("hidden", shape.hidden), ("vocabulary", shape.vocabulary)):
        if size < 1:
            raise UserError(f"--{name} is {size}: give 1 or more")


def pair_lengths(tokens: int, generator: torch.Generator) -> list[int]:
    """Lengths in [SHORTEST, LONGEST] of chosen, rejected, chosen ..., which add up to `tokens`."""
    lengths: list[int] = []
    left = tokens
    while left > 2 * LONGEST:
        pair = torch.randint(SHORTEST, LONGEST + 1, (2,), generator=generator).tolist()
        if left - sum(pair) >= 2 * SHORTEST:
            lengths += pair
            left -= sum(pair)
    return [*lengths, left // 2, left - left // 2]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Random inputs whose logits have standard deviation 1; the big ones are made on the device."""
    here = torch.Generator().manual_seed(seed)
    there = torch.Generator(device).manual_seed(seed)
    lengths = pair_lengths(shape.tokens, here)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=there, device=device)
    weight = torch.randn(shape.vocabulary, shape.hidden, generator=there, device=device)
    ends = torch.tensor(lengths).cumsum(0)
    return Inputs(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.mul_(shape.hidden**-0.5).to(dtype).requires_grad_(),
        targets=torch.randint(shape.vocabulary, (shape.tokens,), generator=here).to(device),
        upstream=torch.randn(shape.tokens, generator=here).to(device),
        lengths=lengths,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        pairs=torch.arange(len(lengths), device=device).view(-1, 2),
        reference_logprobs=torch.zeros(len(lengths), device=device),
    )


def sequence_sums(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """[S] sums of the [T] log-probs over each sequence."""
    lengths = torch.tensor(inputs.lengths, device=logprobs.device)
    index = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths)
    return logprobs.new_zeros(len(lengths)).index_add_(0, index, logprobs)


def pad(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences as a batch, all chosen before all rejected, padded on the right.

    Returns hidden [S,L,H] (a new leaf), targets [S,L] (-100 at padding) and the flat positions [T] of the tokens.
    """
    width = max(inputs.lengths)
    count = len(inputs.lengths)
    order = [*range(0, count, 2), *range(1, count, 2)]
    row = {sequence: place for place, sequence in enumerate(order)}
    positions = torch.cat(
        [row[sequence] * width + torch.arange(length) for sequence, length in enumerate(inputs.lengths)]
    ).to(inputs.hidden.device)
    hidden = inputs.hidden.new_zeros(count * width, inputs.hidden.shape[1])
    hidden[positions] = inputs.hidden.detach()
    targets = inputs.targets.new_full((count * width,), -100)
    targets[positions] = inputs.targets
    return hidden.view(count, width, -1).requires_grad_(), targets.view(count, width), positions
