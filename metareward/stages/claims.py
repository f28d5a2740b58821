"""How the ranks share the requests of a sampling stage: claims, drawn from one counter that all ranks add to.

A claim is a run of jobs that share most of their prompt, so that what they share is computed on one rank. A rank draws its next
claim when its engine asks for the next request, that is when it has room: no rank idles while there is work that another has
not begun. Ranks that share a model draw as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from metareward.model.tensor_parallel import ALONE, TensorGroup
from metareward.run.ranks import Counter

# Jobs with one and the same prompt stay together up to this many: more of them than a rank's samples of one prompt
# usually are, few enough that a single prompt with thousands of samples still reaches all ranks.
LARGEST_GROUP = 32


@dataclass(frozen=True)
class Job:
    """One completion wanted: the fields that identify its line, and the prompt's token ids."""

    head: dict[str, Any]
    prompt: tuple[int, ...]


def claim_size(jobs: int, ranks: int) -> int:
    """Jobs a claim has at most: eight claims a rank keep the ranks' ends close together; 64 jobs share well enough."""
    return max(1, min(64, jobs // (8 * ranks)))


def cut_claims(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """The jobs in the order of their prompts' tokens, which brings together what shares a beginning, cut into claims.

    Neighbours join where half of the prompt is common, up to `size` jobs. Jobs with equal prompts are cut apart only beyond
    `size` and LARGEST_GROUP.
    """
    ordered = sorted(jobs, key=lambda job: job.prompt)
    claims: list[list[Job]] = []
    for prompt, same in groupby(ordered, key=lambda job: job.prompt):
        group = list(same)
        if claims and len(claims[-1]) + len(group) <= size and related(claims[-1][-1].prompt, prompt):
            claims[-1] += group
            continue
        step = max(size, LARGEST_GROUP)
        claims += [group[start : start + step] for start in range(0, len(group), step)]
    return claims


def related(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether at least half of the longer prompt is a common beginning."""
    half = -(-max(len(left), len(right)) // 2)
    return left[:half] == right[:half]


def first_draw(jobs: int, ranks: int, max_running: int) -> float:
    """Jobs that a rank may draw before it has finished them all.

    Where all jobs could run at once, whoever asks first could take them all and leave the others idle: then an equal part.
    Else no limit: the rooms of the ranks' engines are the limit.
    """
    part = math.ceil(jobs / ranks)
    return part if ranks > 1 and part <= max_running else math.inf


class Draws:
    """This rank's way to the claims. All ranks must make it with the same claims. A collective.

    The ranks of a `group` are given the same claims: each must draw as often as the others.
    """

    def __init__(self, claims: Sequence[Sequence[Job]], name: str, group: TensorGroup = ALONE) -> None:
        self.claims = claims
        self.group = group
        self.counter = Counter(f"{name}/claims")
        self.left = True
        """Whether there may be claims that no rank has drawn."""

    def jobs(self, most: float) -> Iterator[Job]:
        """Draw claims, one when the jobs of the last are used up, until `most` jobs are drawn or no claim is left."""
        drawn = 0
        while drawn < most:
            turn = self.group.from_first(lambda: self.counter.add(1)) - 1
            if turn >= len(self.claims):
                self.left = False
                return
            drawn += len(self.claims[turn])
            yield from self.claims[turn]
