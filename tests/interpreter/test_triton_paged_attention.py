"""Triton's paged attention in the interpreter against a dense softmax a row: trees, causal chunks, garbage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from metareward_kernels.attention_tiles import make_tiles, tile_capacity
from metareward_kernels.triton_paged_attention import block_rows, paged_attention_triton
from torch import Tensor

Run = Callable[..., Any]

SHAPES = [  # Hq, Hk, D, page, dtype
    (6, 2, 64, 16, torch.float32),
    (4, 4, 80, 8, torch.float16),
    (7, 1, 128, 32, torch.float32),
    (2, 2, 8, 4, torch.float16),
]


class Segments(NamedTuple):
    page_ids: Tensor
    page_starts: Tensor
    lengths: Tensor
    rows: Tensor
    row_starts: Tensor
    limits: Tensor


class Case(NamedTuple):
    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    segments: Segments
    scale: float


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_case(shape: tuple, segments: list[tuple[int, list[int], list[int] | None]], rows: int) -> Case:
    """segments: (length, rows, limits; None sees all). Whatever no segment names is NaN, unused page ids are garbage."""
    query_heads, kv_heads, dim, page, dtype = shape
    generator = torch.Generator().manual_seed(rows)
    used = [math.ceil(length / page) for length, _, _ in segments]
    pages = sum(used) + 3
    free = torch.randperm(pages, generator=generator).tolist()
    # Pages that are a view of a wider allocation: strides are not what the shape says.
    whole = torch.full((pages, page, kv_heads + 1, 2 * dim), math.nan, dtype=dtype)
    keys, values = whole[:, :, :kv_heads, :dim], whole[:, :, 1:, dim:]
    page_ids: list[int] = [2**31 - 1]
    page_starts, limits = [], []
    for (length, readers, given), count in zip(segments, used, strict=True):
        page_starts.append(len(page_ids))
        mine = [free.pop() for _ in range(count)]
        page_ids += [*mine, -1, 2**31 - 1]
        limits += [length] * len(readers) if given is None else given
        for token in range(length):
            for store in (keys, values):
                at = store[mine[token // page], token % page]
                at.copy_(torch.randn(kv_heads, dim, generator=generator))
    row_starts = np.cumsum([0, *(len(readers) for _, readers, _ in segments)]).tolist()
    query = torch.randn(rows, query_heads, dim, generator=generator).to(dtype)
    built = Segments(
        integers(page_ids),
        integers(page_starts),
        integers([length for length, _, _ in segments]),
        integers([row for _, readers, _ in segments for row in readers]),
        integers(row_starts),
        integers(limits),
    )
    return Case(query, keys, values, built, dim**-0.5)


def oracle(case: Case) -> Tensor:
    query, key_pages, value_pages, segments, scale = case
    page, group = key_pages.shape[1], query.shape[1] // key_pages.shape[2]
    seen: list[list[tuple[int, int]]] = [[] for _ in range(len(query))]
    for g, start in enumerate(segments.page_starts.tolist()):
        for entry in range(int(segments.row_starts[g]), int(segments.row_starts[g + 1])):
            for token in range(int(segments.limits[entry])):
                place = (int(segments.page_ids[start + token // page]), token % page)
                seen[int(segments.rows[entry])].append(place)
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row, places in enumerate(seen):
        if places:
            index = torch.tensor(places)
            keys = key_pages[index[:, 0], index[:, 1]].double().repeat_interleave(group, dim=1)
            values = value_pages[index[:, 0], index[:, 1]].double().repeat_interleave(group, dim=1)
            weights = (torch.einsum("hd,nhd->hn", query[row].double(), keys) * scale).softmax(dim=1)
            out[row] = torch.einsum("hn,nhd->hd", weights, values)
    return out


def assert_right(case: Case, found: Tensor, tolerance: float = 2e-6) -> None:
    assert found.dtype == case.query.dtype
    if found.dtype == torch.float16:
        tolerance = 2e-3
    torch.testing.assert_close(found.double(), oracle(case), rtol=tolerance, atol=tolerance)


# Rows 0-8 share a root; 0-3 and 4-6 a second level, 5-6 a third; row 7 also reads one token alone; 8 is told to see
# nothing of its own segment; row 9 has no segment, row 10 only one of no tokens, row 11 only limits of 0.
TREE = [
    (37, list(range(9)), None),
    (16, [0, 1, 2, 3], None),
    (5, [4, 5, 6], None),
    (1, [5, 6], None),
    *((1 + 7 * row, [row], None) for row in range(7)),
    (1, [7], None),
    (9, [8], [0]),
    (0, [10], None),
    (20, [11, 3], [0, 13]),
    (4, [], []),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_tree_of_shared_prefixes(run: Run, shape: tuple) -> None:
    case = make_case(shape, TREE, 12)
    found = run(paged_attention_triton, *case)
    assert_right(case, found)
    assert not found[9:].any()


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_causal_prefill_mixed_with_decode(run: Run, shape: tuple) -> None:
    # Rows 0-24 are a chunk behind a cached prefix of 21 tokens; 25 and 26 decode below the same prefix. The limits of
    # the chunk fall, so nothing may depend on their order.
    chunk = list(range(25))
    case = make_case(
        shape, [(21, [*chunk, 25, 26], None), (30, chunk, [29 - row for row in chunk]), (3, [26], None)], 27
    )
    assert_right(case, run(paged_attention_triton, *case))


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_split_along_tokens_and_padded(run: Run, shape: tuple) -> None:
    query_heads, kv_heads, dim, _, dtype = shape
    case = make_case(shape, [(520, [0, 1, 2], [520, 5, 300]), (257, [1], None), (2, [3], None)], 5)
    sizes = {"block_rows": block_rows(dtype, query_heads, kv_heads, dim), "target_tiles": 50}
    host = [case.segments[i].numpy() for i in (1, 2, 3, 4, 5)]
    split = make_tiles(*host, query_rows=5, **sizes)  # type: ignore[arg-type]
    assert torch.cat([split.narrow, split.wide])[:, 5].max() == 2
    found = run(paged_attention_triton, *case, tiles=split)
    assert_right(case, found)
    capacity = tile_capacity(segments=4, entries=9, **sizes)  # type: ignore[arg-type]
    padded = make_tiles(*host, query_rows=5, capacity=capacity, **sizes)  # type: ignore[arg-type]
    assert len(padded.narrow) > len(split.narrow)
    assert torch.equal(run(paged_attention_triton, *case, tiles=padded), found)
    whole = make_tiles(*host, query_rows=5, **{**sizes, "target_tiles": 1})  # type: ignore[arg-type]
    assert not torch.cat([whole.narrow, whole.wide])[:, 5].any()
    assert_right(case, run(paged_attention_triton, *case, tiles=whole))


def test_shared_and_unshared_agree(run: Run) -> None:
    shape = SHAPES[0]
    case = make_case(shape, [(40, list(range(8)), None), *((3, [row], None) for row in range(8))], 8)
    starts = case.segments.page_starts
    alone = Segments(
        case.segments.page_ids,
        torch.cat([starts[:1].repeat(8), starts[1:]]),
        integers([40] * 8 + [3] * 8),
        integers([*range(8), *range(8)]),
        integers(list(range(17))),
        integers([40] * 8 + [3] * 8),
    )
    shared = run(paged_attention_triton, *case)
    unshared = run(paged_attention_triton, *case._replace(segments=alone))
    torch.testing.assert_close(shared, unshared, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [80.0, -100.0])
def test_large_scores(run: Run, offset: float) -> None:
    case = make_case(SHAPES[0], TREE, 12)
    case.key_pages.fill_(math.nan)
    page = case.key_pages.shape[1]
    generator = torch.Generator().manual_seed(0)
    for start, length in zip(case.segments.page_starts.tolist(), case.segments.lengths.tolist(), strict=True):
        for token in range(length):
            at = case.key_pages[int(case.segments.page_ids[start + token // page]), token % page]
            at.copy_(offset / 8 + 0.05 * torch.randn(at.shape, generator=generator))
    case.query.fill_(1.0)
    assert_right(case, run(paged_attention_triton, *case), tolerance=2e-5)  # 2**-24 of a score of 100 is 6e-6


def test_nan_stays_in_its_row_and_empty_inputs(run: Run) -> None:
    case = make_case(SHAPES[0], TREE, 12)
    clean = run(paged_attention_triton, *case)
    case.query[5] = math.nan
    found = run(paged_attention_triton, *case)
    assert found[5].isnan().all()
    others = [row for row in range(12) if row != 5]
    assert torch.equal(found[others], clean[others])
    none = Segments(*(integers([0] if name == "row_starts" else []) for name in Segments._fields))
    assert not run(paged_attention_triton, case.query, case.key_pages, case.value_pages, none, 1.0).any()
    assert run(paged_attention_triton, case.query[:0], case.key_pages, case.value_pages, none, 1.0).shape == (
        0,
        6,
        64,
    )


def test_what_it_cannot_take_raises(run: Run) -> None:
    case = make_case(SHAPES[0], TREE, 12)
    with pytest.raises(ValueError, match="not torch\\.float64; set METAREWARD_KERNELS=torch"):
        run(paged_attention_triton, case.query.double(), *case[1:])
    with pytest.raises(ValueError, match="at most 128 channels, not 256"):
        run(paged_attention_triton, torch.zeros(1, 2, 256), *case[1:])
