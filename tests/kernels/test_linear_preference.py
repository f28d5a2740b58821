"""linear_preference: values and gradients, in every implementation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from metareward_kernels import (
    dpo_loss,
    linear_logprob,
    linear_preference,
)
from metareward_kernels.pair_losses import PairLoss, dpo, hinge, ipo

from tests.kernels.preference_checks import (
    DPO,
    LEAVES,
    TOLERANCE,
    assert_matches,
    make,
    oracle,
    run,
    skip_where_not_compiled,
    weighted,
)

pytestmark = pytest.mark.usefixtures("kernels")


# A chunk of 8 tokens is shorter than every pair, 16 takes one pair, 64 takes all.
@pytest.mark.parametrize("chunk_tokens", [8, 16, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_the_reference(kernels: str, chunk_tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
    skip_where_not_compiled(kernels, dtype)
    problem = make(dtype=dtype)
    if not with_bias:
        problem["bias"] = None
    assert_matches(
        {**problem, "temperature": 0.8}, TOLERANCE[dtype], upstream=-0.7, chunk_tokens=chunk_tokens
    )


@pytest.mark.parametrize(
    "loss",
    [
        DPO,
        partial(dpo, beta=0.3, label_smoothing=0.2),
        partial(ipo, beta=0.2),
        partial(hinge, beta=0.05),
        weighted,
    ],
    ids=["dpo", "smoothed", "ipo", "hinge", "custom"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses(kernels: str, loss: PairLoss, dtype: torch.dtype) -> None:
    skip_where_not_compiled(kernels, dtype)
    problem = make(dtype=dtype, loss=loss, pair_weights=torch.tensor([0.5, -1.0, 2.0]))
    assert_matches(problem, 2 * TOLERANCE[dtype], chunk_tokens=30)


def test_rewards_are_those_of_dpo_loss() -> None:
    problem = make()
    found, _ = run(problem, beta=0.1)
    tokens = linear_logprob(problem["hidden"], problem["weight"], problem["targets"], bias=problem["bias"])
    settings = (problem["cu_seqlens"], problem["pairs"], problem["reference_logprobs"])
    other = dpo_loss(tokens, *settings, beta=0.1)
    torch.testing.assert_close(found.losses, other.losses)
    torch.testing.assert_close(found.chosen_rewards, other.chosen_rewards)
    torch.testing.assert_close(found.rejected_rewards, other.rejected_rewards)
    torch.testing.assert_close(found.margins, other.margins)


@pytest.mark.parametrize("vocabulary", [1, 7, 48, 383, 385, 800, 1280, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    if vocabulary == 1:  # the only token is certain: no gradient
        found, gradients = run(make(vocabulary=1, dtype=dtype))
        assert found.logprobs.tolist() == [0.0] * 6
        assert all(not gradient.any() for gradient in gradients)
        return
    assert_matches(make(vocabulary=vocabulary, dtype=dtype), TOLERANCE[dtype], chunk_tokens=64)


@pytest.mark.parametrize("width", [1, 2, 30, 33, 47, 50, 130])
@pytest.mark.parametrize("rows", [1, 9, 520, 1030])
def test_shapes_that_fit_no_tile(width: int, rows: int) -> None:
    problem = make(
        rows + 3, width, 70, torch.bfloat16, lengths=(rows, 3), pairs=((0, 1),), loss=partial(dpo, beta=0.01)
    )
    assert_matches(problem, TOLERANCE[torch.bfloat16], chunk_tokens=2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "nature", ["flat", "near -100", "one at +80", "one at +3000", "target far below", "rising"]
)
def test_nasty_logits(nature: str, dtype: torch.dtype) -> None:
    problem = make(vocabulary=2000, dtype=dtype)
    problem["hidden"][:, 0] = 1.0
    column = problem["weight"][:, 0]
    column.zero_()
    if nature == "flat":
        problem["weight"].zero_()
        problem["bias"].zero_()
    elif nature == "near -100":
        column.fill_(-100.0)
    elif nature == "target far below":
        column.fill_(64.0)
        column[problem["targets"]] = -64.0
    elif nature == "rising":  # every stretch of the vocabulary is far above the one before
        column.copy_(torch.arange(2000) // 250 * 48.0)
    else:
        column[1234] = 80.0 if nature == "one at +80" else 3000.0
        problem["targets"][::3] = 1234
    found, gradients = run(problem, return_entropy=True)
    (loss, logprobs, entropy), exact = oracle(problem)
    torch.testing.assert_close(found.logprobs, logprobs, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert (found.logprobs <= 0).all()
    # Where all logits hang on one column of the weight, its hidden gradient is the rounding of sum(p) - 1, times 64 or 100.
    gradients[0], exact[0] = gradients[0][:, 1:], exact[0][:, 1:]
    for ours, true in zip(gradients, exact, strict=True):
        assert (ours.double() - true).norm() <= (2e-5 if dtype == torch.float32 else 0.008) * true.norm()


def test_masked_vocabulary_and_not_a_number() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(dtype=dtype)
        problem["bias"][50:60] = -math.inf
        problem["targets"] %= 50
        found, gradients = run(problem, return_entropy=True)
        assert found.entropy is not None
        assert found.entropy.isfinite().all()
        assert found.logprobs.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[2][50:60].any()
        problem["hidden"][2] = math.nan  # in sequence 0
        found, _ = run(problem)
        assert found.logprobs.isnan().tolist() == [True] + [False] * 5
        assert found.losses.isnan().tolist() == [True, False, False]


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    problem = make(9, 4, 6, lengths=(3, 2, 0, 4), pairs=((0, 1), (3, 0)), loss=weighted)
    inputs = [problem[name].requires_grad_() for name in LEAVES]
    for chunk_tokens in (2, 100):
        assert torch.autograd.gradcheck(
            lambda h, w, b, chunk_tokens=chunk_tokens: (
                linear_preference(
                    **{**problem, "hidden": h, "weight": w, "bias": b},
                    temperature=0.7,
                    chunk_tokens=chunk_tokens,
                ).loss
            ),
            inputs,
        )
