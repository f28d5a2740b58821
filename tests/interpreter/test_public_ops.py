"""The public ops through their Triton kernels: what `dispatch` sends there arrives as the launchers take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import (
    Segments,
    add_rms_norm,
    keyed_uniforms,
    paged_attention,
    reference,
    rotate_and_store,
    sample_tokens,
    silu_mul,
)
from metareward_kernels.dispatch import TRITON_OPS, implementation
from torch import Tensor

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")


def vector(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def assert_near(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def attention_inputs() -> dict[str, Any]:
    """Rows 0 and 1 share 9 tokens; row 1 has 3 more; row 2 sees 2 of 4; row 3 sees nothing. Page 0 is NaN."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 6, 4, 2, 8, generator=generator)
    pages[:, 0] = float("nan")
    pages[:, 3, 1:] = float("nan")
    segments = Segments(
        page_ids=vector(-9, 2, 1, 3, 4, 5),
        page_starts=vector(1, 4, 5),
        lengths=vector(9, 3, 4),
        rows=vector(0, 1, 1, 2),
        row_starts=vector(0, 2, 3, 4),
        limits=vector(9, 9, 3, 2),
    )
    query = torch.randn(4, 6, 8, generator=generator)
    return {
        "query": query,
        "key_pages": pages[0],
        "value_pages": pages[1],
        "segments": segments,
        "scale": 0.3,
    }


def test_every_triton_op_is_chosen() -> None:
    assert {op: implementation(op, "cpu") for op in TRITON_OPS} == dict.fromkeys(TRITON_OPS, "triton")


def test_paged_attention(run: Run) -> None:
    inputs = attention_inputs()
    exact = reference.paged_attention(
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    )
    found = run(paged_attention, **inputs)
    assert_near(found, exact)
    assert not found[3].any()
    with pytest.raises(RuntimeError, match=r"cannot run so: the Triton kernel takes .*not torch\.float64"):
        run(paged_attention, **{k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()})
    pages = torch.zeros(1, 4, 1, 256)
    with pytest.raises(RuntimeError, match="at most 128 channels, not 256"):
        run(paged_attention, torch.zeros(4, 1, 256), pages, pages, inputs["segments"], 1.0)


def test_fused_rows(run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    x, delta = torch.randn(2, 3, 48, generator=generator)
    weight = torch.randn(48, generator=generator)
    wanted = x + delta
    found = run(add_rms_norm, x, delta, weight, 1e-5)
    assert x.equal(wanted)
    assert_near(found, reference.rms_norm(wanted.double(), weight.double(), 1e-5))
    assert_near(run(silu_mul, x), reference.silu_mul(x.double()))

    angles = torch.randn(3, 1, 4, generator=generator)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    slots, pages = torch.tensor([5, 0, 3]), torch.zeros(2, 2, 3, 2, 8)
    exact_pages = pages.double()
    exact = reference.rotate_and_store(
        x.double(), cos.double(), sin.double(), slots, *exact_pages, None, weight[:8].double(), eps=1e-5
    )
    query = run(rotate_and_store, x, cos, sin, slots, pages[0], pages[1], None, weight[:8], 1e-5)
    assert_near(query, exact)
    assert_near(pages, exact_pages)
    with pytest.raises(RuntimeError, match=r"silu_mul cannot run so: .*not torch\.float64"):
        run(silu_mul, x.double())


def test_a_draw(run: Run) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 200, generator=generator) * 3
    logits[3, 7] = float("nan")
    keys, positions = torch.arange(4) - 2, torch.arange(4) * 1000
    uniforms = run(keyed_uniforms, keys, positions)
    assert uniforms.tolist() == [
        reference.keyed_uniform(*pair) for pair in zip(keys.tolist(), positions.tolist(), strict=True)
    ]
    chosen = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    tokens, logprobs, truncated = run(sample_tokens, logits, uniforms, **chosen, truncated_logprobs=True)
    wanted = reference.sample_tokens(logits, uniforms, **chosen)
    assert tokens.tolist() == wanted[0].tolist()
    assert tokens[3] == -1
    torch.testing.assert_close(logprobs, wanted[1], rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(truncated, wanted[2], rtol=3e-6, atol=3e-6, equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the checks would wait for the device")
def test_indices_are_checked_on_a_cpu() -> None:
    inputs = attention_inputs()
    outside = inputs["segments"]._replace(page_ids=vector(-9, 2, 1, 6, 4, 5))
    with pytest.raises(IndexError, match=r"name pages \[1, 6\] of \[0, 5\]"):
        paged_attention(**{**inputs, "segments": outside})
    keys, values = torch.zeros(2, 3, 4, 1, 8)
    angles = torch.zeros(1, 1, 8)
    with pytest.raises(IndexError, match=r"outside the cache's \[0, 11\]"):
        rotate_and_store(torch.ones(1, 24), angles, angles, torch.tensor([12]), keys, values)
