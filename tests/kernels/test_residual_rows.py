"""softmax_residual_rows_: against fp64, in every implementation."""

from __future__ import annotations

import pytest
import torch
from metareward_kernels import linear_preference
from metareward_kernels.head_rows import logprob_rows, softmax_residual_rows_

from tests.kernels.preference_checks import (
    make,
    run,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("vocabulary", [1, 17, 64, 1000, 1041])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_residual_rows(vocabulary: int, dtype: torch.dtype, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(9, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (9,), generator=generator)
    exact = (logits.double() / 0.7).log_softmax(dim=1)
    residual = torch.nn.functional.one_hot(targets, vocabulary) - exact.exp()
    plain = logprob_rows(logits, targets, 0.7, entropy=True)
    out = torch.empty(9, vocabulary, dtype=torch.bfloat16) if rounded and dtype == torch.float32 else None
    work = logits.clone()
    found = softmax_residual_rows_(work, targets, 0.7, entropy=True, out=out)
    for rows in (plain, found):
        assert rows.entropy is not None
        at_target = exact.gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(rows.logprobs.double(), at_target, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            rows.lse.double(), (logits.double() / 0.7).logsumexp(dim=1), rtol=1e-6, atol=1e-5
        )
        torch.testing.assert_close(
            rows.entropy.double(), -(exact.exp() * exact).sum(dim=1), rtol=1e-5, atol=1e-5
        )
    result = work if out is None else out
    relative = 2e-6 if result.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(result.double(), residual, rtol=relative, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logprobs_without_gradients_are_those_of_training_to_the_bit(dtype: torch.dtype) -> None:
    """A reference computed by this op must not differ from the policy by rounding: the first DPO loss would not be ln 2."""
    lengths = (70, 3, 41, 90, 0, 12, 33)
    problem = make(249, 64, 1003, dtype, lengths, ((3, 0), (1, 6), (6, 2)))
    # Unpaired sequences, a component apart in the row, and one longer than a chunk.
    for chunk_tokens in (100, 4096):
        trained, _ = run(problem, chunk_tokens=chunk_tokens)
        with torch.no_grad():
            alone = linear_preference(**problem, chunk_tokens=chunk_tokens)
        assert torch.equal(alone.logprobs, trained.logprobs)
        assert torch.equal(alone.losses, trained.losses)
