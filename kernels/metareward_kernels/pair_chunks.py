"""Which sequences go through the head together, so that every pair's loss is known before its chunk's logits go.

Pure Python on lengths and indices. Sequences that share a pair, directly or through others (K-wise comparisons), form a
component; whole components are packed into chunks in the order of their first sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    together: list[list[int]]  # sequences of each chunk: whole components, no more than the chunk's tokens
    long: list[list[int]]  # components longer than a chunk
    unpaired: list[int]  # sequences in no pair


def components(sequences: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected components of two sequences and more, each ascending, in the order of their first sequence."""
    root = list(range(sequences))

    def find(s: int) -> int:
        while root[s] != s:
            root[s] = root[root[s]]
            s = root[s]
        return s

    for chosen, rejected in pairs:
        a, b = find(chosen), find(rejected)
        root[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for s in sorted({s for pair in pairs for s in pair}):
        members.setdefault(find(s), []).append(s)
    return list(members.values())


def plan_chunks(lengths: Sequence[int], pairs: Sequence[tuple[int, int]], chunk_tokens: int) -> Chunks:
    """Components packed next to one another while they fit; the sequences of a chunk ascending."""
    together: list[list[int]] = []
    long: list[list[int]] = []
    room = 0
    for component in components(len(lengths), pairs):
        tokens = sum(lengths[s] for s in component)
        if tokens > chunk_tokens:
            long.append(component)
            continue
        if tokens > room or not together:
            together.append([])
            room = chunk_tokens
        together[-1] += component
        room -= tokens
    paired = {s for pair in pairs for s in pair}
    return Chunks(
        [sorted(chunk) for chunk in together], long, [s for s in range(len(lengths)) if s not in paired]
    )


def token_rows(sequences: Sequence[int], starts: Sequence[int], device: torch.device) -> slice | Tensor:
    """Rows of the tokens of ascending `sequences`, which begin at starts[s] and end at starts[s + 1]: a slice where they
    lie together, else int64 indices.
    """
    ranges = [(starts[s], starts[s + 1]) for s in sequences if starts[s + 1] > starts[s]]
    if all(before[1] == after[0] for before, after in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1]) if ranges else slice(0, 0)
    return torch.cat([torch.arange(begin, end) for begin, end in ranges]).to(device)
