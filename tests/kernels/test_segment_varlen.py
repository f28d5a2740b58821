"""Segment attention by a variable-length kernel: the layout against the fp64 reference, with a stand-in for the GPU's kernels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from metareward_kernels import SegmentTree, segment_attention, segment_varlen
from metareward_kernels.segment_tree import VarlenLayout, layout_of
from metareward_kernels.segment_varlen import flash_attn_kernel, torch_kernel
from torch import Tensor

from tests.kernels.segment_checks import TREES, check, exact, make, run

CPU = torch.device("cpu")


def stand_in(query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """What a flash kernel computes, sequence by sequence: the last query sees the last key."""
    parts = []
    bounds = zip(layout.query_offsets.tolist(), layout.key_offsets.tolist(), strict=True)
    (first, first_key), *ends = bounds
    for last, last_key in ends:
        q, k, v = query[first:last], key[first_key:last_key], value[first_key:last_key]
        assert 0 < len(q) <= layout.most_queries
        assert len(k) <= layout.most_keys
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        heads = [part.transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
        first, first_key = last, last_key
    assert first == len(query)
    return torch.cat(parts)


def varlen(query: Tensor, key: Tensor, value: Tensor, tree: SegmentTree, scale: float) -> Tensor:
    layout = tree.layout(query.device)
    return segment_varlen.segment_attention_varlen(query, key, value, layout, scale, stand_in)


@pytest.mark.parametrize("case", TREES)
def test_the_layout_is_the_tree(case: str) -> None:
    tree = SegmentTree.of(*TREES[case])
    inputs, grad = make(tree.tokens, (6, 2), 16, torch.float64)
    check(run(varlen, inputs, tree, 0.3, grad), exact(inputs, tree, 0.3, grad), 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_random_trees(seed: int) -> None:
    draw = random.Random(seed)
    parents = [draw.randint(-1, segment - 1) for segment in range(draw.randint(1, 9))]
    tree = SegmentTree.of([draw.choice([0, 1, 2, draw.randint(3, 40)]) for _ in parents], parents)
    if tree.tokens > 0:
        inputs, grad = make(tree.tokens, (4, 2), 8, torch.float64, seed)
        check(run(varlen, inputs, tree, 0.5, grad), exact(inputs, tree, 0.5, grad), 1e-12)


def test_nothing_is_gathered_where_nothing_is_shared() -> None:
    assert layout_of(SegmentTree.of([5, 0, 7], [-1, 0, -1]), CPU).keys is None
    gathered = layout_of(SegmentTree.of([3, 2, 1], [-1, 0, 0]), CPU)
    assert gathered.keys is not None
    assert gathered.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert gathered.query_offsets.tolist() == [0, 3, 5, 6]
    assert gathered.key_offsets.tolist() == [0, 3, 8, 12]
    assert (gathered.most_queries, gathered.most_keys) == (3, 5)
    assert gathered.query_offsets.dtype == gathered.key_offsets.dtype == torch.int32


def test_a_layout_is_made_once_for_all_layers() -> None:
    tree = SegmentTree.of([3, 2], [-1, 0])
    assert tree.layout(CPU) is tree.layout(CPU)


def test_no_tokens() -> None:
    tree = SegmentTree.of([0, 0], [-1, 0])
    inputs, grad = make(0, (4, 2), 8)
    assert [part.shape for part in run(varlen, inputs, tree, 1.0, grad)] == [
        (0, 4, 8),
        (0, 4, 8),
        (0, 2, 8),
        (0, 2, 8),
    ]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """flash-attn's arguments, in its order."""
    assert causal
    assert dropout_p == 0.0
    assert softmax_scale is not None
    layout = VarlenLayout(None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return stand_in(q, k, v, layout, softmax_scale)


def varlen_attn_ungrouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """PyTorch's arguments before it took fewer key heads than query heads."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert window_size == (-1, 0)
    assert scale is not None
    return stand_in(query, key, value, VarlenLayout(None, cu_seq_q, cu_seq_k, max_q, max_k), scale)


def varlen_attn_grouped(*inputs: Any, enable_gqa: bool = False, **named: Any) -> Tensor:
    query, key, value, *rest = inputs
    assert enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    repeated = [part.repeat_interleave(repeats, 1) for part in (key, value)]
    return varlen_attn_ungrouped(query, *repeated, *rest, **named)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize(
    "kernel",
    [
        flash_attn_kernel(flash_attn_varlen_func),
        torch_kernel(varlen_attn_grouped),
        torch_kernel(varlen_attn_ungrouped),
    ],
    ids=["flash-attn", "varlen_attn", "varlen_attn before enable_gqa"],
)
def test_the_kernels_are_told_the_layout(kernel: segment_varlen.Kernel, heads: tuple[int, int]) -> None:
    tree = SegmentTree.of(*TREES["depth three"])
    inputs, grad = make(tree.tokens, heads, 8, torch.float64)

    def attention(query: Tensor, key: Tensor, value: Tensor, tree: SegmentTree, scale: float) -> Tensor:
        return segment_varlen.segment_attention_varlen(query, key, value, tree.layout(CPU), scale, kernel)

    check(run(attention, inputs, tree, 0.3, grad), exact(inputs, tree, 0.3, grad), 1e-12)


@pytest.fixture
def fresh() -> Iterator[None]:
    segment_varlen.installed.cache_clear()
    yield
    segment_varlen.installed.cache_clear()


def importing(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    """Only these modules are installed."""

    def find(name: str) -> Any:
        if name not in modules:
            raise ImportError(name)
        return modules[name]

    monkeypatch.setattr(segment_varlen, "find_spec", modules.get)
    monkeypatch.setattr(segment_varlen, "import_module", find)


def old_varlen_attn(query: Tensor, is_causal: bool = False) -> Tensor:
    raise AssertionError("it cannot be told the scale")


FLASH = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
PYTORCH = SimpleNamespace(varlen_attn=varlen_attn_ungrouped)


@pytest.mark.parametrize(
    ("modules", "name"),
    [
        ({"flash_attn": FLASH, "torch.nn.attention.varlen": PYTORCH}, "flash-attn"),
        ({"torch.nn.attention.varlen": PYTORCH}, "varlen_attn"),
        ({"torch.nn.attention.varlen": SimpleNamespace(varlen_attn=old_varlen_attn)}, None),
        ({}, None),
    ],
)
def test_which_kernel_is_installed(
    fresh: None, monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any], name: str | None
) -> None:
    importing(monkeypatch, modules)
    found = segment_varlen.installed()
    assert (found and found[0]) == name


def test_this_pytorch_has_the_arguments_that_are_used(fresh: None) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="PyTorch before 2.10")
    if not hasattr(varlen, "AuxRequest"):
        pytest.skip("PyTorch before 2.11: varlen_attn cannot be told the scale")
    found = segment_varlen.installed()
    assert found is not None


def like(dtype: torch.dtype, channels: int, device: str = "cuda") -> Any:
    """What is asked of queries."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 4, channels))


@pytest.mark.parametrize(
    ("query", "capability", "forced", "taken"),
    [
        (like(torch.bfloat16, 64), (9, 0), "", True),
        (like(torch.float16, 256), (8, 0), "triton", True),
        (like(torch.float32, 64), (9, 0), "", False),
        (like(torch.bfloat16, 60), (9, 0), "", False),
        (like(torch.bfloat16, 264), (9, 0), "", False),
        (like(torch.bfloat16, 64), (7, 5), "", False),
        (like(torch.bfloat16, 64), (9, 0), "torch", False),
        (like(torch.bfloat16, 64, "cpu"), (9, 0), "", False),
    ],
)
def test_which_queries_it_takes(
    monkeypatch: pytest.MonkeyPatch, query: Any, capability: tuple[int, int], forced: str, taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(segment_varlen, "installed", lambda: ("a kernel", stand_in))
    monkeypatch.setenv("METAREWARD_KERNELS", forced)
    assert (segment_varlen.kernel_for(query) is not None) == taken


def test_segment_attention_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append("call")
        return stand_in(*arguments)

    # The package has a function of the module's name.
    module = import_module("metareward_kernels.segment_attention")
    monkeypatch.setattr(module, "kernel_for", lambda query: ("a kernel", counted))
    tree = SegmentTree.of(*TREES["pair"])
    inputs, grad = make(tree.tokens, (6, 2), 16, torch.float64)
    check(run(segment_attention, inputs, tree, 0.3, grad), exact(inputs, tree, 0.3, grad), 1e-12)
    assert calls == ["call"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [name for name in TREES if name != "one token"])
def test_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    tree = SegmentTree.of(*TREES[case])
    inputs, grad = make(tree.tokens, (6, 2), 64, dtype)
    on_gpu: Callable[[list[Tensor]], list[Tensor]] = lambda parts: [part.cuda() for part in parts]  # noqa: E731
    if segment_varlen.kernel_for(inputs[0].cuda()) is None:
        pytest.skip("no variable-length kernel is installed, or the GPU is older than it needs")
    found = run(segment_attention, on_gpu(inputs), tree, 0.125, grad.cuda())
    check([part.cpu() for part in found], exact(inputs, tree, 0.125, grad), 0.02, 0.01)
