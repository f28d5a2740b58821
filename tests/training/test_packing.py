"""Packed, prefix-shared examples against separate sequences: structure, attention, log-probs, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.packing import SMALLEST_SHARED, PackedBatch, common_prefix, pack, tree_attention

CPU = torch.device("cpu")
Tokens = tuple[int, ...]


def ids(seed: int, count: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 131, (count,), generator=generator).tolist())


def example(prompt: Tokens, *completions: Tokens, kind: str = "actor") -> Example:
    return Example(f"{prompt}{completions}", kind, prompt, completions)


ROOT = ids(1, 20)
CASES: dict[str, list[Example]] = {
    "shared root, several completions": [
        example((*ROOT, *ids(2, 5)), ids(3, 7), ids(4, 4), ids(5, 1)),
        example((*ROOT, *ids(6, 3)), ids(7, 2), ids(8, 9)),
        example((*ROOT, *ids(9, 8)), ids(10, 3), ids(11, 3)),
    ],
    "single completions": [example((*ROOT, *ids(seed, 4)), ids(seed + 1, 6)) for seed in (20, 30, 40)],
    "single completions, nothing shared": [example(ids(seed, 7), ids(seed + 1, 6)) for seed in (50, 60)],
    "identical prompts": [example(ROOT, ids(12, 3), ids(13, 5)), example(ROOT, ids(14, 4), ids(15, 2))],
    "identical prompts, single completions": [example(ROOT, ids(12, 3)), example(ROOT, ids(14, 4))],
    "a prompt that begins another": [example(ROOT, ids(16, 3), ids(17, 2)), example((*ROOT, 5), ids(18, 4))],
    "nothing shared": [
        example(ids(70, 6), ids(71, 5), ids(72, 3)),
        example(ids(73, 9), ids(74, 2), ids(75, 8)),
    ],
    "too little shared": [example((*ROOT[:15], *ids(seed, 3)), ids(1, 4), ids(2, 2)) for seed in (80, 90)],
    "one token each": [example((7,), (9,), (8,)), example((6,), (9,))],
    "one-token completions below a root": [example((*ROOT, 3), (4,), (5,)), example((*ROOT, 4), (4,))],
    "one example": [example(ids(95, 30), ids(96, 12), ids(97, 7))],
    "equal completions": [example((*ROOT, 3), (4, 5), (4, 5))],
    "two kinds, each with its own beginning": [
        *(example((*ROOT, *ids(seed, 4)), ids(seed + 1, 6), ids(seed + 2, 3)) for seed in (20, 30)),
        *(example((*ids(98, 18), *ids(seed, 2)), ids(seed + 1, 5), kind="judge") for seed in (40, 50, 60)),
    ],
    "two kinds of one beginning": [
        *(example((*ROOT, seed), ids(seed + 1, 6)) for seed in (20, 30)),
        *(example(ROOT, ids(seed + 1, 5), kind="judge") for seed in (40, 50)),
    ],
    "one of each kind": [example((*ROOT, 3), (4,)), example((*ROOT, 4), (5,), kind="judge")],
}


def separate(model: Any, examples: Sequence[Example]) -> list[Tensor]:
    """Per-token log-probs of every completion from transformers' logits, one unshared sequence each."""
    found = []
    for item in examples:
        for completion in item.completions:
            sequence = torch.tensor([[*item.prompt, *completion]])
            logits = model(sequence).logits[0, len(item.prompt) - 1 : -1]
            target = torch.tensor(completion)[:, None]
            found.append(torch.log_softmax(logits.double(), -1).gather(1, target).squeeze(1))
    return found


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal to 1e-5 of the largest entry."""
    return bool((found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_logprobs_and_gradients_equal_those_of_separate_sequences(
    models: dict[str, tuple[Any, Path]], family: str, case: str
) -> None:
    model, folder = models[family]
    examples = CASES[case]
    decoder = load_decoder(folder, dtype=torch.float32)
    batch = pack(examples, CPU)
    wanted = separate(model, examples)

    attend = tree_attention(batch.segments)
    tokens = decoder(batch.token_ids, batch.positions, attend, rows=batch.rows, targets=batch.targets)
    assert close(tokens.detach(), torch.cat(wanted).detach())
    sums = batch.sum_completions(tokens)
    assert sums.dtype == torch.float64
    assert close(sums.detach(), torch.stack([part.sum() for part in wanted]).detach())

    # A random factor a completion: gradients of different sequences must not be exchanged or scaled.
    factors = torch.randn(len(wanted), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (sums * factors).sum().backward()
    model.zero_grad()
    sum(
        (part.sum() * factor for part, factor in zip(wanted, factors, strict=True)), torch.zeros(())
    ).backward()
    expected = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None
        assert close(parameter.grad, expected[name].grad), name


def test_token_counts_by_hand() -> None:
    batch = pack(CASES["shared root, several completions"], CPU)
    assert batch.tokens == 20 + (5 + 7 + 4 + 1) + (3 + 2 + 9) + (8 + 3 + 3)
    assert batch.unshared_tokens == (25 * 3 + 12) + (23 * 2 + 11) + (28 * 2 + 6)
    assert batch.lengths == (7, 4, 1, 2, 9, 3, 3)
    assert batch.rows.numel() == batch.targets.numel() == sum(batch.lengths)

    apart = pack(CASES["single completions, nothing shared"], CPU)
    assert apart.tokens == apart.unshared_tokens == 26
    assert len(apart.segments) == 2, "a single completion needs no segment of its own"


def test_each_kind_shares_its_own_beginning() -> None:
    batch = pack(CASES["two kinds, each with its own beginning"], CPU)
    # A root of 20, then twice 4 with completions of 6 and 3; a root of 18, then three times 2 and 5.
    assert batch.tokens == 20 + 2 * (4 + 6 + 3) + 18 + 3 * (2 + 5)
    assert [segment.stop for segment in batch.segments if not segment.ancestors] == [20, 46 + 18]
    # The same examples apart cost the same: mixing kinds in a micro-batch loses nothing.
    apart = [
        pack(CASES["two kinds, each with its own beginning"][part], CPU) for part in (slice(2), slice(2, 5))
    ]
    assert batch.tokens == sum(part.tokens for part in apart)


def test_sharing_begins_at_its_threshold() -> None:
    def tokens(shared: int) -> int:
        return pack([example((*ROOT[:shared], 2), (3,)), example((*ROOT[:shared], 4), (3,))], CPU).tokens

    assert tokens(SMALLEST_SHARED) == SMALLEST_SHARED + 4
    assert tokens(SMALLEST_SHARED - 1) == 2 * (SMALLEST_SHARED + 1)


def test_sums_are_those_of_each_completion() -> None:
    batch = pack(CASES["shared root, several completions"], CPU)
    values = torch.arange(batch.rows.numel(), dtype=torch.float32)
    ends = [7, 11, 12, 14, 23, 26, 29]
    starts = [0, *ends[:-1]]
    assert batch.sum_completions(values).tolist() == [
        float(sum(range(start, end))) for start, end in zip(starts, ends, strict=True)
    ]


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=5)


@given(PROMPTS)
def test_common_prefix_by_brute_force(prompts: list[Tokens]) -> None:
    equal = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    assert common_prefix(prompts) == len(list(equal))


@st.composite
def trees(draw: st.DrawFn) -> list[Example]:
    """Examples whose prompts share about as much as the threshold, from few distinct tokens."""
    token = st.integers(2, 4)
    root = tuple(draw(st.lists(token, min_size=0, max_size=SMALLEST_SHARED + 3)))
    examples = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = (*root, *draw(st.lists(token, min_size=0 if root else 1, max_size=3)))
        completion = st.lists(token, min_size=1, max_size=4).map(tuple)
        kind = draw(st.sampled_from(["actor", "judge"]))
        examples.append(example(prompt, *draw(st.lists(completion, min_size=1, max_size=3)), kind=kind))
    return examples


def visible(batch: PackedBatch) -> Tensor:
    """[T, T] bool, from the definition: a token sees its segment's ancestors and its own segment up to itself."""
    seen = torch.zeros(batch.tokens, batch.tokens, dtype=torch.bool)
    for segment in batch.segments:
        for place in range(segment.start, segment.stop):
            for ancestor in segment.ancestors:
                seen[place, ancestor.start : ancestor.stop] = True
            seen[place, segment.start : place + 1] = True
    return seen


@given(trees())
@settings(max_examples=60)
def test_every_target_is_predicted_from_its_own_sequence(examples: list[Example]) -> None:
    batch = pack(examples, CPU)
    seen = visible(batch)
    assert [(segment.start, segment.stop) for segment in batch.segments] == sorted(
        (segment.start, segment.stop) for segment in batch.segments
    )
    assert sum(segment.stop - segment.start for segment in batch.segments) == batch.tokens
    assert batch.tokens <= batch.unshared_tokens
    row = 0
    for item in examples:
        for completion in item.completions:
            sequence = (*item.prompt, *completion)
            for place, target in enumerate(completion, len(item.prompt)):
                context = seen[batch.rows[row]]
                assert tuple(batch.token_ids[context].tolist()) == sequence[:place]
                assert batch.positions[context].tolist() == list(range(place))
                assert int(batch.positions[batch.rows[row]]) == place - 1
                assert int(batch.targets[row]) == target
                row += 1
    assert row == batch.rows.numel()


@given(trees(), st.integers(0, 2**16))
@settings(max_examples=25)
def test_tree_attention_equals_attention_under_the_full_mask(examples: list[Example], seed: int) -> None:
    batch = pack(examples, CPU)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch.tokens, 4, 8, generator=generator)
    key, value = (torch.randn(batch.tokens, 2, 8, generator=generator) for _ in range(2))
    out = tree_attention(batch.segments)(0, query, key, value)
    wide = [part.repeat_interleave(2, 1).transpose(0, 1) for part in (key, value)]
    wanted = F.scaled_dot_product_attention(query.transpose(0, 1), *wide, attn_mask=visible(batch)).transpose(
        0, 1
    )
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
