"""The arrays of the running sequences keep each row's data together through removals."""

from __future__ import annotations

import random

import numpy as np

from metareward.sampler.batch import Batch
from metareward.sampler.request import Request
from metareward.sampler.schedule import Sequence


def test_random_add_record_remove_agrees_with_lists() -> None:
    rng = random.Random(0)
    batch = Batch(max_running=6, max_new_tokens=8, page_size=2, stop_ids=[7, 9])
    oracle: dict[str, tuple[Sequence, list[int], list[float]]] = {}
    finished = 0
    for step in range(5000):
        first = batch.size
        while batch.size < 6 and rng.random() < 0.5:
            prompt = tuple(range(rng.randint(1, 9)))
            pages = [rng.randrange(100) for _ in range((len(prompt) + 8) // 2)]
            sequence = Sequence(Request(f"{step}/{batch.size}", prompt), pages)
            batch.add(sequence, key=step)
            oracle[sequence.request.identity] = (sequence, [], [])
        if batch.size == first:
            first = 0
            slots = batch.append_slots()
            for row in range(batch.size):
                sequence, tokens, _ = oracle[batch.sequences[row].request.identity]
                position = len(sequence.request.prompt) + len(tokens) - 1
                assert slots[row] == sequence.pages[position // 2] * 2 + position % 2
                assert batch.lengths[row] == position + 1
        tokens = np.array([rng.randrange(30) for _ in range(first, batch.size)], dtype=np.int64)
        done = batch.record(first, tokens, tokens.astype(np.float32) / 64)
        for row, token in zip(range(first, batch.size), tokens.tolist(), strict=True):
            _, kept, kept_logprobs = oracle[batch.sequences[row].request.identity]
            kept.append(token)
            kept_logprobs.append(token / 64)
            assert done[row - first] == (token in (7, 9) or len(kept) == 8)
        for row in reversed((first + np.flatnonzero(done)).tolist()):
            completion = batch.completion(row)
            sequence, kept, kept_logprobs = oracle.pop(completion.identity)
            assert completion.token_ids == kept
            assert completion.logprobs == kept_logprobs
            assert completion.finished == (kept[-1] in (7, 9))
            assert batch.remove(row) is sequence
            finished += 1
        assert batch.size == len(oracle) == len(batch.sequences)
        for row in range(batch.size):
            sequence, kept, _ = oracle[batch.sequences[row].request.identity]
            width = len(sequence.pages)
            assert batch.page_table[row, :width].tolist() == sequence.pages
            assert not batch.page_table[row, width:].any()
            assert (batch.last[row], batch.counts[row]) == (kept[-1], len(kept))
    assert finished > 500


def test_no_stop_ids_means_length_only() -> None:
    batch = Batch(max_running=1, max_new_tokens=2, page_size=2, stop_ids=[])
    batch.add(Sequence(Request("a", (1,)), [0]), key=0)
    one = np.zeros(1, dtype=np.float32)
    assert not batch.record(0, np.array([0]), one).any()
    assert batch.record(0, np.array([0]), one).all()
    assert not batch.completion(0).finished
