"""A packed row's tree of segments, and how it is told to the kernels of segment attention: as masks, a table, sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class VarlenLayout:
    """A tree's segments as pairs of sequences, all on one device; segments without tokens are left out.

    keys: [K] int64, which rows of the keys lie beside each other; None: all, as they are. query_offsets, key_offsets: [S+1] int32.
    """

    keys: Tensor | None
    query_offsets: Tensor
    key_offsets: Tensor
    most_queries: int
    most_keys: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """As both kernels take them, behind query, key and value."""
        return self.query_offsets, self.key_offsets, self.most_queries, self.most_keys


def _tree_lists(offsets: Tensor, parents: Tensor) -> tuple[list[int], list[int]]:
    """The tensors of a SegmentTree as lists; raises what the class documents."""
    for name, part in (("offsets", offsets), ("parents", parents)):
        if not isinstance(part, Tensor) or part.dtype != torch.int32 or part.dim() != 1:
            raise TypeError(
                f"{name} must be an int32 vector; make the tree with SegmentTree.of(lengths, parents)"
            )
        if part.device.type != "cpu":
            raise ValueError(
                f"{name} must lie on the CPU, whatever the device of the queries: call .cpu() once a batch"
            )
    if len(offsets) != len(parents) + 1:
        raise ValueError(f"need offsets [S+1] for parents [S], got [{len(offsets)}] and [{len(parents)}]")
    bounds, above = offsets.tolist(), parents.tolist()
    if bounds[0] != 0 or any(stop < start for start, stop in pairwise(bounds)):
        raise ValueError(f"offsets must rise from 0 to the number of tokens, got {bounds}")
    for segment, parent in enumerate(above):
        if not -1 <= parent < segment:
            raise ValueError(
                f"the parent of segment {segment} must be an earlier segment, or -1 for none, got {parent}"
            )
    return bounds, above


@dataclass(frozen=True, eq=False)
class SegmentTree:
    """S segments that cut a row of T tokens, validated when it is made. Both int32, contiguous, on the CPU.

    Raises TypeError or ValueError for tensors that are no such tree.
    """

    offsets: (
        Tensor  # [S+1] segment s holds the tokens offsets[s] .. offsets[s+1] - 1, perhaps none; from 0 to T
    )
    parents: Tensor  # [S] the segment that s continues, an earlier one; -1: none
    _masks: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, repr=False)
    _layouts: dict[torch.device, VarlenLayout] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _tree_lists(self.offsets, self.parents)
        object.__setattr__(self, "offsets", self.offsets.contiguous())
        object.__setattr__(self, "parents", self.parents.contiguous())

    @classmethod
    def of(cls, lengths: Sequence[int], parents: Sequence[int]) -> SegmentTree:
        """The tree of segments of these lengths, one after the other in the row."""
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
        return cls(offsets, torch.tensor(parents, dtype=torch.int32))

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.offsets[-1])

    @cached_property
    def table(self) -> Tensor:
        """[2,S+1] int32: offsets, and parents with a -1 behind them; two columns for one segment, because compilers take
        a size of one for a constant."""
        return torch.stack([self.offsets, F.pad(self.parents, (0, 1), value=-1)])

    def spans(self) -> list[tuple[slice, tuple[slice, ...]]]:
        """Of every segment: its own tokens, and its ancestors' from the root down."""
        bounds, parents = self.offsets.tolist(), self.parents.tolist()
        spans: list[tuple[slice, tuple[slice, ...]]] = []
        for segment, parent in enumerate(parents):
            above = () if parent < 0 else (*spans[parent][1], spans[parent][0])
            spans.append((slice(bounds[segment], bounds[segment + 1]), above))
        return spans

    def mask(self, context: int, length: int, device: torch.device) -> Tensor:
        """[length, context + length] bool: what the tokens of a segment see. Made once for all layers."""
        key = (context, length, device)
        if key not in self._masks:
            square = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            self._masks[key] = F.pad(square, (context, 0), value=True)
        return self._masks[key]

    def layout(self, device: torch.device) -> VarlenLayout:
        """What a variable-length kernel is told of the segments. Made once for all layers."""
        if device not in self._layouts:
            self._layouts[device] = layout_of(self, device)
        return self._layouts[device]


def layout_of(tree: SegmentTree, device: torch.device) -> VarlenLayout:
    """The layout of a tree, copied to the device; `segment_attention` makes it once for all layers."""
    spans = [(own, above) for own, above in tree.spans() if own.stop > own.start]
    queries = [own.stop - own.start for own, _ in spans]
    sequences = [
        torch.cat([torch.arange(span.start, span.stop) for span in (*above, own)]) for own, above in spans
    ]
    counts = [len(sequence) for sequence in sequences]
    gathered = any(above for _, above in spans)
    return VarlenLayout(
        torch.cat(sequences).to(device) if gathered else None,
        offsets(queries).to(device),
        offsets(counts).to(device),
        max(queries, default=0),
        max(counts, default=0),
    )


def offsets(lengths: list[int]) -> Tensor:
    """[S+1] int32: where each of so many sequences begins, and where the last ends."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
