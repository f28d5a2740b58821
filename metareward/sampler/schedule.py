"""Who runs next: admission, growth, preemption, and the chunks of prompts that go into a step.

Requests are drawn lazily, one ahead. Prompts share whole pages through the prefix tree, also with prompts that
are computed in the same step: keys and values of all rows are written before any row attends. Requests with one
prompt follow the first of them: it computes the prompt, they start from the same logits with a copy of the
partly filled last page.

A sequence takes pages as it grows. When none is left, prefixes that nobody reads go first, then the sequence
admitted last gives way: what it has drawn is kept, and its whole pages stay in the tree until they are wanted.
The sequence admitted first can therefore always go on, and it fits alone, which is checked when a request is
drawn: nothing deadlocks.

Plain Python and numpy without torch: the property tests run it against an oracle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from metareward.errors import UserError
from metareward.sampler.pages import PagePool
from metareward.sampler.prefix_tree import Node, PrefixTree
from metareward.sampler.request import Completion, Request
from metareward.sampler.slots import Sequence, Slots
from metareward.sampler.step import (
    Chunk,
    Long,
    SharedSegments,
    Step,
    build_segments,
    places_of,
    shared_segments,
)


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


class Scheduler:
    """Puts steps together and takes their results.

    ``root`` is the tree's root for the weights in use; ``key_of`` gives the random key of an identity.
    ``max_step_tokens`` bounds the rows of a step: decoding sequences first, then prompt tokens (a page of them at
    least, so that prompts get on beside any number of decoding sequences). ``margin``: pages are left for running
    sequences to grow to this many times the mean length of those that are through; less admits more at once and
    preempts more often.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pool: PagePool,
        tree: PrefixTree,
        root: Node,
        *,
        key_of: Callable[[str], int],
        stop_ids: Iterable[int],
        max_running: int,
        max_new_tokens: int,
        max_step_tokens: int,
        margin: float = 1.25,
    ) -> None:
        self.pool = pool
        self.tree = tree
        self.slots = Slots(max_running, max_new_tokens)
        self.page_size = tree.page_size
        self.max_new_tokens = max_new_tokens
        self.max_step_tokens = max_step_tokens
        self.running: dict[Sequence, None] = {}  # in the order of admission
        self.preemptions = 0
        self.peak_pages = 0
        self.unshared_pages = 0  # what the sequences at that peak would hold if nothing were shared
        self.prompt_tokens = 0
        self.started = 0
        self._root = root
        self._key_of = key_of
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._source: Iterator[Request] = iter(requests)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: dict[Sequence, None] = {}
        self._leaders: dict[tuple[int, ...], Sequence] = {}
        self._estimate = LengthEstimate(max_new_tokens, margin)
        self._orders = 0
        self._copies: list[tuple[int, int]] = []
        self._unsettled: list[Node] = []
        self._shared: SharedSegments | None = None

    def next_step(self) -> Step | None:
        """The next step, or None when nothing can be computed before results come back, or at all.

        Raises:
            UserError: a request needs more pages than the whole pool has.
        """
        self._settle()
        self._grow()
        self._admit()
        decoding = self.slots.active.copy()
        chunks, ready = self._chunks(len(decoding))
        if len(decoding) == 0 and not chunks:
            return None
        if self._shared is None:
            self._shared = shared_segments(self._root, self.slots, self.page_size)
        self.slots.lengths[decoding] += 1
        self._measure()
        positions, places = places_of(self.slots, decoding, chunks, self.page_size)
        segments = build_segments(self._shared, self.slots, decoding, chunks, self.page_size)
        ends = len(decoding) + np.cumsum([len(chunk.tokens) for chunk in chunks], dtype=np.int64) - 1
        last = [index for index, sequence in enumerate(ready) if sequence is not None]
        # A page given back and taken again since may be copied to twice: the later copy counts.
        copies = {target: source for source, target in self._copies}
        self._copies = []
        draws, draw_slots = self._draws(decoding, [sequence for sequence in ready if sequence is not None])
        step = Step(
            copies=np.array([(copies[to], to) for to in copies], dtype=np.int64).reshape(-1, 2),
            decode_slots=decoding,
            token_ids=np.array([token for chunk in chunks for token in chunk.tokens], dtype=np.int64),
            positions=positions,
            places=places,
            segments=segments,
            logit_rows=np.concatenate((np.arange(len(decoding)), ends[last])),
            draws=draws,
            draw_slots=draw_slots,
            draw_keys=self.slots.keys[draw_slots],
            draw_counts=self.slots.counts[draw_slots],
            draw_generations=self.slots.generation[draw_slots],
        )
        self.slots.counts[draw_slots] += 1
        exhausted = decoding[self.slots.counts[decoding] == self.max_new_tokens]
        for slot in exhausted.tolist():
            self.slots.stop_decoding(slot)
            self._shared = None
        return step

    def record(
        self, step: Step, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]
    ) -> tuple[list[Completion], int]:
        """Take the tokens [S] and log-probs [S] of a step; returns what is complete, and how many tokens counted.

        Tokens for sequences that ended or were preempted since the step was made are dropped.

        Raises:
            FloatingPointError: a token is -1, which says that the row of logits had NaN or nothing finite.
        """
        slots = self.slots
        valid = slots.generation[step.draw_slots] == step.draw_generations
        slot_ids, counts = step.draw_slots[valid], step.draw_counts[valid]
        tokens, logprobs = tokens[valid], logprobs[valid]
        bad = np.flatnonzero(tokens < 0)
        if len(bad):
            sequence = slots.sequences[slot_ids[bad[0]]]
            assert sequence is not None
            raise FloatingPointError(
                f"the model's logits for request {sequence.request.identity!r} are NaN or all -inf at "
                f"new token {int(counts[bad[0]])}: weights or activations are not finite"
            )
        slots.tokens[slot_ids, counts] = tokens
        slots.logprobs[slot_ids, counts] = logprobs
        slots.recorded[slot_ids] = counts + 1
        stopped = np.isin(tokens, self._stop_ids)
        done = np.flatnonzero(stopped | (counts + 1 == self.max_new_tokens))
        completions = []
        for index in done.tolist():
            slot = int(slot_ids[index])
            completions.append(slots.completion(slot, bool(stopped[index])))
            self._estimate.add(int(counts[index]) + 1)
            self._release(slot)
        return completions, len(tokens)

    def close(self) -> None:
        """Give back everything that is still held; for an abandoned or failed run."""
        for sequence in reversed(list(self.running)):
            self._release(sequence.slot)
        self._waiting.clear()

    # Growth and preemption

    def _grow(self) -> None:
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
        self.preemptions += 1
        count = int(slots.recorded[slot])
        sequence.drawn = slots.tokens[slot, :count].tolist()
        sequence.logprobs = slots.logprobs[slot, :count].tolist()
        sequence.context = (*sequence.request.prompt, *sequence.drawn)
        if slots.row_of[slot] >= 0:
            self._keep_pages(sequence)
        self._release(slot)
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

    def _release(self, slot: int) -> None:
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
        if self._leaders.get(sequence.context) is sequence:
            del self._leaders[sequence.context]
        self._prefilling.pop(sequence, None)
        del self.running[sequence]
        sequence.leaf = sequence.leader = sequence.after = sequence.copy_from = None
        sequence.computed = 0
        slots.release(slot)
        self._shared = None

    # Admission

    def _admit(self) -> None:
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
            need = most_pages(len(request.prompt), self.max_new_tokens, self.page_size)
            if need > self.pool.capacity:
                raise UserError(
                    f"request {request.identity!r} needs {need * self.page_size} tokens of key-value cache "
                    f"({len(request.prompt)} of prompt and up to {self.max_new_tokens} new) and the cache "
                    f"has {self.pool.capacity * self.page_size}: raise kv_tokens or lower max_new_tokens"
                )
            self._waiting.append(Sequence(request, self._key_of(request.identity), request.prompt))
        return self._waiting[0]

    def _expected_growth(self, drawn: int) -> float:
        """Pages a sequence will still take, from the lengths of those that are through."""
        return max(self._estimate.tokens - drawn, 1.0) / self.page_size

    def _expected_pages(self) -> float:
        counts = self.slots.counts[[sequence.slot for sequence in self.running]]
        return float(np.maximum(self._estimate.tokens - counts, 1.0).sum()) / self.page_size

    def _enter(self, sequence: Sequence, growth: float) -> bool:
        """Give the sequence a slot and its context's pages if ``growth`` pages remain for later; whether it did."""
        tree, slots, slot = self.tree, self.slots, self.slots.next_free()
        context, leader = sequence.context, self._leaders.get(sequence.context)
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
            self._prefilling[sequence] = None
            self._leaders[context] = sequence
        if not sequence.drawn:
            self.started += 1
            self.prompt_tokens += len(context)
        self._shared = None
        return True

    # Prefill

    def _chunks(self, decoding: int) -> tuple[list[Chunk], list[Sequence | None]]:
        """The prompt tokens of this step, and for every chunk the sequence that it completes, or None."""
        budget = max(self.max_step_tokens - decoding, self.page_size)
        chunks: list[Chunk] = []
        ready: list[Sequence | None] = []
        for sequence in list(self._prefilling):
            if budget == 0:
                break
            if not self._may_compute(sequence):
                continue
            start = sequence.computed
            tokens = sequence.context[start : start + budget]
            budget -= len(tokens)
            chunks.append(Chunk(sequence.slot, start, tokens))
            sequence.computed += len(tokens)
            self._mark(sequence, start)
            complete = sequence.computed == len(sequence.context)
            ready.append(sequence if complete else None)
            if complete:
                del self._prefilling[sequence]
                del self._leaders[sequence.context]
        return chunks, ready

    def _may_compute(self, sequence: Sequence) -> bool:
        """Whether all that the sequence's next token reads is, or will be in this step, in the cache."""
        after = sequence.after
        assert after is not None
        if after.computed < len(after.tokens):
            return False
        if sequence.copy_from is not None:
            node, page, tokens = sequence.copy_from
            if node.settled < tokens:
                return False
            own = int(self.slots.page_table[sequence.slot, after.end // self.page_size])
            self._copies.append((page, own))
            self.tree.leave(node, sequence.slot, until=after)
            sequence.copy_from = None
            sequence.computed += tokens
        return True

    def _mark(self, sequence: Sequence, start: int) -> None:
        """Tell the tree how far the sequence's context is computed, from position ``start`` on."""
        node = sequence.leaf
        while node is not None and node.end > start:
            node.computed = min(len(node.tokens), sequence.computed - node.start)
            if node.computed > 0:
                self._unsettled.append(node)
            node.computed = max(node.computed, 0)
            node = node.parent

    def _settle(self) -> None:
        """What earlier steps computed may now be copied."""
        for node in self._unsettled:
            node.settled = node.computed
        self._unsettled.clear()

    def _draws(self, decoding: Long, ready: list[Sequence]) -> tuple[Long, Long]:
        """Which logits give tokens to which slots: every decoding one, then those whose prompt is complete, with
        their followers. They decode from the next step on, the followers on copies of the last page."""
        draws, draw_slots = [np.arange(len(decoding))], [decoding]
        for index, leader in enumerate(ready, len(decoding)):
            members = [leader, *leader.followers]
            length = len(leader.context)
            for member in members:
                self.slots.lengths[member.slot] = length
                member.computed = length
                if member.leader is not None and length % self.page_size:
                    last = length // self.page_size
                    table = self.slots.page_table
                    self._copies.append((int(table[leader.slot, last]), int(table[member.slot, last])))
                member.leader = None
                if self.slots.counts[member.slot] + 1 < self.max_new_tokens:
                    self.slots.start_decoding(member.slot)
            leader.followers.clear()
            self._shared = None
            draws.append(np.full(len(members), index))
            draw_slots.append(np.array([member.slot for member in members], dtype=np.int64))
        return np.concatenate(draws), np.concatenate(draw_slots)

    def _measure(self) -> None:
        pages = self.pool.capacity - self.pool.free - self.tree.evictable
        if pages > self.peak_pages:
            self.peak_pages = pages
            self.unshared_pages = int(self.slots.held[[sequence.slot for sequence in self.running]].sum())
