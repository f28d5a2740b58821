"""Microbenchmarks of the CPU kernels at SmolLM2-135M shapes, compiled against PyTorch.

    pytest bench/test_kernels_bench.py --benchmark-group-by=param:shape,func

Every benchmark records which implementation ran and what it moved or computed (extra_info).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import implementation, linear_logprob, paged_attention_decode, sample_tokens

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 9, 3, 64, 16
HIDDEN, VOCABULARY = 576, 49152


@pytest.fixture(params=["cpp", "torch"])
def run(
    request: pytest.FixtureRequest, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Runs `f` under one implementation and records it; work: what to divide by the time, by unit."""
    monkeypatch.delenv("METAREWARD_KERNELS", raising=False)
    if request.param == "cpp" and implementation("sample_tokens") != "cpp":
        pytest.skip("the compiled library is not built")
    monkeypatch.setenv("METAREWARD_KERNELS", request.param)

    def measure(op: str, f: Callable[[], Any], work: dict[str, float]) -> None:
        benchmark.extra_info["implementation"] = implementation(op)
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(f, rounds=5, warmup_rounds=1)
        for unit, amount in work.items() if benchmark.stats is not None else ():  # None: --benchmark-disable
            benchmark.extra_info[unit] = round(amount / benchmark.stats.stats.min, 3)

    return measure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(64, 300, 800), (264, 300, 1500)], ids=["64x300-800", "264x300-1500"])
def test_paged_attention(run: Callable[..., None], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    sequences, low, high = shape
    torch.manual_seed(0)
    lengths = torch.randint(low, high + 1, (sequences,), dtype=torch.int32)
    width = -(-high // PAGE)
    keys, values = torch.randn(2, sequences * width, PAGE, KV_HEADS, HEAD_DIM).to(dtype)
    table = torch.randperm(sequences * width).view(sequences, width).int()
    query = torch.randn(sequences, QUERY_HEADS, HEAD_DIM).to(dtype)
    gigabytes = 2 * int(lengths.sum()) * KV_HEADS * HEAD_DIM * keys.element_size() / 1e9
    run(
        "paged_attention_decode",
        lambda: paged_attention_decode(query, keys, values, table, lengths, HEAD_DIM**-0.5),
        {"GB/s": gigabytes},
    )


@pytest.mark.parametrize("shape", [(64, 0, 0.95), (264, 0, 0.95), (264, 0, 1.0), (264, 50, 0.95)], ids=str)
def test_sample(run: Callable[..., None], shape: tuple[int, int, float]) -> None:
    rows, top_k, top_p = shape
    torch.manual_seed(0)
    logits = torch.randn(rows, VOCABULARY) * 3
    uniforms = torch.rand(rows, dtype=torch.float64)
    run(
        "sample_tokens",
        lambda: sample_tokens(logits, uniforms, temperature=0.8, top_k=top_k, top_p=top_p),
        {"rows/s": rows},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", ["forward", "forward+backward"])
def test_linear_logprob(run: Callable[..., None], shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = 1024
    training = shape != "forward"
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_(training)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.05).to(dtype).requires_grad_(training)
    targets = torch.randint(0, VOCABULARY, (tokens,))

    def step() -> None:
        logprobs = linear_logprob(hidden, weight, targets)
        if training:
            torch.autograd.grad(logprobs.sum(), (hidden, weight))

    products = 4 if training else 1
    run("linear_logprob", step, {"GFLOP/s": products * 2 * tokens * HIDDEN * VOCABULARY / 1e9})
