"""paged_attention_decode against the reference, in both implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metareward_kernels import implementation, paged_attention_decode, reference
from metareward_kernels.paged_attention import paged_attention_decode_torch
from torch import Tensor

COMPILED = implementation("paged_attention_decode") == "cpp"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}


def make(
    lengths: list[int], heads: tuple[int, int], dim: int, page: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    width = max(1, math.ceil(max(lengths, default=0) / page))
    pages = max(1, len(lengths) * width)
    order = torch.randperm(pages, generator=generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "query": random(len(lengths), heads[0], dim),
        "key_pages": random(pages, page, heads[1], dim),
        "value_pages": random(pages, page, heads[1], dim),
        "page_table": order[: len(lengths) * width].view(len(lengths), width).int(),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": dim**-0.5,
    }


def exact(inputs: dict[str, Any]) -> Tensor:
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    return reference.paged_attention_decode(**double)


def paths() -> list[Any]:
    return [paged_attention_decode_torch, paged_attention_decode]


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("heads", "dim"), [((9, 3), 64), ((32, 8), 128), ((14, 2), 64), ((4, 4), 80), ((7, 1), 8), ((2, 1), 100)]
)
def test_matches_the_reference(path: Any, dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    inputs = make([1, 15, 16, 17, 100], heads, dim, 16, dtype)
    found = path(**inputs)
    assert found.dtype == dtype
    assert (found.double() - exact(inputs)).abs().max() < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    page=st.sampled_from([1, 3, 16, 32]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (10, 2)]),
    dim=st.sampled_from([1, 16, 24, 64]),
)
def test_any_lengths_and_pages(lengths: list[int], page: int, heads: tuple[int, int], dim: int) -> None:
    inputs = make(lengths, heads, dim, page)
    true = exact(inputs)
    for path in paths():
        assert (path(**inputs).double() - true).abs().max() < 5e-6


@pytest.mark.parametrize("path", paths())
def test_padding_is_never_read(path: Any) -> None:
    inputs = make([5, 33], (4, 2), 16, 16)
    clean = path(**inputs)
    poisoned = dict(inputs, page_table=inputs["page_table"].clone(), key_pages=inputs["key_pages"].clone())
    poisoned["value_pages"] = inputs["value_pages"].clone()
    used = [(0, 0, 5), (1, 0, 16), (1, 1, 16), (1, 2, 1)]
    written = torch.zeros(inputs["key_pages"].shape[:2], dtype=torch.bool)
    for s, m, n in used:
        written[int(inputs["page_table"][s, m]), :n] = True
    for pages in ("key_pages", "value_pages"):
        poisoned[pages][~written] = math.nan
    poisoned["page_table"][0, 1:] = -7
    torch.testing.assert_close(path(**poisoned), clean)


@pytest.mark.parametrize("path", paths())
def test_large_scores_do_not_overflow(path: Any) -> None:
    inputs = make([40], (3, 1), 64, 16)
    inputs["query"] *= 300.0
    assert (path(**inputs).double() - exact(inputs)).abs().max() < 1e-3


@pytest.mark.parametrize("path", paths())
def test_layer_slice_of_a_cache_and_strided_query(path: Any) -> None:
    inputs = make([20, 9], (6, 2), 32, 16)
    cache = torch.randn(2, 3, *inputs["key_pages"].shape)
    cache[0, 1], cache[1, 1] = inputs["key_pages"], inputs["value_pages"]
    by_head = inputs["value_pages"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = dict(inputs, key_pages=cache[0, 1], value_pages=by_head)
    strided["query"] = inputs["query"].repeat_interleave(2, dim=2)[:, :, ::2]
    strided["lengths"] = inputs["lengths"].repeat_interleave(2)[::2]
    torch.testing.assert_close(path(**strided), path(**inputs))


@pytest.mark.skipif(not COMPILED, reason="the compiled library is not built")
def test_threads_change_nothing() -> None:
    inputs = make([300, 1, 40, 7, 500], (9, 3), 64, 16)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(paged_attention_decode(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_no_sequences() -> None:
    inputs = make([], (4, 2), 16, 16)
    assert paged_attention_decode(**inputs).shape == (0, 4, 16)


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_indices_out_of_range(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", kernels)
    inputs = make([20, 9], (4, 2), 16, 16)
    for page in (-1, inputs["key_pages"].shape[0]):
        table = inputs["page_table"].clone()
        table[1, 0] = page
        with pytest.raises(IndexError, match="names page"):
            paged_attention_decode(**dict(inputs, page_table=table))
    with pytest.raises(IndexError, match="lengths span"):
        paged_attention_decode(**dict(inputs, lengths=torch.tensor([33, 1], dtype=torch.int32)))


def test_bad_arguments() -> None:
    inputs = make([20, 9], (4, 2), 16, 16)
    with pytest.raises(TypeError, match="differ in dtype"):
        paged_attention_decode(**dict(inputs, query=inputs["query"].double()))
    with pytest.raises(TypeError, match="int32"):
        paged_attention_decode(**dict(inputs, lengths=inputs["lengths"].long()))
    with pytest.raises(ValueError, match="does not fit"):
        paged_attention_decode(**dict(inputs, query=inputs["query"][:, :3]))
    with pytest.raises(ValueError, match="contiguous"):
        paged_attention_decode(
            **dict(inputs, key_pages=inputs["key_pages"].transpose(2, 3).contiguous().transpose(2, 3))
        )


def test_opcheck() -> None:
    for lengths in ([3, 20], []):
        inputs = make(lengths, (4, 2), 16, 16)
        wide = dict(inputs, query=inputs["query"].repeat_interleave(2, dim=2)[:, :, ::2])
        for case in (inputs, wide):
            torch.library.opcheck(torch.ops.metareward.paged_attention_decode.default, tuple(case.values()))
        if COMPILED:
            torch.library.opcheck(
                torch.ops.metareward.paged_attention_decode_cpp.default, tuple(inputs.values())
            )
