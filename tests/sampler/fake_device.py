"""A device for the schedule's tests: its cache holds hashes instead of keys and values, and it checks what is read.

The device gives every row the hash of all tokens up to it. A row may read a place only if that holds the hash of
the same sequence at that position, and it must read each of its positions exactly once. What is drawn is a function
of hash and key, so a lost, doubled or stale token shows in the completions.
"""

from __future__ import annotations

import numpy as np

from metareward.sampler.request import Completion, Request
from metareward.sampler.step import Step

STOP = 0


def extend(state: int, token: int) -> int:
    """Hash of a prefix and one token more."""
    return hash((state, token))


def draw(state: int, key: int, count: int) -> int:
    """The token a request draws after a prefix; about one in ten is the stop."""
    return hash((state, key, count)) % 10


class FakeDevice:
    """Runs steps on a cache of hashes and checks everything that they read."""

    def __init__(self, page_size: int, slots: int) -> None:
        self.page_size = page_size
        self.cache: dict[int, tuple[int, int]] = {}  # place -> (position, hash)
        self.newest = [-1] * slots
        self.chains: dict[int, list[int]] = {}  # hash of a prefix of a prompt -> hashes of all its prefixes

    def run(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        self._copy(step)
        inputs = [self.newest[slot] for slot in step.decode_slots] + step.token_ids.tolist()
        size = len(inputs)
        assert size == len(step.positions) == len(step.places) > 0
        assert len(set(step.places.tolist())) == size, "two rows write one place"
        seen = self._places_read(step)
        # Rows of one sequence depend on each other; ascending positions respect that.
        states: dict[int, int] = {}
        for row in sorted(range(size), key=lambda row: step.positions[row]):
            position, place = int(step.positions[row]), int(step.places[row])
            before = sorted(entry for at in seen[row] if at != place for entry in [self.cache[at]])
            assert [at for at, _ in before] == list(range(position)), (
                "a row misses a position or reads one twice"
            )
            assert place in seen[row], "a row does not read itself"
            state = before[-1][1] if before else 0
            self.cache[place] = (position, extend(state, inputs[row]))
            states[row] = self.cache[place][1]
            self.checked(before, state)
        logits = [states[int(row)] for row in step.logit_rows]
        tokens = [
            draw(logits[at], int(key), int(count))
            for at, key, count in zip(step.draws, step.draw_keys, step.draw_counts, strict=True)
        ]
        for slot, token in zip(step.draw_slots, tokens, strict=True):
            self.newest[slot] = token
        return np.array(tokens, dtype=np.int64), -np.array(tokens, dtype=np.float32)

    def checked(self, before: list[tuple[int, int]], state: int) -> None:
        """All hashes read are of one sequence: each position's hash is known to have led to the last."""
        chain = self.chains.get(state)
        if chain is None:
            return
        assert [value for _, value in before] == chain

    def _copy(self, step: Step) -> None:
        size = self.page_size
        read = {
            int(target) * size + slot: self.cache.get(int(source) * size + slot)
            for source, target in step.copies
            for slot in range(size)
        }
        for place, content in read.items():
            self.cache.pop(place, None)
            if content is not None:
                self.cache[place] = content

    def _places_read(self, step: Step) -> list[list[int]]:
        s, size = step.segments, self.page_size
        seen: list[list[int]] = [[] for _ in step.positions]
        for g in range(len(s.lengths)):
            for entry in range(s.row_starts[g], s.row_starts[g + 1]):
                limit = int(s.limits[entry])
                assert 0 <= limit <= s.lengths[g]
                for token in range(limit):
                    page = int(s.page_ids[s.page_starts[g] + token // size])
                    seen[s.rows[entry]].append(page * size + token % size)
        return seen


def expected(request: Request, max_new_tokens: int) -> Completion:
    """The completion by the definition, one request at a time."""
    state, tokens = 0, list[int]()
    for token in request.prompt:
        state = extend(state, token)
    key = hash(request.identity)
    while len(tokens) < max_new_tokens and STOP not in tokens:
        tokens.append(draw(state, key, len(tokens)))
        state = extend(state, tokens[-1])
    return Completion(request.identity, tokens, STOP in tokens, [-float(token) for token in tokens])
