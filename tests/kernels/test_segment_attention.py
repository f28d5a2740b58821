"""segment_attention: values and gradients against the fp64 reference and against separate sequences, on both paths."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from metareward_kernels import SegmentTree, implementation, reference, segment_attention
from metareward_kernels.segment_attention import segment_attention_torch
from torch import Tensor

from tests.kernels.segment_checks import TREES, check, exact, make, run

HAS_CPP = implementation("segment_attention") == "cpp"
needs_library = pytest.mark.skipif(not HAS_CPP, reason="the compiled library is not built")
HEADS = [(1, 1), (3, 1), (4, 1), (6, 2), (3, 3)]


@pytest.fixture(params=["cpp", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and not HAS_CPP:
        pytest.skip("the compiled library is not built")
    monkeypatch.setenv("METAREWARD_KERNELS", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def separate(query: Tensor, key: Tensor, value: Tensor, tree: SegmentTree, scale: float) -> Tensor:
    """Every segment at the end of a sequence of its own, under PyTorch's causal attention."""
    group = query.shape[1] // key.shape[1]
    parts = []
    for own, ancestors in tree.spans():
        spans = (*ancestors, own)
        rows = [torch.cat([x[span] for span in spans]).transpose(0, 1) for x in (query, key, value)]
        rows[1:] = [x.repeat_interleave(group, 0) for x in rows[1:]]
        sequence = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale)
        parts.append(sequence.transpose(0, 1)[rows[0].shape[1] - (own.stop - own.start) :])
    return torch.cat(parts)


@pytest.mark.parametrize("case", ["pair", "depth three", "several roots", "empty segments"])
def test_the_reference_is_attention_of_separate_sequences(case: str) -> None:
    tree = SegmentTree.of(*TREES[case])
    inputs, grad = make(tree.tokens, (4, 2), 8, torch.float64)
    check(run(separate, inputs, tree, 0.3, grad), exact(inputs, tree, 0.3, grad), 1e-12)


def test_gradcheck_of_the_torch_path() -> None:
    tree = SegmentTree.of([3, 2, 1, 2], [-1, 0, 1, 0])
    inputs, _ = make(tree.tokens, (4, 2), 3, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: segment_attention(*x, tree, 0.7), leaves)


@pytest.mark.parametrize("case", TREES)
def test_float32_matches_the_reference(kernels: str, case: str) -> None:
    tree = SegmentTree.of(*TREES[case])
    inputs, grad = make(tree.tokens, (6, 2), 64)
    check(run(segment_attention, inputs, tree, 0.125, grad), exact(inputs, tree, 0.125, grad), 1e-5)


@pytest.mark.parametrize("case", TREES)
def test_bfloat16_stays_within_its_rounding(kernels: str, case: str) -> None:
    tree = SegmentTree.of(*TREES[case])
    inputs, grad = make(tree.tokens, (6, 2), 64, torch.bfloat16)
    found = run(segment_attention, inputs, tree, 0.125, grad)
    assert all(x.dtype == torch.bfloat16 for x in found)
    check(found, exact(inputs, tree, 0.125, grad), 0.02, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 24, 32, 40, 64, 96, 128, 200])
def test_every_head_dimension_and_group(dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    tree = SegmentTree.of([37, 12, 1, 22], [-1, 0, 1, 0])
    inputs, grad = make(tree.tokens, heads, dim, dtype, dim)
    limits = (1e-5, None) if dtype == torch.float32 else (0.02, 0.01)
    found = run(segment_attention, inputs, tree, dim**-0.5, grad)
    check(found, exact(inputs, tree, dim**-0.5, grad), *limits)


@pytest.mark.parametrize("seed", range(30))
def test_random_trees(seed: int) -> None:
    draw = random.Random(seed)
    lengths, parents, depths = [], [], []
    for segment in range(draw.randint(1, 9)):
        choices = [-1, *(s for s in range(segment) if depths[s] < 3)]
        parent = draw.choice(choices[-3:])
        parents.append(parent)
        depths.append(0 if parent < 0 else depths[parent] + 1)
        lengths.append(draw.choice([0, 1, 2, draw.randint(3, 60), draw.randint(61, 200)]))
    tree = SegmentTree.of(lengths, parents)
    kv_heads = draw.choice([1, 2])
    heads, dim = (kv_heads * draw.choice([1, 3, 4, 5]), kv_heads), 8 * draw.randint(1, 17)
    scale = draw.choice([0.01, dim**-0.5, 1.0])
    # In bf16 sum(dO O) comes from a rounded result. Where few queries see hardly more than one key each, as in tree 22,
    # that is all the error there is, and as large in PyTorch.
    for dtype, limits in ((torch.float32, (1e-5, None)), (torch.bfloat16, (0.03, 0.02))):
        inputs, grad = make(tree.tokens, heads, dim, dtype, seed)
        if tree.tokens > 0:
            found = run(segment_attention, inputs, tree, scale, grad)
            check(found, exact(inputs, tree, scale, grad), *limits, terms=scale * dim**0.5)


@needs_library
def test_contexts_so_long_that_units_grow() -> None:
    tree = SegmentTree.of([4500, 40, 300], [-1, 0, 0])  # more than 8 times 512 keys
    inputs, grad = make(tree.tokens, (2, 1), 8)
    wanted = run(segment_attention_torch, inputs, tree, 0.5, grad)
    check(run(segment_attention, inputs, tree, 0.5, grad), wanted, 2e-5)


def test_strided_inputs_and_gradients(kernels: str) -> None:
    tree = SegmentTree.of([40, 9, 12], [-1, 0, 0])
    inputs, grad = make(tree.tokens, (4, 2), 32)
    wanted = exact(inputs, tree, 0.2, grad)
    joined = torch.cat(inputs, dim=1).requires_grad_()  # as a projection to [T,(Hq+2Hk)*D] leaves them
    out = segment_attention(*joined.split([4, 2, 2], dim=1), tree, 0.2)
    (joined_grad,) = torch.autograd.grad(out, joined, grad)
    check([out.detach(), *joined_grad.split([4, 2, 2], dim=1)], wanted, 1e-5)

    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in inputs]  # channels far apart
    turned_grad = grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert turned[0].stride(2) != 1
    check(run(segment_attention, turned, tree, 0.2, turned_grad), wanted, 1e-5)

    constant = torch.ones(1, 1, 1).expand_as(grad)  # what .sum().backward() brings: strides of zero
    check(run(segment_attention, inputs, tree, 0.2, constant), exact(inputs, tree, 0.2, constant), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_large_scores(kernels: str, dtype: torch.dtype) -> None:
    """One key far above the others, far below, and all of them high: no overflow, and what sees little keeps its digits."""
    tree = SegmentTree.of([150, 30, 20], [-1, 0, 0])
    inputs, grad = make(tree.tokens, (3, 1), 16, dtype)
    query, key, _ = inputs
    query[:, :, 0], key[:, :, 0] = 8.0, 0.0
    for place, height in ((7, 40.0), (149, -40.0), (160, 80.0), (185, -80.0)):
        key[place, :, 0] = height  # scores of up to 640
    # In bf16, sum(dO O) comes from a rounded result; in the gradient of channel 0 that counts 80 times.
    channels = slice(1 if dtype == torch.bfloat16 else 0, None)

    def compare(largest: float, mean: float | None = None) -> None:
        limits = (largest, mean) if dtype == torch.float32 else (0.02, 0.01)
        found, wanted = run(segment_attention, inputs, tree, 1.0, grad), exact(inputs, tree, 1.0, grad)
        check(found, wanted, *limits, terms=4.0, channels=channels)

    compare(1e-5)
    for height in (100.0, -100.0):  # all scores near 800, where fp32 has steps of 6e-5
        key[:, :, 0] = height
        compare(5e-4, 2e-4)


def test_equal_keys_give_the_mean_of_the_values() -> None:
    tree = SegmentTree.of([5, 3], [-1, 0])
    (query, key, value), _ = make(8, (2, 1), 8)
    out = segment_attention(query, torch.zeros_like(key), value, tree, 1.0)
    wanted = torch.stack([value[: t + 1].double().mean(dim=0) for t in range(8)]).expand(-1, 2, -1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_whatever_the_number_of_threads(threads: None, dtype: torch.dtype) -> None:
    tree = SegmentTree.of([1100, 150, 33, 1], [-1, 0, 0, 1])
    inputs, grad = make(tree.tokens, (6, 2), 64, dtype)
    torch.set_num_threads(1)
    first = run(segment_attention, inputs, tree, 0.125, grad)
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        again = run(segment_attention, inputs, tree, 0.125, grad)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@needs_library
def test_a_segment_has_the_same_bits_whatever_lies_beside_it() -> None:
    inputs, _ = make(200, (3, 1), 64)
    pair = SegmentTree.of([120, 50, 30], [-1, 0, 0])
    whole = segment_attention(*inputs, pair, 0.125)
    alone = segment_attention(*(x[:170] for x in inputs), SegmentTree.of([120, 50], [-1, 0]), 0.125)
    assert torch.equal(whole[:170], alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_not_finite_stays_within_its_sequences(
    kernels: str, which: int, bad: float, dtype: torch.dtype
) -> None:
    # Prompt 0 with completions 1 and 2, and an unrelated prompt 3 with completion 4; 2 is spoilt.
    tree = SegmentTree.of([21, 18, 15, 9, 13], [-1, 0, 0, -1, 3])
    inputs, grad = make(tree.tokens, (4, 2), 32, dtype)
    clean = run(segment_attention, inputs, tree, 0.2, grad)
    inputs[which][39 + 4] = bad
    found = run(segment_attention, inputs, tree, 0.2, grad)
    assert not found[0][39:54].isfinite().all()
    for index, (spoilt, whole) in enumerate(zip(found, clean, strict=True)):
        # The prompt's keys and values serve the spoilt completion, so their gradients are spoilt, and rightly.
        for part in (slice(0 if index < 2 else 21, 39), slice(54, 76)):
            assert torch.equal(spoilt[part], whole[part])


@needs_library
def test_memory_beside_the_inputs_may_hold_anything() -> None:
    # Rows of a larger buffer whose other channels, heads and tokens are NaN.
    tree = SegmentTree.of([33, 7, 6], [-1, 0, 0])
    inputs, grad = make(tree.tokens, (3, 1), 24)
    wanted = run(segment_attention, inputs, tree, 0.2, grad)
    views = []
    for x in (*inputs, grad):
        buffer = torch.full((x.shape[0] + 4, x.shape[1] + 2, x.shape[2] + 5), float("nan"))
        view = buffer[2:-2, 1:-1, 3:-2]
        views.append(view.copy_(x))
    found = run(segment_attention, views[:3], tree, 0.2, views[3])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_tokens(kernels: str, dtype: torch.dtype) -> None:
    inputs, grad = make(0, (4, 2), 8, dtype)
    constant = torch.ones(1, 1, 1, dtype=dtype).expand_as(grad)
    for tree in (SegmentTree.of([], []), SegmentTree.of([0, 0], [-1, 0])):
        for upstream in (grad, constant):
            found = run(segment_attention, inputs, tree, 1.0, upstream)
            assert [x.shape for x in found] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]


def test_float64_runs_in_torch_and_a_forced_cpp_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = SegmentTree.of([4, 2], [-1, 0])
    inputs, grad = make(6, (2, 1), 8, torch.float64)
    check(run(segment_attention, inputs, tree, 0.5, grad), exact(inputs, tree, 0.5, grad), 1e-12)
    monkeypatch.setenv("METAREWARD_KERNELS", "cpp")
    if HAS_CPP:
        with pytest.raises(RuntimeError, match="float32 and bfloat16, not torch"):
            segment_attention(*inputs, tree, 0.5)


def test_masks_are_made_once_for_all_layers() -> None:
    tree = SegmentTree.of([4, 2, 2], [-1, 0, 0])
    assert tree.mask(4, 2, torch.device("cpu")) is tree.mask(4, 2, torch.device("cpu"))
    assert tree.mask(1, 2, torch.device("cpu")).tolist() == [[True, True, False], [True, True, True]]


@needs_library
def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    tree = SegmentTree.of([20, 5], [-1, 0])
    (query, key, value), _ = make(25, (4, 2), 16)
    _, lse = torch.ops.metareward.segment_attention_cpp(query, key, value, tree.offsets, tree.parents, 0.3)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double().repeat_interleave(2, 1)) * 0.3
    wanted = scores.masked_fill(~reference.visible_tokens(tree), float("-inf")).logsumexp(-1).T
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=1e-6)
