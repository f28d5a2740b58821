"""Microbenchmarks of the CPU kernels at SmolLM2-135M shapes, compiled against PyTorch.

    pytest bench/test_kernels_bench.py --benchmark-group-by=param:shape,func

Every benchmark records which implementation ran and what it moved or computed (extra_info).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metareward_kernels import (
    Segments,
    SegmentTree,
    add_rms_norm,
    dispatch,
    implementation,
    linear_logprob,
    paged_attention,
    rotate_and_store,
    sample_tokens,
    segment_attention,
    silu_mul,
)

from bench.head_grid import run_pass
from bench.head_inputs import Shape, make_inputs
from bench.head_methods import METHODS, Unavailable

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 9, 3, 64, 16
HIDDEN, INTERMEDIATE, VOCABULARY = 576, 1536, 49152


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


Segment = tuple[int, range, list[int] | None]  # length, rows, limits if not the length


def attention_case(shape: str) -> tuple[int, list[Segment]]:
    """Query rows and segments of a decode step of the judge (264 rows, 480 tokens each) or of a prefill chunk."""
    if shape == "prefill":
        return 512, [(400, range(512), None), (512, range(512), list(range(1, 513)))]
    own: list[Segment] = [(64 if shape == "judge" else 480, range(r, r + 1), None) for r in range(264)]
    if shape == "unshared":
        return 264, own
    rubrics: list[Segment] = [(320, range(r, r + 88), None) for r in range(0, 264, 88)]
    return 264, [*rubrics, *((96, range(r, r + 11), None) for r in range(0, 264, 11)), *own]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", ["judge", "unshared", "prefill"])
def test_paged_attention(run: Callable[..., None], shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query_rows, case = attention_case(shape)
    lengths = torch.tensor([length for length, _, _ in case], dtype=torch.int32)
    counts = (lengths + PAGE - 1) // PAGE
    readers = torch.tensor([len(rows) for _, rows, _ in case])
    segments = Segments(
        page_ids=torch.randperm(int(counts.sum())).int(),
        page_starts=(counts.cumsum(0) - counts).int(),
        lengths=lengths,
        rows=torch.tensor([row for _, rows, _ in case for row in rows], dtype=torch.int32),
        row_starts=torch.cat([torch.zeros(1), readers.cumsum(0)]).int(),
        limits=torch.tensor(
            [limit for length, rows, limits in case for limit in limits or [length] * len(rows)],
            dtype=torch.int32,
        ),
    )
    keys, values = torch.randn(2, int(counts.sum()), PAGE, KV_HEADS, HEAD_DIM).to(dtype)
    query = torch.randn(query_rows, QUERY_HEADS, HEAD_DIM).to(dtype)
    gigabytes = 2 * int(lengths.sum()) * KV_HEADS * HEAD_DIM * keys.element_size() / 1e9
    gigaflop = 4 * int(segments.limits.sum()) * QUERY_HEADS * HEAD_DIM / 1e9
    run(
        "paged_attention",
        lambda: paged_attention(query, keys, values, segments, HEAD_DIM**-0.5),
        {"GB/s": gigabytes, "GFLOP/s": gigaflop},
    )


# Lengths and parents of training's segments: a pair of judgments, and four pairs whose prompts share a rubric.
TREES = {
    "pair": ([950, 150, 150], [-1, 0, 0]),
    "four pairs": ([400, *[550, 150, 150] * 4], [-1, *(p for i in range(1, 13, 3) for p in (0, i, i))]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_segment_attention(run: Callable[..., None], direction: str, shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tree = SegmentTree.of(*TREES[shape])
    query, grad = torch.randn(2, tree.tokens, QUERY_HEADS, HEAD_DIM).to(dtype)
    key, value = torch.randn(2, tree.tokens, KV_HEADS, HEAD_DIM).to(dtype)
    seen = 0  # (query, key) pairs
    for own, ancestors in tree.spans():
        length = own.stop - own.start
        seen += length * (length + 1) // 2 + length * sum(span.stop - span.start for span in ancestors)

    def forward() -> torch.Tensor:
        return segment_attention(query, key, value, tree, HEAD_DIM**-0.5)

    leaves: list[torch.Tensor] = []
    outs: list[torch.Tensor] = []

    def backward() -> None:
        if not outs:  # made under the implementation that is measured
            leaves.extend(x.requires_grad_() for x in (query, key, value))
            outs.append(forward())
        torch.autograd.grad(outs[0], leaves, grad, retain_graph=True)

    flop = (4 if direction == "forward" else 10) * seen * QUERY_HEADS * HEAD_DIM
    run("segment_attention", forward if direction == "forward" else backward, {"GFLOP/s": flop / 1e9})


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "shape", [method.name for method in METHODS if method.ours and method.name != "linear_logprob"]
)
def test_head_forward_backward(run: Callable[..., None], shape: str, dtype: torch.dtype) -> None:
    (method,) = (method for method in METHODS if method.name == shape)
    tokens = 1024
    inputs = make_inputs(Shape(tokens, HIDDEN, VOCABULARY), dtype, "cpu", seed=0)
    try:
        call = method.prepare(inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    op = next(op for op in method.reported if op in dispatch.OPS)
    least = 3 * 2 * tokens * HIDDEN * VOCABULARY
    run(op, lambda: run_pass(call, "forward+backward"), {"GFLOP/s of the three products": least / 1e9})


@pytest.mark.parametrize(
    "setting",
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.0, 50, 1.0), (0.0, 0, 1.0)],
    ids=["plain", "judge", "k50", "greedy"],
)
def test_sample_bf16(run: Callable[..., None], setting: tuple[float, int, float]) -> None:
    temperature, top_k, top_p = setting
    torch.manual_seed(0)
    logits = (torch.randn(264, VOCABULARY) * 3).bfloat16()
    uniforms = torch.rand(264, dtype=torch.float64)
    run(
        "sample_tokens",
        lambda: sample_tokens(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p),
        {"rows/s": 264},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [1, 64, 264])
@pytest.mark.parametrize("op", ["add_rms_norm", "rotate_and_store", "silu_mul"])
def test_fused_rows(run: Callable[..., None], op: str, shape: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
    residual, delta = torch.randn(2, shape, HIDDEN).to(dtype)
    qkv, gate_up = torch.randn(shape, width).to(dtype), torch.randn(shape, 2 * INTERMEDIATE).to(dtype)
    cos, sin = torch.randn(2, shape, 1, HEAD_DIM).to(dtype)
    keys, values = torch.zeros(2, 1024, PAGE, KV_HEADS, HEAD_DIM, dtype=dtype)
    slots, weight = torch.randperm(1024 * PAGE)[:shape], torch.ones(HIDDEN, dtype=dtype)
    delta *= 1e-6  # the residual is added to at every call
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "add_rms_norm": (lambda: add_rms_norm(residual, delta, weight, 1e-5), 4 * HIDDEN),
        "rotate_and_store": (lambda: rotate_and_store(qkv, cos, sin, slots, keys, values), 2 * width),
        "silu_mul": (lambda: silu_mul(gate_up), 3 * INTERMEDIATE),
    }
    call, elements = calls[op]
    run(op, call, {"GB/s": shape * elements * weight.element_size() / 1e9})
