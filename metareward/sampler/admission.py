"""Who is in: sequences enter, grow by pages, give way and leave.

Requests are drawn lazily, one ahead. Prompts share whole pages through the prefix tree, also with prompts that
are computed in the same step: keys and values of all rows are written before any row attends. Requests with one
prompt follow the first of them: it computes the prompt, they start from the same logits with a copy of the
partly filled last page.

A sequence takes pages as it grows. When none is left, prefixes that nobody reads go first, then the sequence
admitted last gives way: what it has drawn is kept, and its whole pages stay in the tree until they are wanted.
The sequence admitted first can therefore always go on, and it fits alone, which is checked when a request is
drawn: nothing deadlocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from metareward.errors import UserError
from metareward.sampler.pages import PagePool
from metareward.sampler.prefix_tree import Node, PrefixTree
from metareward.sampler.request import Request
from metareward.sampler.slots import Sequence, Slots


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold ``tokens`` tokens."""
    return -(-tokens // page_size)


def most_pages(prompt_length: int, max_new_tokens: int, page_size: int) -> int:
    """Pages a sequence may ever need. The last new token is never an input, so it needs no room."""
    return pages_for(prompt_length + max_new_tokens - 1, page_size)


class LengthEstimate:
    """How many tokens a completion will have, from those that are through: ``margin`` times their mean.

    Begins at the limit, so that early on too little is admitted rather than too much.
    """

    def __init__(self, limit: int, margin: float) -> None:
        self._limit = limit
        self._margin = margin
        self._sum, self._count = limit * 8, 8

    def add(self, length: int) -> None:
        self._sum += length
        self._count += 1

    @property
    def tokens(self) -> float:
        return min(self._limit, self._margin * self._sum / self._count)


@dataclass
class Counts:
    """What happened: sequences started and the tokens of their prompts, preemptions, the most pages that running
    sequences have read at one time, and what these would have held if nothing were shared."""

    started: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    peak_pages: int = 0
    unshared_pages: int = 0


class Admission:
    """The sequences that have a slot, and those that wait for one.

    ``running`` holds the former in the order of admission, ``prefilling`` those among them whose prompt is not yet
    computed, ``leaders`` these by what they compute. ``changed`` is set whenever who runs changes.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pool: PagePool,
        tree: PrefixTree,
        root: Node,
        *,
        key_of: Callable[[str], int],
        max_running: int,
        max_new_tokens: int,
        margin: float,
    ) -> None:
        self.pool = pool
        self.tree = tree
        self.slots = Slots(max_running, max_new_tokens)
        self.running: dict[Sequence, None] = {}
        self.prefilling: dict[Sequence, None] = {}
        self.leaders: dict[tuple[int, ...], Sequence] = {}
        self.counts = Counts()
        self.estimate = LengthEstimate(max_new_tokens, margin)
        self.changed = True
        self.page_size = tree.page_size
        self._max_new_tokens = max_new_tokens
        self._root = root
        self._key_of = key_of
        self._source: Iterator[Request] = iter(requests)
        self._waiting: deque[Sequence] = deque()
        self._orders = 0

    def grow(self) -> None:
        """A page more for every decoding sequence whose next token begins one; who came first is served first."""
        slots = self.slots
        active = slots.active
        short = active[slots.lengths[active] == slots.held[active] * self.page_size]
        orders = [(slots.sequences[slot].order, slot) for slot in short.tolist()]  # type: ignore[union-attr]
        for order, slot in sorted(orders):
            while self.pool.free == 0:
                if self.tree.evictable:
                    # Some at once: the next sequences will want a page too.
                    self.tree.evict(min(self.tree.evictable, len(short)))
                    assert self.pool.free, "unused prefixes that cannot be evicted"
                else:
                    newest = next(reversed(self.running))
                    self._preempt(newest)
                    if newest.order == order:
                        break
            sequence = slots.sequences[slot]
            if sequence is not None and sequence.order == order:
                slots.add_pages(slot, self.pool.allocate(1))

    def _preempt(self, sequence: Sequence) -> None:
        """Put a sequence back in front of the queue with what it has drawn."""
        slots, slot = self.slots, sequence.slot
        self.counts.preemptions += 1
        count = int(slots.recorded[slot])
        sequence.drawn = slots.tokens[slot, :count].tolist()
        sequence.logprobs = slots.logprobs[slot, :count].tolist()
        sequence.context = (*sequence.request.prompt, *sequence.drawn)
        if slots.row_of[slot] >= 0:
            self._keep_pages(sequence)
        self.release(slot)
        self._waiting.appendleft(sequence)

    def _keep_pages(self, sequence: Sequence) -> None:
        """Hand a decoding sequence's own whole pages to the tree, where they wait for its return or for eviction."""
        slots, slot, leaf = self.slots, sequence.slot, sequence.leaf
        assert leaf is not None
        first = leaf.end // self.page_size
        whole = min(int(slots.lengths[slot]), len(sequence.context)) // self.page_size
        tokens = sequence.context[leaf.end : whole * self.page_size]
        if whole <= first or self.tree.match(leaf, tokens, 1).partial:
            return  # nothing whole, or (from an earlier preemption) there already
        pages = slots.page_table[slot, first:whole].tolist()
        kept = self.tree.insert(leaf, tokens, pages)
        kept.computed = kept.settled = len(tokens)
        self.tree.enter(kept, slot)
        sequence.leaf = kept

    def release(self, slot: int) -> None:
        """Give back a sequence's slot, pages and place in the tree."""
        slots, sequence = self.slots, self.slots.sequences[slot]
        assert sequence is not None
        assert sequence.leaf is not None
        assert not sequence.followers, "a leader gives way before those that follow it"
        leaf = sequence.leaf
        self.pool.release(slots.page_table[slot, leaf.end // self.page_size : slots.held[slot]].tolist())
        if sequence.copy_from is not None:
            assert sequence.after is not None
            self.tree.leave(sequence.copy_from[0], slot, until=sequence.after)
        self.tree.leave(leaf, slot)
        # What it was to compute and has not is of no use to anybody.
        while leaf.parent and not leaf.users and not leaf.children and leaf.computed < len(leaf.tokens):
            parent, left = leaf.parent, self.tree.cut(leaf, leaf.computed)
            if left is leaf:
                break
            leaf = parent
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        if self.leaders.get(sequence.context) is sequence:
            del self.leaders[sequence.context]
        self.prefilling.pop(sequence, None)
        del self.running[sequence]
        sequence.leaf = sequence.leader = sequence.after = sequence.copy_from = None
        sequence.computed = 0
        slots.release(slot)
        self.changed = True

    def admit(self) -> None:
        """Admit requests while there are slots, and pages for them and for what the running will still need."""
        expected = None
        while self.slots.free:
            sequence = self._peek()
            if sequence is None:
                return
            if expected is None:
                expected = self._expected_pages()
            growth = self._expected_growth(len(sequence.drawn))
            if not self._enter(sequence, expected + growth):
                return
            expected += growth
            self._waiting.popleft()

    def _peek(self) -> Sequence | None:
        if not self._waiting:
            request = next(self._source, None)
            if request is None:
                return None
            need = most_pages(len(request.prompt), self._max_new_tokens, self.page_size)
            if need > self.pool.capacity:
                raise UserError(
                    f"request {request.identity!r} needs {need * self.page_size} tokens of key-value cache "
                    f"({len(request.prompt)} of prompt and up to {self._max_new_tokens} new) and the cache "
                    f"has {self.pool.capacity * self.page_size}: raise kv_tokens (sampler.kv_memory in a recipe) or lower "
                    "max_new_tokens"
                )
            self._waiting.append(Sequence(request, self._key_of(request.identity), request.prompt))
        return self._waiting[0]

    def _expected_growth(self, drawn: int) -> float:
        """Pages a sequence will still take, from the lengths of those that are through."""
        return max(self.estimate.tokens - drawn, 1.0) / self.page_size

    def _expected_pages(self) -> float:
        counts = self.slots.counts[[sequence.slot for sequence in self.running]]
        return float(np.maximum(self.estimate.tokens - counts, 1.0).sum()) / self.page_size

    def _enter(self, sequence: Sequence, growth: float) -> bool:
        """Give the sequence a slot and its context's pages if ``growth`` pages remain for later; whether it did."""
        tree, slots, slot = self.tree, self.slots, self.slots.next_free()
        context, leader = sequence.context, self.leaders.get(sequence.context)
        if leader is not None:
            assert leader.leaf is not None
            base, copied = leader.leaf, None
        else:
            # One token at least is computed: its logits give the next.
            match = tree.match(self._root, context, len(context) - 1)
            base = match.node
            copied = (match.partial_node, match.partial_page, match.partial) if match.partial_node else None
        tree.enter(base, slot)
        if copied is not None:
            tree.enter(copied[0], slot)  # not to be evicted before it is copied
        need = pages_for(len(context), self.page_size) - base.end // self.page_size
        wanted = need + (growth if self.running else 0)
        if copied is not None and self.pool.free + tree.evictable < wanted:
            tree.leave(copied[0], slot, until=base)  # computing a few tokens again is cheaper than waiting
            copied = None
        if self.pool.free + tree.evictable < wanted:
            tree.leave(base, slot)
            assert self.running, "a request larger than the pool was let through"
            return False
        tree.evict(need - self.pool.free)
        slots.assign(sequence)
        path: list[list[int]] = []
        node: Node | None = base
        while node is not None:
            path.append(node.pages)
            node = node.parent
        slots.add_pages(slot, [page for pages in reversed(path) for page in pages])
        pages = self.pool.allocate(need)
        slots.add_pages(slot, pages)
        whole = len(context) // self.page_size - base.end // self.page_size
        sequence.leaf, sequence.after, sequence.copy_from = base, base, copied
        if whole > 0:
            tokens = context[base.end : base.end + whole * self.page_size]
            sequence.leaf = tree.insert(base, tokens, pages[:whole])
            tree.enter(sequence.leaf, slot)
        sequence.computed = base.end
        sequence.order = self._orders
        self._orders += 1
        self.running[sequence] = None
        if leader is not None:
            sequence.leader = leader
            leader.followers.append(sequence)
        else:
            self.prefilling[sequence] = None
            self.leaders[context] = sequence
        if not sequence.drawn:
            self.counts.started += 1
            self.counts.prompt_tokens += len(context)
        self.changed = True
        return True

    def measure(self) -> None:
        """Note the pages in use if they are the most so far."""
        pages = self.pool.capacity - self.pool.free - self.tree.evictable
        if pages > self.counts.peak_pages:
            self.counts.peak_pages = pages
            self.counts.unshared_pages = int(
                self.slots.held[[sequence.slot for sequence in self.running]].sum()
            )

    def close(self) -> None:
        """Give back everything that is still held; for an abandoned or failed run."""
        for sequence in reversed(list(self.running)):
            self.release(sequence.slot)
        self._waiting.clear()
