"""paged_attention against the reference, in both implementations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metareward_kernels import Segments, implementation, paged_attention, reference
from metareward_kernels.paged_attention import paged_attention_torch
from torch import Tensor

from tests.on_gpu import on_gpu

COMPILED = implementation("paged_attention") == "cpp"
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}
PATHS = [paged_attention_torch, paged_attention]
PATHS += [on_gpu(paged_attention)] if torch.cuda.is_available() else []

# A segment of a test: its length, and the (row, limit) of every reader.
Readers = Sequence[tuple[int, int]]
Tree = Sequence[tuple[int, Readers]]


def vector(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)


def make(
    tree: Tree, rows: int, heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Random inputs: pages in random order, NaN in every slot that no segment holds, junk in unused page_ids."""
    generator = torch.Generator().manual_seed(rows + dim)
    needed = [math.ceil(length / page) for length, _ in tree]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    page_ids, page_starts, written = [-7, 1 << 30], [], torch.zeros(len(order), page, dtype=torch.bool)
    for (length, _), count in zip(tree, needed, strict=True):
        page_starts.append(len(page_ids))
        named = [order.pop() for _ in range(count)]
        for m, number in enumerate(named):
            written[number, : length - m * page] = True
        page_ids += [*named, -1, 1 << 30]  # a gap after every segment

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values = random(2, *written.shape, heads[1], dim)
    for pages in (keys, values):
        pages[~written] = math.nan
    entries = [reader for _, readers in tree for reader in readers]
    borders = [0]
    for _, readers in tree:
        borders.append(borders[-1] + len(readers))
    segments = Segments(
        vector(page_ids),
        vector(page_starts),
        vector([length for length, _ in tree]),
        vector([row for row, _ in entries]),
        vector(borders),
        vector([limit for _, limit in entries]),
    )
    return {
        "query": random(rows, heads[0], dim).to(dtype),
        "key_pages": keys.to(dtype),
        "value_pages": values.to(dtype),
        "segments": segments,
        "scale": dim**-0.5,
    }


def exact(inputs: dict[str, Any]) -> Tensor:
    double = {k: inputs[k].double() for k in ("query", "key_pages", "value_pages")}
    return reference.paged_attention(**double, segments=inputs["segments"], scale=inputs["scale"])


def check(path: Any, inputs: dict[str, Any], tolerance: float | None = None) -> None:
    found = path(**inputs)
    assert found.dtype == inputs["query"].dtype
    assert found.shape == inputs["query"].shape
    error = (found.double() - exact(inputs)).abs()
    assert not error.isnan().any()
    assert error.max() < (tolerance or TOLERANCE[found.dtype])


def whole(length: int, rows: Sequence[int]) -> tuple[int, Readers]:
    return length, [(row, length) for row in rows]


def decode_tree(rows: int) -> Tree:
    """A prefix that all read, one that half of them read, and each one's own tokens; the last row sees nothing."""
    own = [whole(1 + 13 * row % 40, [row]) for row in range(rows - 1)]
    return [whole(37, range(rows - 1)), whole(16, range(0, rows - 1, 2)), *own]


def prefill_tree(rows: int, cached: int) -> Tree:
    """A chunk of `rows` tokens after `cached` tokens."""
    return [whole(cached, range(rows)), (rows, [(row, row + 1) for row in range(rows)])]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("heads", "dim"),
    [((9, 3), 64), ((32, 8), 128), ((4, 4), 80), ((8, 1), 8), ((24, 3), 40), ((1, 1), 1), ((7, 1), 33)],
)
def test_matches_the_reference(path: Any, dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    check(path, make(decode_tree(18), 18, heads, dim, 16, dtype))
    check(path, make(prefill_tree(21, 30), 21, heads, dim, 16, dtype))


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, int]:
    rows = draw(st.integers(1, 20))
    tree = []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 90, 130]))
        readers = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))
        mode = draw(st.sampled_from(["whole", "causal", "any"]))
        limits = {
            "whole": [length] * len(readers),
            "causal": [min(length, 1 + i) for i in range(len(readers))],
            "any": [draw(st.integers(0, length)) for _ in readers],
        }[mode]
        tree.append((length, list(zip(readers, limits, strict=True))))
    return tree, rows


@settings(max_examples=80, deadline=None)
@given(
    case=trees(),
    page=st.sampled_from([1, 3, 16, 32]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (10, 2), (8, 1)]),
    dim=st.sampled_from([1, 2, 16, 24, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_segments(
    case: tuple[Tree, int], page: int, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> None:
    inputs = make(case[0], case[1], heads, dim, page, dtype)
    for path in PATHS:
        check(path, inputs, 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_segments(path: Any, dtype: torch.dtype) -> None:
    """More tokens than are attended to in one go, alone and shared, with limits on both sides of the cuts."""
    tree = [
        whole(1300, [0]),
        (1100, [(1, 1100), (2, 512), (3, 513), (4, 0), (5, 1024), (6, 7)]),
        (600, [(7, 530)]),
        whole(20, [0, 3, 7]),
    ]
    check(path, make(tree, 8, (3, 1), 64, 16, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (8, 2)])
@pytest.mark.parametrize("readers", [2, 6, 11, 17, 33])
def test_queries_that_do_not_fill_a_vector(dtype: torch.dtype, heads: tuple[int, int], readers: int) -> None:
    """A few queries past a multiple of 16 are taken row by row, also where they are all, or see only a part."""
    everyone = range(readers)
    tree: Tree = [whole(70, everyone), (1100, [(row, 1100 - row % 3 * 520) for row in everyone])]
    check(paged_attention, make(tree, readers, heads, 32, page=16, dtype=dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offset", [80.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(path: Any, offset: float, dtype: torch.dtype) -> None:
    """All scores near +80 or -100, where e^score alone overflows or is nothing."""
    inputs = make(decode_tree(9), 9, (4, 2), 16, 16)
    inputs["query"][..., 0] = offset
    inputs["key_pages"][..., 0] = torch.where(inputs["key_pages"][..., 0].isnan(), math.nan, 1.0)
    inputs["scale"] = 1.0
    for name in ("query", "key_pages", "value_pages"):
        inputs[name] = inputs[name].to(dtype)
    check(path, inputs, 2e-4 if dtype == torch.float32 else 3e-2)
    inputs["query"] *= 100.0
    check(path, inputs, 2e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(path: Any, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make([*decode_tree(9), *prefill_tree(8, 20)], 9, (3, 1), 16, 16, dtype)
        check(path, dict(inputs, scale=scale), 2e-2 if dtype == torch.bfloat16 else 5e-6)


@pytest.mark.parametrize("path", PATHS)
def test_sharing_changes_little(path: Any) -> None:
    """A shared prefix and own tokens against one segment a row that names the same pages."""
    shared = make([whole(48, range(6)), *(whole(5 + row, [row]) for row in range(6))], 6, (9, 3), 64, 16)
    ids, starts = shared["segments"].page_ids.tolist(), shared["segments"].page_starts.tolist()
    page_ids, page_starts = [], []
    for row in range(6):
        page_starts.append(len(page_ids))
        page_ids += [*ids[starts[0] : starts[0] + 3], ids[starts[1 + row]]]
    lengths = vector([53 + row for row in range(6)])
    unshared = Segments(
        vector(page_ids), vector(page_starts), lengths, vector(range(6)), vector(range(7)), lengths
    )
    torch.testing.assert_close(path(**shared), path(**dict(shared, segments=unshared)), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_slice_of_a_cache_and_strided_query(path: Any, dtype: torch.dtype) -> None:
    inputs = make([*decode_tree(9), *prefill_tree(7, 20)], 9, (6, 2), 32, 16, dtype)
    cache = torch.randn(2, 3, *inputs["key_pages"].shape).to(dtype)
    cache[0, 1], cache[1, 1] = inputs["key_pages"], inputs["value_pages"]
    odd = torch.randn(*inputs["value_pages"].shape[:-1], 33).to(dtype)  # an odd stride between heads
    odd[..., :32] = inputs["value_pages"]
    by_head = inputs["key_pages"].transpose(1, 2).contiguous().transpose(1, 2)
    expected = path(**inputs)
    for keys, values in ((cache[0, 1], cache[1, 1]), (by_head, odd[..., :32])):
        strided = dict(inputs, key_pages=keys, value_pages=values)
        strided["query"] = inputs["query"].repeat_interleave(2, dim=2)[:, :, ::2]
        torch.testing.assert_close(path(**strided), expected)


@pytest.mark.skipif(not COMPILED, reason="the compiled library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_runs_change_a_bit(dtype: torch.dtype) -> None:
    tree = [*decode_tree(40), whole(700, range(40)), whole(1500, [39]), (40, [(r, r + 1) for r in range(40)])]
    inputs = make(tree, 40, (9, 3), 64, 16, dtype)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(paged_attention(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert not outcomes[0].isnan().any()
    for other in outcomes[1:]:
        assert torch.equal(outcomes[0], other)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_to_see(path: Any) -> None:
    assert path(**make([], 0, (4, 2), 16, 16)).shape == (0, 4, 16)
    for tree in ([], [(0, [(0, 0), (2, 0)])], [(20, [])], [(20, [(1, 0)])], [(20, [(0, 0), (1, 0), (2, 0)])]):
        found = path(**make(tree, 3, (4, 2), 16, 16))
        assert torch.equal(found, torch.zeros(3, 4, 16))


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_indices_out_of_range(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", kernels)
    inputs = make([whole(20, [0, 1]), whole(9, [1])], 2, (4, 2), 16, 16)
    segments: Segments = inputs["segments"]

    def changed(name: str, index: int, value: int) -> dict[str, Any]:
        part = getattr(segments, name).clone()
        part[index] = value
        return dict(inputs, segments=segments._replace(**{name: part}))

    used = int(segments.page_starts[1])
    for name, index, value, message in [
        ("page_ids", used, -1, "name pages"),
        ("page_ids", used, inputs["key_pages"].shape[0], "name pages"),
        ("page_starts", 1, -1, "lead outside"),
        ("page_starts", 1, len(segments.page_ids), "lead outside"),
        ("lengths", 1, -1, "lead outside"),
        ("lengths", 1, 200, "lead outside"),
        ("rows", 1, 2, "name rows"),
        ("rows", 1, -1, "name rows"),
        ("row_starts", 0, 1, "row_starts must rise"),
        ("row_starts", 1, 4, "row_starts must rise"),
        ("row_starts", 2, 2, "row_starts must rise"),
        ("limits", 2, 10, "limits must lie"),
        ("limits", 2, -1, "limits must lie"),
    ]:
        with pytest.raises(IndexError, match=message):
            paged_attention(**changed(name, index, value))


def test_bad_arguments() -> None:
    inputs = make([whole(20, [0, 1])], 2, (4, 2), 16, 16)
    segments: Segments = inputs["segments"]
    with pytest.raises(TypeError, match="differ in dtype"):
        paged_attention(**dict(inputs, query=inputs["query"].double()))
    with pytest.raises(TypeError, match=r"segments\.lengths must be an int32 vector"):
        paged_attention(**dict(inputs, segments=segments._replace(lengths=segments.lengths.long())))
    with pytest.raises(ValueError, match="row_starts"):
        paged_attention(**dict(inputs, segments=segments._replace(row_starts=segments.lengths)))
    with pytest.raises(ValueError, match="differ in length"):
        paged_attention(**dict(inputs, segments=segments._replace(limits=segments.limits[:1])))
    with pytest.raises(ValueError, match="does not fit"):
        paged_attention(**dict(inputs, query=inputs["query"][:, :3]))
    with pytest.raises(ValueError, match="contiguous"):
        paged_attention(
            **dict(inputs, key_pages=inputs["key_pages"].transpose(2, 3).contiguous().transpose(2, 3))
        )


def test_opcheck() -> None:
    for tree, rows in ((decode_tree(5), 5), ([], 0)):
        inputs = make(tree, rows, (4, 2), 16, 16)
        for pages in ("key_pages", "value_pages"):  # opcheck compares inputs, and NaN differs from itself
            inputs[pages] = inputs[pages].nan_to_num()
        wide = dict(inputs, query=inputs["query"].repeat_interleave(2, dim=2)[:, :, ::2])
        for case in (inputs, wide):
            arguments = (
                case["query"],
                case["key_pages"],
                case["value_pages"],
                *case["segments"],
                case["scale"],
            )
            torch.library.opcheck(torch.ops.metareward.paged_attention.default, arguments)
            if COMPILED and case is inputs:
                torch.library.opcheck(torch.ops.metareward.paged_attention_cpp.default, arguments)
