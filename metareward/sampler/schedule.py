"""What runs next: each step's chunks of prompts and next tokens, and what becomes of the tokens that come back.

Who runs at all is decided in admission.py. Plain Python and numpy without torch: the property tests run it
against an oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from metareward.sampler.admission import Admission, Counts
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
        self.page_size = tree.page_size
        self.max_new_tokens = max_new_tokens
        self.max_step_tokens = max_step_tokens
        self.admission = Admission(
            requests,
            pool,
            tree,
            root,
            key_of=key_of,
            max_running=max_running,
            max_new_tokens=max_new_tokens,
            margin=margin,
        )
        self.slots: Slots = self.admission.slots
        self._root = root
        self._tree = tree
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._copies: list[tuple[int, int]] = []
        self._unsettled: list[Node] = []
        self._shared: SharedSegments | None = None

    @property
    def counts(self) -> Counts:
        return self.admission.counts

    @property
    def running(self) -> dict[Sequence, None]:
        """The sequences that have a slot, in the order of admission."""
        return self.admission.running

    def next_step(self) -> Step | None:
        """The next step, or None when nothing can be computed before results come back, or at all.

        Raises:
            UserError: a request needs more pages than the whole pool has.
        """
        self._settle()
        self.admission.grow()
        self.admission.admit()
        decoding = self.slots.active.copy()
        chunks, ready = self._chunks(len(decoding))
        if len(decoding) == 0 and not chunks:
            return None
        if self._shared is None or self.admission.changed:
            self._shared = shared_segments(self._root, self.slots, self.page_size)
            self.admission.changed = False
        self.slots.lengths[decoding] += 1
        self.admission.measure()
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
            self.admission.changed = True
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
            self.admission.estimate.add(int(counts[index]) + 1)
            self.admission.release(slot)
        return completions, len(tokens)

    def close(self) -> None:
        """Give back everything that is still held; for an abandoned or failed run."""
        self.admission.close()

    def _chunks(self, decoding: int) -> tuple[list[Chunk], list[Sequence | None]]:
        """The prompt tokens of this step, and for every chunk the sequence that it completes, or None."""
        budget = max(self.max_step_tokens - decoding, self.page_size)
        chunks: list[Chunk] = []
        ready: list[Sequence | None] = []
        for sequence in list(self.admission.prefilling):
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
                del self.admission.prefilling[sequence]
                del self.admission.leaders[sequence.context]
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
            self._tree.leave(node, sequence.slot, until=after)
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
            self.admission.changed = True
            draws.append(np.full(len(members), index))
            draw_slots.append(np.array([member.slot for member in members], dtype=np.int64))
        return np.concatenate(draws), np.concatenate(draw_slots)
