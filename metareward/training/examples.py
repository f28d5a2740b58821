"""What is trained on, as token ids, and the order in which it comes.

The order is a pure function of (seed, stream, epoch, index), so the place in the data is one integer, the optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metareward.errors import UserError


@dataclass(frozen=True)
class Example:
    """A prompt and its completions: one for SFT; chosen, then rejected for a preference pair.

    `kind` ("actor", "judge", "seed") only groups the metrics. Token ids are what the sampler emitted or the chat template
    rendered; nothing is decoded and encoded again.
    """

    identity: str
    kind: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens computed for this example: the prompt once, then every completion."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)

    @property
    def target_tokens(self) -> int:
        return sum(len(completion) for completion in self.completions)


@dataclass(frozen=True)
class DataOrder:
    """Which examples an optimizer step sees.

    `count` examples, `batch` a step over all ranks; the last step of an epoch takes what is left.
    """

    count: int
    batch: int
    epochs: int
    seed: int
    stream: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.count / self.batch)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def indices(self, step: int) -> list[int]:
        """Example indices of optimizer step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, self.stream, epoch]).permutation(self.count)
        return order[place * self.batch : (place + 1) * self.batch].tolist()


def check_batch(batch: int, world_size: int, setting: str) -> None:
    """A global batch must split evenly over the ranks."""
    if batch % world_size:
        lower = batch // world_size * world_size
        choices = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise UserError(
            f"{setting} = {batch} does not divide over {world_size} processes: "
            f"set it to {choices}, or change the number of processes"
        )


def micro_batches(
    indices: Sequence[int], kinds: Sequence[str], tokens: Sequence[int], budget: int, world_size: int
) -> list[list[list[int]]]:
    """Split one global batch into micro-batches: [rank][micro-batch][example index].

    Examples are dealt to the ranks longest first, so that ranks have about the same work, then packed in that order until
    `budget` tokens are reached; an example longer than the budget stands alone. One kind comes after the other, because
    the prompts of a kind begin alike and packing computes what a micro-batch shares once. Every rank gets the same number of
    micro-batches (FSDP's collectives need that): short ranks end with empty lists.

    Args:
        indices: example indices of the global batch.
        kinds: kind of every example of the whole set, by example index.
        tokens: tokens of every example likewise.
        budget: tokens a micro-batch.
        world_size: number of ranks.
    """
    longest_first = sorted(indices, key=lambda index: (kinds[index], -tokens[index], index))
    ranks: list[list[list[int]]] = []
    for rank in range(world_size):
        batches: list[list[int]] = []
        room = 0
        for index in longest_first[rank::world_size]:
            if not batches or tokens[index] > room:
                batches.append([])
                room = budget
            batches[-1].append(index)
            room -= tokens[index]
        ranks.append(batches)
    most = max(len(batches) for batches in ranks)
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]
