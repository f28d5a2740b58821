"""The work of one paged attention call cut into tiles, on the host, once for all layers of a step.

A tile is a block of the rows that read a segment, over a piece of the segment's tokens. Segments are split along
their tokens so that few long ones still fill a device; the pieces of a row are merged afterwards. Everything is
vectorised NumPy: a step with a thousand segments takes well below a millisecond of Python. No Triton here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.integer]
SPLIT_MULTIPLE = 128  # tokens: of every block of tokens, so that only the last block of a tile is partial
SHORTEST_SPLIT = 256  # tokens: below this, writing and merging partial results costs more than it spreads
COLUMNS = 6


class TileTable(NamedTuple):
    """What the kernels need beside the segments. int32 tensors on one device; pad rows and slots are never read.

    A row of `narrow` or `wide` is a tile: (start of the segment's pages, first entry, entries, first token, end of the
    tokens, number of the piece). A tile of no entries is padding. Narrow tiles have at most block_rows[0] entries.
    """

    narrow: Tensor  # [N0,6]
    wide: Tensor  # [N1,6]
    entry_slots: Tensor  # [E] where the partial results of an entry begin; piece s is at entry_slots[e] + s
    merge_starts: Tensor  # [T+1] row r merges the slots merge_starts[r] .. merge_starts[r+1]-1, in this order
    slots: int  # partial results to allocate

    def to(self, device: torch.device) -> TileTable:
        tensors = (self.narrow, self.wide, self.entry_slots, self.merge_starts)
        narrow, wide, entry_slots, merge_starts = (tensor.to(device) for tensor in tensors)
        return TileTable(narrow, wide, entry_slots, merge_starts, self.slots)


class TileCapacity(NamedTuple):
    """Sizes that a padded TileTable has whatever the step holds, so that a CUDA graph can be captured once."""

    narrow: int
    wide: int
    entries: int
    slots: int


def tile_capacity(
    *, segments: int, entries: int, block_rows: tuple[int, int], target_tiles: int
) -> TileCapacity:
    """Enough for any step of at most `segments` segments and `entries` entries.

    Splitting adds at most target_tiles tiles to one for each block of rows, see `make_tiles`.
    """
    narrow, wide = block_rows
    return TileCapacity(
        narrow=segments + target_tiles,
        wide=entries // wide + entries // (narrow + 1) + 1 + target_tiles,
        entries=entries,
        slots=entries + target_tiles * wide,
    )


def _ranges(counts: Integers) -> Integers:
    """0 .. counts[0]-1, 0 .. counts[1]-1, ... in one array."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _padded(rows: Integers, size: int | None, what: str) -> Tensor:
    if size is not None:
        if len(rows) > size:
            raise ValueError(
                f"the step needs {len(rows)} {what}, its capacity is {size}; take a larger tile_capacity"
            )
        rows = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32))


def make_tiles(
    page_starts: Integers,  # [G]
    lengths: Integers,  # [G]
    rows: Integers,  # [E]
    row_starts: Integers,  # [G+1]
    limits: Integers,  # [E]
    *,
    query_rows: int,
    block_rows: tuple[int, int],
    target_tiles: int,
    capacity: TileCapacity | None = None,
) -> TileTable:
    """The tiles of one call, from the host's copies of its segments (see `Segments`), on the CPU.

    query_rows: T, the rows of the query. block_rows: entries that a narrow and a wide tile hold; a segment that more
    rows read than fit a narrow tile gets wide ones. target_tiles: segments are split into pieces of about a
    1/target_tiles of the work, of 256 tokens at least; the same arguments always give the same pieces. capacity: pad
    to these sizes. Tokens past the largest limit of a tile are left out. Longest tiles come first, so that the short
    ones fill the end of the launch.
    Raises ValueError for a limit outside its segment, a row outside the query, or a step that exceeds the capacity.
    """
    narrow, wide = block_rows
    if target_tiles < 1 or not 1 <= narrow <= wide:
        raise ValueError(
            f"need target_tiles >= 1 and 1 <= narrow <= wide block_rows, got {target_tiles} and {block_rows}"
        )
    rows, limits = np.asarray(rows, dtype=np.int64), np.asarray(limits, dtype=np.int64)
    starts_of_rows = np.asarray(row_starts, dtype=np.int64)
    entries = starts_of_rows[1:] - starts_of_rows[:-1]
    if len(rows) and (rows.min() < 0 or rows.max() >= query_rows):
        raise ValueError(f"rows span [{rows.min()}, {rows.max()}], the query has {query_rows} rows")
    if len(limits) and (limits.min() < 0 or bool((limits > np.repeat(lengths, entries)).any())):
        raise ValueError("a limit lies outside [0, length] of its segment; cut it to the segment's length")

    # Blocks of rows: they cover the entries one after the other without a gap.
    block = np.where(entries > narrow, wide, narrow)
    blocks = -(-entries // block)
    segment = np.repeat(np.arange(len(entries)), blocks)
    within = _ranges(blocks) * block[segment]
    first = starts_of_rows[segment] + within
    count = np.minimum(block[segment], entries[segment] - within)
    seen = np.maximum.reduceat(limits, first) if len(first) else first

    # Pieces: the sum over blocks of ceil(seen / length) is at most blocks + target_tiles.
    length = max(SHORTEST_SPLIT, -(-int(seen.sum()) // target_tiles))
    length = -(-length // SPLIT_MULTIPLE) * SPLIT_MULTIPLE
    pieces = -(-seen // length)
    piece = _ranges(pieces)
    source = np.repeat(np.arange(len(first)), pieces)
    begin = piece * length
    end = np.minimum(seen[source], begin + length)
    starts = np.asarray(page_starts, dtype=np.int64)[segment[source]]
    tiles = np.stack([starts, first[source], count[source], begin, end, piece], axis=1)
    order = np.argsort(begin - end, kind="stable")
    is_wide = (entries > narrow)[segment[source]]

    # The slots of a row lie side by side in the order of its entries: merging needs no list.
    entry_pieces = np.repeat(pieces, count)
    by_row = np.argsort(rows, kind="stable")
    ends = np.cumsum(entry_pieces[by_row])
    entry_slots = np.empty(len(rows), dtype=np.int64)
    entry_slots[by_row] = ends - entry_pieces[by_row]
    of_rows = np.bincount(rows, weights=entry_pieces, minlength=query_rows).astype(np.int64)
    merge_starts = np.concatenate([[0], np.cumsum(of_rows)])

    slots = int(merge_starts[-1])
    if capacity is not None and slots > capacity.slots:
        raise ValueError(
            f"the step needs {slots} slots, its capacity is {capacity.slots}; take a larger tile_capacity"
        )
    return TileTable(
        narrow=_padded(tiles[order[~is_wide[order]]], capacity and capacity.narrow, "narrow tiles"),
        wide=_padded(tiles[order[is_wide[order]]], capacity and capacity.wide, "wide tiles"),
        entry_slots=_padded(entry_slots, capacity and capacity.entries, "entries"),
        merge_starts=_padded(merge_starts, None, ""),
        slots=slots if capacity is None else capacity.slots,
    )
