"""The host's state of the running sequences: preallocated arrays with one row a slot, updated in place.

A sequence keeps its slot from admission to its end, so a step that is still on the device can be matched to
the sequences it was made for: ``generation`` counts the owners of a slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metareward.sampler.prefix_tree import Node
from metareward.sampler.request import Completion, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way: waiting, in prefill, decoding, or preempted with what it has so far.

    context: the prompt, and after a preemption the tokens drawn before it.
    leaf: the deepest tree node it reads; the pages after that node's end are its own.
    computed: tokens of the context whose keys and values are in the cache, or will be after the current step.
    after: the node that must be computed before the sequence can go on; it is not this sequence that does it.
    copy_from: (node, page, tokens) of the page whose first tokens it shares, until they are copied.
    leader: the sequence with the same context that computes it for this one as well.
    """

    request: Request
    key: int
    context: tuple[int, ...]
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    order: int = -1
    leaf: Node | None = None
    computed: int = 0
    after: Node | None = None
    copy_from: tuple[Node, int, int] | None = None
    leader: Sequence | None = None
    followers: list[Sequence] = field(default_factory=list)


class Slots:
    """Arrays for up to ``max_running`` sequences (R) of up to ``max_new_tokens`` new tokens (N).

    page_table [R, M] int32  all pages of a sequence in the order of positions, shared ones first
    held       [R] int32     how many pages of the row are in use
    lengths    [R] int32     tokens whose keys and values are in the cache once the scheduled steps have run
    unshared   [R] int32     index of the first page that no other decoding sequence reads
    keys       [R] int64     random key of the request
    counts     [R] int64     new tokens scheduled, and so the counter of the next random number
    recorded   [R] int64     new tokens that have come back
    generation [R] int64     grows with every owner of the slot
    tokens     [R, N] int64, logprobs [R, N] float32
    active     [size] int64  the slots that decode, in no particular order; row i of a step is active[i]
    """

    def __init__(self, max_running: int, max_new_tokens: int) -> None:
        self.page_table: NDArray[np.int32] = np.zeros((max_running, 1), dtype=np.int32)
        self.held = np.zeros(max_running, dtype=np.int32)
        self.lengths = np.zeros(max_running, dtype=np.int32)
        self.unshared = np.zeros(max_running, dtype=np.int32)
        self.keys = np.zeros(max_running, dtype=np.int64)
        self.counts = np.zeros(max_running, dtype=np.int64)
        self.recorded = np.zeros(max_running, dtype=np.int64)
        self.generation = np.zeros(max_running, dtype=np.int64)
        self.tokens = np.zeros((max_running, max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((max_running, max_new_tokens), dtype=np.float32)
        self.row_of = np.full(max_running, -1, dtype=np.int64)  # place in `active`, -1 when not decoding
        self.sequences: list[Sequence | None] = [None] * max_running
        self._active = np.zeros(max_running, dtype=np.int64)
        self._size = 0
        self._free = list(range(max_running - 1, -1, -1))

    @property
    def active(self) -> NDArray[np.int64]:
        return self._active[: self._size]

    @property
    def free(self) -> int:
        """Number of slots without a sequence."""
        return len(self._free)

    def next_free(self) -> int:
        """The slot that ``assign`` will give."""
        return self._free[-1]

    def assign(self, sequence: Sequence) -> None:
        """Give the sequence a slot, with no pages yet and what it has drawn before."""
        slot = sequence.slot = self._free.pop()
        self.sequences[slot] = sequence
        self.generation[slot] += 1
        self.held[slot] = self.lengths[slot] = self.unshared[slot] = 0
        self.keys[slot] = sequence.key
        count = len(sequence.drawn)
        self.counts[slot] = self.recorded[slot] = count
        self.tokens[slot, :count] = sequence.drawn
        self.logprobs[slot, :count] = sequence.logprobs

    def release(self, slot: int) -> None:
        """Take the slot back. Its pages are the caller's business."""
        self.stop_decoding(slot)
        sequence = self.sequences[slot]
        assert sequence is not None
        sequence.slot = -1
        self.sequences[slot] = None
        self.generation[slot] += 1
        self._free.append(slot)

    def add_pages(self, slot: int, pages: Iterable[int]) -> None:
        """Append pages to the slot's row, which widens the table when it is full."""
        new = np.fromiter(pages, dtype=np.int32)
        end = int(self.held[slot]) + len(new)
        if end > self.page_table.shape[1]:
            table = np.zeros((len(self.page_table), max(end, 2 * self.page_table.shape[1])), dtype=np.int32)
            table[:, : self.page_table.shape[1]] = self.page_table
            self.page_table = table
        self.page_table[slot, self.held[slot] : end] = new
        self.held[slot] = end

    def start_decoding(self, slot: int) -> None:
        assert self.row_of[slot] < 0
        self._active[self._size] = slot
        self.row_of[slot] = self._size
        self._size += 1

    def stop_decoding(self, slot: int) -> None:
        """Take the slot out of ``active``, where the last one takes its place; nothing when it is not there."""
        row = self.row_of[slot]
        if row < 0:
            return
        self._size -= 1
        last = self._active[self._size]
        self._active[row], self.row_of[last] = last, row
        self.row_of[slot] = -1

    def completion(self, slot: int, finished: bool) -> Completion:
        """What the sequence in the slot has become."""
        sequence, count = self.sequences[slot], self.recorded[slot]
        assert sequence is not None
        return Completion(
            identity=sequence.request.identity,
            token_ids=self.tokens[slot, :count].tolist(),
            finished=finished,
            logprobs=self.logprobs[slot, :count].tolist(),
        )
