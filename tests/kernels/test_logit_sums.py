"""Log-probs from sums that a vocabulary enters part by part, as linear_logprob's forward pass on a CPU makes them."""

from __future__ import annotations

import math

import pytest
import torch
from metareward_kernels import chunked_logprob, linear_logprob, reference
from metareward_kernels.head_rows import (
    RowLogprobs,
    add_logit_sums_,
    logprobs_of_sums,
    new_logit_sums,
)
from torch import Tensor

from tests.kernels.head_checks import nasty_rows

pytestmark = pytest.mark.usefixtures("kernels")


def by_parts(
    logits: Tensor, targets: Tensor, temperature: float, widths: list[int], entropy: bool
) -> RowLogprobs:
    sums, first = new_logit_sums(len(logits), logits.device), 0
    for part in logits.split(widths, dim=1):
        add_logit_sums_(sums, part.contiguous(), targets, first, temperature, entropy)
        first += part.shape[1]
    return logprobs_of_sums(sums, temperature, entropy, torch.float32)


def widths(kind: str, vocabulary: int) -> list[int]:
    if kind == "ones":
        return [1] * min(50, vocabulary) + [vocabulary - 50] * (vocabulary > 50)
    if kind == "whole":
        return [vocabulary]
    return [min(100, vocabulary - start) for start in range(0, vocabulary, 100)]


def nasty(vocabulary: int) -> tuple[Tensor, Tensor]:
    """`nasty_rows`, and: masked at the beginning, masked but for one entry, rising, falling by more than fp32's range of e^x."""
    rows, targets = nasty_rows(vocabulary)
    more = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(1))
    more[0, : vocabulary // 2] = -math.inf
    more[1] = -math.inf
    more[1, -1] = 3.0
    more[2] += torch.linspace(-300.0, 300.0, vocabulary)
    more[3] -= torch.linspace(-300.0, 300.0, vocabulary)
    last = torch.full((4,), vocabulary - 1)
    last[3] = 0
    return torch.cat([rows, more]), torch.cat([targets, last])


@pytest.mark.parametrize("vocabulary", [1, 7, 257, 1280])
@pytest.mark.parametrize("kind", ["ones", "hundreds", "whole"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_parts_give_what_the_whole_gives(vocabulary: int, kind: str, temperature: float) -> None:
    logits, targets = nasty(vocabulary)
    found = by_parts(logits, targets, temperature, widths(kind, vocabulary), True)
    exact = (logits.double() / temperature).log_softmax(dim=1)
    lse = (logits.double() / temperature).logsumexp(dim=1)
    at_target = exact.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found.logprobs.double(), at_target, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.lse.double(), lse, rtol=2e-6, atol=2e-6)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy.double(), reference.entropy(exact), rtol=1e-5, atol=1e-5)
    assert (found.logprobs <= 0).all()
    without = by_parts(logits, targets, temperature, widths(kind, vocabulary), False)
    assert torch.equal(found.logprobs, without.logprobs)


def test_a_nearly_certain_target_is_told_from_a_certain_one() -> None:
    logits = torch.zeros(1, 1000)
    logits[:, 900] = 27.0
    found = by_parts(logits, torch.tensor([900]), 1.0, widths("hundreds", 1000), False)
    # A part adds its terms in fp32, where those beside the largest are lost; the parts are added in fp64.
    assert found.logprobs[0].item() == pytest.approx(-math.log1p(999 * math.exp(-27.0)), rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 150, 299])
def test_no_number_in_any_part_is_none_in_the_end(bad: float, at: int) -> None:
    logits = torch.randn(3, 300)
    logits[1, at] = bad
    logits[2] = -math.inf
    found = by_parts(logits, torch.tensor([1, 1, 1]), 1.0, widths("hundreds", 300), True)
    assert found.logprobs.isnan().tolist() == [False, True, True]
    assert found.entropy is not None
    assert found.entropy.isnan().tolist() == [False, True, True]


def test_a_part_of_no_numbers_is_not_taken_for_a_masked_one() -> None:
    logits = torch.randn(1, 300)
    logits[0, 100:200] = math.nan
    found = by_parts(logits, torch.tensor([1]), 1.0, widths("hundreds", 300), False)
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_slabs_of_the_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(70, 24, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(501, 24, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    bias = torch.randn(501, generator=generator, dtype=torch.float64).to(dtype)
    bias[:100] = -math.inf  # the whole first slab
    targets = torch.randint(100, 501, (70,), generator=generator)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets, bias=bias.double())
    for tokens, entries in ((16, 100), (70, 37), (2048, 2048)):
        monkeypatch.setattr(chunked_logprob, "SLAB_TOKENS", tokens)
        monkeypatch.setattr(chunked_logprob, "SLAB_ENTRIES", entries)
        found, entropy = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True)
        torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-5)
        assert entropy.isfinite().all()
