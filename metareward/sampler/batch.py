"""The host's state of the running sequences: preallocated arrays, one row a sequence, updated in place.

The rows in use are always 0 .. size-1, so a decode step works on views of the arrays and no list is rebuilt
from Python objects at every token. A finished row is filled by moving the last one there.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from metareward.sampler.request import Completion
from metareward.sampler.schedule import Sequence


class Batch:
    """Arrays for up to ``max_running`` sequences (R) of up to ``max_new_tokens`` new tokens (N).

    page_table [R, M] int32   pages in the order of positions; 0 past a sequence's own
    lengths    [R] int32      tokens whose keys and values are in the cache
    last       [R] int64      the newest token, the next input
    keys       [R] int64      random key of the request
    counts     [R] int64      new tokens so far, and so the counter of the next random number
    tokens     [R, N] int64   new tokens
    logprobs   [R, N] float32 their raw log-probabilities
    """

    def __init__(self, max_running: int, max_new_tokens: int, page_size: int, stop_ids: Seq[int]) -> None:
        self.size = 0
        self.page_size = page_size
        self.page_table: NDArray[np.int32] = np.zeros((max_running, 1), dtype=np.int32)
        self.lengths = np.zeros(max_running, dtype=np.int32)
        self.last = np.zeros(max_running, dtype=np.int64)
        self.keys = np.zeros(max_running, dtype=np.int64)
        self.counts = np.zeros(max_running, dtype=np.int64)
        self.tokens = np.zeros((max_running, max_new_tokens), dtype=np.int64)
        self.logprobs = np.zeros((max_running, max_new_tokens), dtype=np.float32)
        self.sequences: list[Sequence] = []
        self._stop_ids = np.array(sorted(stop_ids), dtype=np.int64)
        self._arrays = (self.lengths, self.last, self.keys, self.counts, self.tokens, self.logprobs)

    def add(self, sequence: Sequence, key: int) -> None:
        """Start a sequence whose prompt is in its pages. It has no token yet: ``record`` comes next."""
        row, width = self.size, len(sequence.pages)
        if width > self.page_table.shape[1]:
            table = np.zeros((len(self.page_table), width), dtype=np.int32)
            table[:, : self.page_table.shape[1]] = self.page_table
            self.page_table = table
        self.page_table[row, :width] = sequence.pages
        self.page_table[row, width:] = 0
        self.lengths[row] = len(sequence.request.prompt)
        self.keys[row] = key
        self.counts[row] = 0
        self.sequences.append(sequence)
        self.size += 1

    def append_slots(self) -> NDArray[np.int64]:
        """Make room for one more token in each row: ``lengths`` grow by one.

        Returns the new tokens' places [size] in the cache seen as a flat row of slots.
        """
        positions = self.lengths[: self.size]
        pages = self.page_table[np.arange(self.size), positions // self.page_size]
        slots = pages.astype(np.int64) * self.page_size + positions % self.page_size
        positions += 1
        return slots

    def record(
        self, first: int, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Append one token to each of the rows from ``first`` on; returns which of them are now complete."""
        rows = np.arange(first, self.size)
        counts = self.counts[first : self.size]
        self.tokens[rows, counts] = tokens
        self.logprobs[rows, counts] = logprobs
        self.last[first : self.size] = tokens
        counts += 1
        return np.isin(tokens, self._stop_ids) | (counts == self.tokens.shape[1])

    def completion(self, row: int) -> Completion:
        """The row's result as it stands."""
        count = self.counts[row]
        return Completion(
            identity=self.sequences[row].request.identity,
            token_ids=self.tokens[row, :count].tolist(),
            finished=bool(np.isin(self.last[row], self._stop_ids)),
            logprobs=self.logprobs[row, :count].tolist(),
        )

    def remove(self, row: int) -> Sequence:
        """Drop a row; the last row moves into its place."""
        last = self.size - 1
        if row != last:
            for array in self._arrays:
                array[row] = array[last]
            self.page_table[row] = self.page_table[last]
        sequence, self.sequences[row] = self.sequences[row], self.sequences[last]
        self.sequences.pop()
        self.size = last
        return sequence
