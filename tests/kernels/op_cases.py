"""Arguments of every op for torch.library.opcheck: contiguous, strided and empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.dpo_checks import TANGLED

Arguments = tuple[Any, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def ids(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))


def layouts(rows: int, width: int) -> list[Tensor]:
    """[rows,width] contiguous, every second column of a wider tensor, and no rows."""
    return [randn(rows, width), randn(rows, 2 * width)[:, ::2], randn(0, width)]


def head_cases() -> list[Arguments]:
    weight, bias = randn(9, 4), randn(18)[::2]
    return [
        (
            leaf(hidden),
            leaf(weight),
            ids(len(hidden), 9),
            None if b is None else leaf(b),
            0.9,
            4,
            b is not None,
        )
        for hidden in layouts(6, 4)
        for b in (None, bias)
    ]


def head_backward_cases() -> list[Arguments]:
    return [
        (
            randn(len(hidden)),
            hidden,
            randn(9, 4),
            ids(len(hidden), 9),
            None,
            randn(len(hidden)),
            0.9,
            4,
            True,
            need,
            False,
        )
        for hidden in layouts(6, 4)
        for need in (True, False)
    ]


def gather_cases() -> list[Arguments]:
    shaped = (leaf(randn(2, 3, 9)), ids(6, 9).view(2, 3), 1.0)
    return [shaped, *((leaf(logits), ids(len(logits), 9), 0.9) for logits in layouts(6, 9))]


def gather_backward_cases() -> list[Arguments]:
    return [
        (randn(len(logits)), logits, ids(len(logits), 9), randn(len(logits)), 0.9) for logits in layouts(6, 9)
    ]


def sum_cases() -> list[Arguments]:
    logprobs, cu_seqlens, pairs, _ = TANGLED
    none = torch.zeros(0).requires_grad_(), torch.zeros(1).long(), torch.zeros(0, 2).long()
    strided = logprobs.repeat_interleave(2)[::2]
    return [(leaf(logprobs), cu_seqlens, pairs), (leaf(strided), cu_seqlens.int(), pairs.int()), none]


def attention_cases() -> list[Arguments]:
    """Two rows share 5 tokens, the second has 2 more, a third sees nothing; then no rows at all."""
    cases = []
    for rows in (3, 0):
        query, pages = randn(rows, 4, 32)[:, :, ::2] if rows else randn(0, 4, 16), randn(2, 4, 4, 2, 16)
        entries = [[0, 1, 2], [0, 2], [5, 2], [0, 1, 1], [0, 2, 3], [5, 3, 2]]
        if not rows:
            entries = [[], [], [], [], [0], []]
        segments = [torch.tensor(part, dtype=torch.int32) for part in entries]
        cases.append((query, pages[0], pages[1], *segments, 0.3))
    return cases


def draw_cases() -> list[Arguments]:
    return [
        (logits, torch.rand(len(logits), dtype=torch.float64), 0.8, 5, 0.9, 0.1)
        for logits in (*layouts(3, 50), randn(3, 50).bfloat16())
    ]


def key_cases() -> list[Arguments]:
    return [(keys, keys.clone()) for keys in (torch.arange(6), torch.arange(12)[::2], torch.arange(0))]


def row_cases() -> list[Arguments]:
    return [
        (logits, ids(len(logits), 9), 0.9) for logits in (randn(6, 9), randn(6, 9).bfloat16(), randn(0, 9))
    ]


def sums_cases() -> list[Arguments]:
    return [
        (*case[:2], 3, 0.9, entropy, torch.zeros(4, len(case[0]), dtype=torch.float64))
        for case in row_cases()
        for entropy in (False, True)
    ]


def row_gradient_cases() -> list[Arguments]:
    return [
        (randn(rows, 9), ids(rows, 9), randn(rows), randn(rows), 0.9, out)
        for rows in (6, 0)
        for out in (None, torch.zeros(rows, 9, dtype=torch.bfloat16))
    ]


def norm_cases() -> list[Arguments]:
    return [
        case
        for rows in (3, 0)
        for case in (
            (randn(rows, 48), randn(rows, 48), randn(48), 1e-5),
            (randn(rows, 50)[:, :48], None, randn(48), 1e-5),
            (randn(rows, 48), randn(rows, 48).bfloat16(), randn(48).bfloat16(), 1e-5),
        )
    ]


def rotary_cases() -> list[Arguments]:
    cases = []
    for rows in (3, 0):
        pages, angles = torch.zeros(2, 2, 3, 1, 8), randn(rows, 1, 8)
        for norm in (None, randn(8)):
            cases.append(
                (randn(rows, 48), angles.cos(), angles.sin(), torch.arange(rows), *pages, norm, norm, 1e-5)
            )
    return cases


def packed_cases() -> list[Arguments]:
    weight = randn(50, 7).bfloat16()
    packed = torch.ops.metareward.pack_bf16_weight_cpp(weight)
    return [(randn(rows, 7).bfloat16(), packed, torch.zeros(rows, 50)) for rows in (3, 0)]


def product_cases() -> list[Arguments]:
    weight = randn(50, 7).bfloat16()
    return [(randn(rows, 7).bfloat16(), weight, torch.zeros(rows, 50)) for rows in (3, 0)]


def gated_cases() -> list[Arguments]:
    packed = torch.ops.metareward.pack_bf16_weight_cpp(randn(50, 7).bfloat16())
    tiles = torch.stack([packed, packed], dim=1)
    return [(randn(rows, 7).bfloat16(), tiles, torch.zeros(rows, 50)) for rows in (3, 0)]


def softmax_cases() -> list[Arguments]:
    weight = randn(70, 12).bfloat16()
    return [
        (randn(rows, 12).bfloat16(), weight, bias, ids(rows, 70), 0.9, panels, out)
        for rows in (3, 0)
        for bias, panels, out in (
            (None, False, None),
            (randn(70), True, torch.zeros(2, rows, 64, dtype=torch.bfloat16)),
        )
    ]


def layer_cases() -> list[Arguments]:
    """Two layers of width 8, two query heads and one key head of 4; three tokens of one sequence, or none."""
    cases = []
    for tokens in (3, 0):
        packed = [torch.ops.metareward.pack_bf16_weight_cpp(randn(n, 8).bfloat16()) for n in (16, 8, 6, 6)]
        down = torch.ops.metareward.pack_bf16_weight_cpp(randn(8, 6).bfloat16())
        layer = [randn(8).bfloat16(), *packed[:2], randn(8).bfloat16(), torch.stack(packed[2:], dim=1), down]
        angles = [randn(tokens, 1, 4).bfloat16() for _ in range(2)]
        pages = [[torch.zeros(2, 4, 1, 4).bfloat16() for _ in range(2)] for _ in range(2)]
        segments = [[0], [0], [tokens], range(tokens), [0, tokens], range(1, tokens + 1)]
        numbers = [torch.tensor(list(part), dtype=torch.int32) for part in segments]
        rows = torch.tensor([tokens - 1] if tokens else [], dtype=torch.int64)
        cases.append(
            (
                randn(tokens, 8),
                *angles,
                torch.arange(tokens),
                *pages,
                *numbers,
                layer * 2,
                [],
                randn(8).bfloat16(),
                rows,
                2,
                6,
                1e-6,
                0.5,
            )
        )
    return cases


def panels(rows: int) -> Tensor:
    return randn(2, rows, 64).bfloat16()


def panel_hidden_cases() -> list[Arguments]:
    return [
        (panels(rows), randn(rows, 12).bfloat16(), randn(rows), accumulate, torch.zeros(70, 12), bias)
        for rows in (3, 0)
        for accumulate, bias in ((True, torch.zeros(70)), (False, None))
    ]


def residual_cases() -> list[Arguments]:
    return [
        (
            randn(rows, 9).to(dtype),
            ids(rows, 9),
            0.9,
            True,
            None if out is None else torch.zeros(rows, 9, dtype=out),
        )
        for rows in (6, 0)
        for dtype, out in ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None))
    ]


def segment_cases() -> list[Arguments]:
    """Query, key and value of a projection's rows, of each dtype and layout, and no tokens; a tree with an empty segment."""
    tree = (
        torch.tensor([0, 9, 9, 14, 17], dtype=torch.int32),
        torch.tensor([-1, 0, 1, 0], dtype=torch.int32),
    )
    none = (torch.tensor([0], dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    joined = [randn(17, 8, 24), randn(8, 17, 24).transpose(0, 1), randn(17, 8, 24).bfloat16()]
    return [
        *((*(leaf(part) for part in rows.split([4, 2, 2], dim=1)), *tree, 0.3) for rows in joined),
        # opcheck cannot copy an empty view, so these are no parts of one tensor.
        (*(leaf(randn(0, heads, 24)) for heads in (4, 2, 2)), *none, 0.3),
    ]


def segment_backward_cases() -> list[Arguments]:
    cases = []
    for query, key, value, *tree in segment_cases():
        inputs = [x.detach() for x in (query, key, value)]
        out, lse = torch.ops.metareward.segment_attention_cpp(*inputs, *tree)
        cases.append((randn(*out.shape).to(out.dtype), *inputs, out, lse, *tree))
    return cases


def traced_cases() -> list[Arguments]:
    """segment_cases with the tree as one tensor."""
    return [
        (query, key, value, torch.stack([offsets, torch.nn.functional.pad(parents, (0, 1), value=-1)]), scale)
        for query, key, value, offsets, parents, scale in segment_cases()
    ]


def traced_backward_cases() -> list[Arguments]:
    cases = []
    for query, key, value, *tree in traced_cases():
        inputs = [x.detach() for x in (query, key, value)]
        out, lse = torch.ops.metareward.traced_segment_attention(*inputs, *tree)
        cases.append((randn(*out.shape).to(out.dtype), *inputs, out, lse, *tree))
    return cases
