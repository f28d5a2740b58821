"""The host-made tiles of paged attention: every visible token of every entry in one tile, one slot a piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metareward_kernels.attention_tiles import TileTable, make_tiles, tile_capacity

ROWS = 9


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    lengths, rows, limits, row_starts = [], [], [], [0]
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.one_of(st.integers(0, 40), st.integers(200, 3000)))
        readers = draw(st.lists(st.integers(0, ROWS - 1), max_size=12))
        lengths.append(length)
        rows += readers
        limits += [draw(st.sampled_from([0, length // 2, length])) for _ in readers]
        row_starts.append(len(rows))
    narrow = draw(st.integers(1, 4))
    return {
        "page_starts": np.arange(len(lengths), dtype=np.int64) * 1000,
        "lengths": np.array(lengths, dtype=np.int64),
        "rows": np.array(rows, dtype=np.int64),
        "row_starts": np.array(row_starts),
        "limits": np.array(limits, dtype=np.int64),
        "query_rows": ROWS,
        "block_rows": (narrow, draw(st.integers(narrow, 6))),
        "target_tiles": draw(st.integers(1, 20)),
    }


def check(table: TileTable, step: dict[str, Any]) -> None:
    narrow, wide = step["block_rows"]
    covered = [np.zeros(limit, dtype=int) for limit in step["limits"]]
    slots: list[list[int]] = [[] for _ in step["limits"]]
    for tiles, most in ((table.narrow, narrow), (table.wide, wide)):
        for start, first, entries, begin, end, piece in tiles.tolist():
            assert entries <= most
            for entry in range(first, first + entries):
                segment = int(np.searchsorted(step["row_starts"], entry, side="right")) - 1
                assert start == step["page_starts"][segment]
                assert 0 <= begin < end <= step["lengths"][segment]
                covered[entry][begin:end] += 1
                slots[entry].append(int(table.entry_slots[entry]) + piece)
    assert all((count == 1).all() for count in covered)
    # Row after row, entry after entry, piece after piece: the slots count up from 0 without a gap.
    starts = table.merge_starts.tolist()
    in_order = [
        sorted(slots[entry]) for row in range(ROWS) for entry in np.flatnonzero(step["rows"] == row).tolist()
    ]
    assert [slot for part in in_order for slot in part] == list(range(starts[-1]))
    assert starts[-1] <= table.slots
    for row in range(ROWS):
        of_row = [slot for entry in np.flatnonzero(step["rows"] == row) for slot in slots[entry]]
        assert starts[row + 1] - starts[row] == len(of_row)


@settings(max_examples=150)
@given(step=steps())
def test_every_visible_token_lies_in_one_tile(step: dict[str, Any]) -> None:
    table = make_tiles(**step)
    check(table, step)
    sizes = {name: step[name] for name in ("block_rows", "target_tiles")}
    capacity = tile_capacity(segments=len(step["lengths"]), entries=len(step["rows"]), **sizes)
    padded = make_tiles(**step, capacity=capacity)  # the capacity is always enough
    check(padded, step)
    assert padded.narrow[: len(table.narrow)].equal(table.narrow)
    assert padded.wide[: len(table.wide)].equal(table.wide)
    assert [len(part) for part in padded[:3]] == list(capacity[:3])


def test_longest_tiles_come_first_and_split_evenly() -> None:
    step = {
        "page_starts": np.array([0, 100]),
        "lengths": np.array([100, 4096]),
        "rows": np.array([0, 1]),
        "row_starts": np.array([0, 1, 2]),
        "limits": np.array([100, 4096]),
        "query_rows": 2,
        "block_rows": (4, 16),
    }
    table = make_tiles(**step, target_tiles=8)
    assert (table.narrow[:, 4] - table.narrow[:, 3]).tolist() == [640] * 6 + [256, 100]
    assert len(make_tiles(**step, target_tiles=1).narrow) == 2


def test_mistakes() -> None:
    step: dict[str, Any] = {
        "page_starts": np.array([0]),
        "lengths": np.array([10]),
        "rows": np.array([0, 1]),
        "row_starts": np.array([0, 2]),
        "limits": np.array([10, 3]),
        "query_rows": 2,
        "block_rows": (1, 4),
        "target_tiles": 2,
    }
    capacity = tile_capacity(segments=1, entries=2, block_rows=(1, 4), target_tiles=2)
    for change, message in [
        ({"limits": np.array([11, 3])}, "limit lies outside"),
        ({"query_rows": 1}, "the query has 1 rows"),
        ({"target_tiles": 0}, "target_tiles >= 1"),
        ({"block_rows": (4, 1)}, "block_rows"),
        ({"capacity": capacity._replace(wide=0)}, "1 wide tiles, its capacity is 0"),
        ({"capacity": capacity._replace(slots=1)}, "2 slots, its capacity is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_tiles(**{**step, **change})
