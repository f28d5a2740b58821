"""Examples packed into one row of tokens, with no padding and shared prompt tokens computed once.

A micro-batch is a forest of segments, a tree for every kind of example in it: what all prompts of the kind begin with (a rubric, a
system message), below it the rest of every prompt, below that the completions. A segment attends to its ancestors and, causally,
to itself; its positions go on where its parent's end.
The numbers and the gradients are those of separate sequences (after arXiv 2410.20305, which shares the prompt of a pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from metareward_kernels import SegmentTree, segment_attention
from torch import Tensor

from metareward.training.examples import Example

# Below this a shared beginning saves less than its own segment costs.
SMALLEST_SHARED = 16


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the packed row; `ancestors` are the segments they continue, from the root down."""

    start: int
    stop: int
    ancestors: tuple[Segment, ...] = ()

    @property
    def context(self) -> int:
        """Tokens before the segment's first, in its own sequence."""
        return sum(ancestor.stop - ancestor.start for ancestor in self.ancestors)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch.

    token_ids, positions: [T] int64. rows: [R] int64, the positions whose next token is a completion token; targets: [R] int64,
    those tokens. lengths: target tokens of every completion, in order; they sum to R. unshared_tokens: what separate sequences
    would have computed.
    """

    examples: tuple[Example, ...]
    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    segments: tuple[Segment, ...]
    unshared_tokens: int

    @property
    def tokens(self) -> int:
        return self.token_ids.numel()

    def sum_completions(self, logprobs: Tensor) -> Tensor:
        """[R] per-token log-probs to [completions] float64 sums, in a fixed order of addition."""
        return torch.stack([part.sum() for part in logprobs.double().split(list(self.lengths))])


def attention_pairs(segments: Sequence[Segment]) -> int:
    """Pairs of a query and a key it sees, in a packed tree: all of a segment's ancestors, and itself causally."""
    lengths = [(segment.stop - segment.start, segment.context) for segment in segments]
    return sum(length * context + length * (length + 1) // 2 for length, context in lengths)


def work_of(batch: PackedBatch, fused_head: bool = False) -> dict[str, int]:
    """What a forward pass over the micro-batch computes, as `metareward.model.flops.Work` names it.

    fused_head: whether the head makes its gradients in the forward pass, see `Objective`.
    """
    targets = sum(batch.lengths)
    return {
        "passes": 1,
        "rows": batch.tokens,
        "logit_rows": targets,
        "pairs": attention_pairs(batch.segments),
        "fused_rows": targets if fused_head else 0,
        "completions": len(batch.lengths),
        "unshared_rows": batch.unshared_tokens,
    }


@dataclass
class Row:
    """The packed row while it is being built."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def add(self, tokens: Sequence[int], parent: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Append a segment below `parent`; returns the chain that its children continue."""
        if not tokens:
            return parent
        segment = Segment(len(self.ids), len(self.ids) + len(tokens), parent)
        first = segment.context
        self.ids.extend(tokens)
        self.positions.extend(range(first, first + len(tokens)))
        self.segments.append(segment)
        return (*parent, segment)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with."""
    # Sorted, the first and the last differ at least as early as any two others.
    low, high = min(prompts), max(prompts)
    return next(
        (index for index, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low)
    )


def pack(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """Pack examples in the given order; every prompt and completion must have at least one token.

    Neighbours of one kind share what their prompts begin with; `micro_batches` puts a kind's examples beside each other.
    """
    row = Row()
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for _, neighbours in groupby(examples, key=lambda example: example.kind):
        for first, last, completion in add_kind(row, list(neighbours)):
            # The first completion token is predicted at the prompt's last position, the others by the token before them.
            rows.append(last)
            rows.extend(range(first, first + len(completion) - 1))
            targets.extend(completion)
            lengths.append(len(completion))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    unshared = sum(len(example.prompt) + len(part) for example in examples for part in example.completions)
    return PackedBatch(
        tuple(examples),
        tensor(row.ids),
        tensor(row.positions),
        tensor(rows),
        tensor(targets),
        tuple(lengths),
        tuple(row.segments),
        unshared,
    )


def add_kind(row: Row, examples: Sequence[Example]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Append a tree of examples; for every completion (place of its first token, place of its prompt's last, tokens)."""
    shared = common_prefix([example.prompt for example in examples]) if len(examples) > 1 else 0
    root = row.add(examples[0].prompt[:shared], ()) if shared >= SMALLEST_SHARED else ()
    starts = []
    for example in examples:
        assert len(example.prompt) > 0, example.identity
        assert all(example.completions), example.identity
        rest = example.prompt[shared:] if root else example.prompt
        if len(example.completions) == 1:
            # One completion simply continues the prompt: one segment instead of two.
            completion = example.completions[0]
            first = len(row.ids) + len(rest)
            starts.append((first, first - 1 if rest else root[-1].stop - 1, completion))
            row.add((*rest, *completion), root)
        else:
            chain = row.add(rest, root)
            for completion in example.completions:
                starts.append((len(row.ids), chain[-1].stop - 1, completion))
                row.add(completion, chain)
    return starts


def segment_tree(segments: Sequence[Segment]) -> SegmentTree:
    """The segments as the kernels take them."""
    place = {segment: index for index, segment in enumerate(segments)}
    lengths = [segment.stop - segment.start for segment in segments]
    return SegmentTree.of(
        lengths, [place[segment.ancestors[-1]] if segment.ancestors else -1 for segment in segments]
    )


@dataclass(frozen=True)
class TreeAttention:
    """An `Attend`: causal attention of every segment on its ancestors and itself."""

    tree: SegmentTree

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segment_attention(query, key, value, self.tree, query.shape[-1] ** -0.5)


def tree_attention(segments: Sequence[Segment]) -> TreeAttention:
    """Causal attention of every segment on its ancestors and itself."""
    return TreeAttention(segment_tree(segments))
