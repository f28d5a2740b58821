"""Triton's sampling kernel and its random numbers in the interpreter, against fp64 by a sort."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import triton_sample
from metareward_kernels.random_keys import keyed_uniforms_torch
from metareward_kernels.triton_random_keys import keyed_uniforms_triton
from metareward_kernels.triton_sample import sample_tokens_triton
from torch import Tensor

Run = Callable[..., Any]

# temperature, top_k, top_p, min_p
OFF = (1.0, 0, 1.0, 0.0)
SETTINGS = [
    OFF,
    (0.8, 0, 0.95, 0.0),
    (0.7, 9, 1.0, 0.0),
    (1.5, 20, 0.7, 0.0),
    (4.0, 0, 1.0, 0.02),
    (1.3, 30, 0.9, 0.05),
    (1.0, 10**10, 1e-6, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1e-4, 0, 0.5, 1.0),
    (1e300, 3, 1.0, 0.0),
    (0.0, 5, 0.5, 0.5),
]


def oracle(row: Tensor, uniform: float, chosen: tuple) -> tuple[int, float, float]:
    """Token, log-prob, log-prob under the kept tokens, in fp64."""
    temperature, top_k, top_p, min_p = chosen
    row = row.double()
    if not math.isfinite(row.max()):
        return -1, math.nan, math.nan
    raw = row.log_softmax(dim=0)
    if temperature == 0.0:
        token = int((row == row.max()).int().argmax())
        return token, float(raw[token]), 0.0
    weights = ((row - row.max()) / temperature).exp()
    order = row.sort(descending=True, stable=True).indices
    if 0 < top_k < len(row):
        order = order[:top_k]
    if top_p < 1.0:
        cumulative = weights[order].cumsum(dim=0)
        order = order[: int((cumulative < top_p * cumulative[-1]).sum()) + 1]
    kept = order[weights[order] >= min_p].sort().values
    cumulative = weights[kept].cumsum(dim=0)
    at = int((cumulative <= uniform * cumulative[-1]).sum())
    token = int(kept[at])
    return token, float(raw[token]), float((weights[token] / cumulative[-1]).log())


def mismatches(run: Run, logits: Tensor, uniforms: Tensor, chosen: tuple) -> int:
    tokens, logprobs, kept_logprobs = run(sample_tokens_triton, logits, uniforms, *chosen)
    assert tokens.dtype == torch.int64
    expected = [oracle(row, float(u), chosen) for row, u in zip(logits, uniforms, strict=True)]
    same = torch.tensor([token for token, _, _ in expected]) == tokens
    for found, column in ((logprobs, 1), (kept_logprobs, 2)):
        wanted = torch.tensor([one[column] for one in expected], dtype=torch.float32)
        torch.testing.assert_close(found[same], wanted[same], rtol=3e-6, atol=3e-6, equal_nan=True)
        assert not (found > 0).any()
    return int((~same).sum())


@pytest.mark.parametrize(
    ("chosen", "block", "list_blocks"),
    [
        *((chosen, 128, 1) for chosen in SETTINGS),
        # Small blocks stand for a large vocabulary: several blocks, and a list of candidates that fits or does not.
        *((SETTINGS[i], 32, 1) for i in (0, 1, 2, 5)),
        (SETTINGS[3], 32, 2),
    ],
)
def test_nasty_rows(
    run: Run, chosen: tuple, block: int, list_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sample, "LARGEST_BLOCK", block)
    monkeypatch.setattr(triton_sample, "LIST_BLOCKS", list_blocks)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 75, generator=generator) * 3
    logits[0] = logits[0].round()  # many ties, some of them at the cut
    logits[1] = torch.where(logits[1] > 3, 0.0, -0.0)  # equal zeros of both signs
    logits[2, 37:] = -math.inf
    logits[2, 0] = 1.0
    logits[3] = logits[3] * 1e-3 - 1e4
    logits[4, 40] = 80.0
    logits[5, 74] = math.nan
    logits[6] = -math.inf
    uniforms = torch.tensor([0.37, 1 - 2.0**-53, 0.9, 2.0**-54, 0.5, 0.5, 0.5], dtype=torch.float64)
    assert mismatches(run, logits, uniforms, chosen) == 0


def test_rows_without_a_distribution_and_empty_inputs(run: Run) -> None:
    logits = torch.zeros(4, 20)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    logits[2, 4] = math.inf
    logits[3, 0], logits[3, 19] = math.inf, math.nan
    uniforms = torch.full((4,), 0.5, dtype=torch.float64)
    for chosen in (OFF, (1.0, 5, 0.9, 0.1), (0.0, 0, 1.0, 0.0)):
        tokens, logprobs, kept = run(sample_tokens_triton, logits, uniforms, *chosen)
        assert tokens.tolist() == [-1] * 4
        assert logprobs.isnan().all()
        assert kept.isnan().all()
    tokens, logprobs, _ = run(sample_tokens_triton, torch.zeros(2, 0), uniforms[:2], *OFF)
    assert (tokens.tolist(), logprobs.isnan().all()) == ([-1, -1], True)
    assert run(sample_tokens_triton, logits[:0], uniforms[:0], *OFF)[0].shape == (0,)


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [(OFF, 100), ((0.9, 0, 0.9, 0.0), 5), ((1.0, 10, 1.0, 0.0), 5), ((1.0, 40, 0.8, 0.01), 3)],
)
def test_random_rows(run: Run, chosen: tuple, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 501, generator=generator) * 2
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    assert mismatches(run, logits, uniforms, chosen) <= rows // 100


def test_a_large_vocabulary_strided_and_in_bf16(run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = (torch.randn(1, 2 * 9001, generator=generator) * 3).bfloat16()
    uniforms = torch.rand(1, generator=generator, dtype=torch.float64)
    for chosen in (OFF, (1.0, 50, 0.9, 0.0)):
        found = run(sample_tokens_triton, wide[:, ::2], uniforms, *chosen)
        upcast = run(sample_tokens_triton, wide[:, ::2].float(), uniforms, *chosen)
        assert all(a.equal(b) for a, b in zip(found, upcast, strict=True))
        assert mismatches(run, wide[:, ::2], uniforms, chosen) == 0


def test_the_deep_tail_is_drawn(run: Run) -> None:
    # Each of 4096 tail tokens has 2e-9 of the mass: an fp32 sum would lose them after the heavy first token.
    row = torch.full((4097,), math.log(2e-9))
    row[0] = 0.0
    tail = 4096 * 2e-9
    inside = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)[1:-1]
    tokens, _, _ = run(sample_tokens_triton, row.repeat(7, 1), 1.0 - tail * inside, *OFF)
    assert tokens.min() >= 1
    assert (tokens - (4096 - 4096 * inside)).abs().max() < 2


def test_uniforms_are_those_of_pytorch(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator)
    positions = torch.randint(0, 2**62, (300,), generator=generator)
    keys[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    positions[:4] = torch.tensor([0, 1, 2**32 - 1, 2**32])
    found: Any = run(keyed_uniforms_triton, keys, positions)
    assert found.equal(keyed_uniforms_torch(keys, positions))
    assert run(keyed_uniforms_triton, keys[::2], positions[::2]).equal(found[::2])
    assert run(keyed_uniforms_triton, keys[:0], positions[:0]).shape == (0,)
