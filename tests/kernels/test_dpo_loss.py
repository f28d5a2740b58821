"""dpo_loss in PyTorch: dpo_checks.py, gradcheck, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from metareward_kernels import dpo_loss

from tests.kernels import dpo_checks
from tests.kernels.dpo_checks import LOSSES, TANGLED, make


@pytest.mark.parametrize("check", list(dpo_checks.CHECKS))
def test_check(check: str) -> None:
    dpo_checks.CHECKS[check](dpo_loss)


@pytest.mark.parametrize(("loss", "label_smoothing"), LOSSES)
def test_gradcheck_in_fp64(loss: str, label_smoothing: float) -> None:
    case = make([2, 0, 3, 1], [(0, 2), (2, 1), (3, 2)])

    def losses_and_sums(logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = dpo_loss(
            logprobs,
            case.cu_seqlens,
            case.pairs,
            case.reference.double(),
            beta=0.3,
            loss=loss,
            label_smoothing=label_smoothing,
        )
        assert found.losses.dtype == torch.float64
        return found.losses, found.logprobs

    assert torch.autograd.gradcheck(losses_and_sums, (case.logprobs.double().requires_grad_(),))


def test_equal_policies_lose_ln_2() -> None:
    case = make([5, 6], [(0, 1)], scale=0.0)
    found = dpo_loss(*case, beta=0.1)
    assert found.losses.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.margins.item() == pytest.approx(0.0, abs=1e-6)


def test_the_reference_gets_no_gradient() -> None:
    reference = TANGLED.reference.clone().requires_grad_()
    assert not dpo_loss(*TANGLED[:3], reference, beta=0.1).losses.requires_grad


@pytest.mark.parametrize(
    ("kind", "message", "changes"),
    [
        (
            TypeError,
            "float32 or float64, got torch.bfloat16; pass logprobs",
            {"logprobs": TANGLED.logprobs.bfloat16()},
        ),
        (
            TypeError,
            "reference_logprobs must be torch.float32",
            {"reference_logprobs": TANGLED.reference.double()},
        ),
        (TypeError, "cu_seqlens must be int32 or int64", {"cu_seqlens": TANGLED.cu_seqlens.float()}),
        (TypeError, "pairs must be int32 or int64", {"pairs": TANGLED.pairs.short()}),
        (ValueError, "pairs on meta; move one", {"pairs": TANGLED.pairs.to("meta")}),
        (
            ValueError,
            "reference_logprobs on meta; move one",
            {"reference_logprobs": TANGLED.reference.to("meta")},
        ),
        (ValueError, r"need logprobs \[T\]", {"logprobs": TANGLED.logprobs[None]}),
        (ValueError, r"need logprobs \[T\]", {"cu_seqlens": TANGLED.cu_seqlens[:0]}),
        (ValueError, r"need pairs \[P,2\]", {"pairs": TANGLED.pairs.T}),
        (ValueError, "one reference log-prob a sequence", {"reference_logprobs": TANGLED.reference[1:]}),
        (ValueError, "rise from 0 to the 93 tokens", {"logprobs": TANGLED.logprobs[1:]}),
        (ValueError, "rise from 0", {"cu_seqlens": TANGLED.cu_seqlens.flip(0)}),
        (ValueError, "rise from 0", {"cu_seqlens": TANGLED.cu_seqlens[[0, 2, 1, *range(3, 9)]]}),
        (IndexError, r"sequences \[0, 8\] of \[0, 7\]", {"pairs": torch.tensor([[0, 8]])}),
        (IndexError, r"sequences \[-1, 1\] of \[0, 7\]", {"pairs": torch.tensor([[-1, 1]])}),
        (ValueError, "beta must be positive", {"beta": 0.0}),
        (ValueError, "beta must be positive", {"beta": math.nan}),
        (ValueError, "one of sigmoid, ipo, hinge, got 'kto'", {"loss": "kto"}),
        (ValueError, r"label_smoothing must lie in \[0, 0.5\)", {"label_smoothing": 0.5}),
        (ValueError, 'works with loss="sigmoid" only', {"loss": "ipo", "label_smoothing": 0.1}),
    ],
)
def test_bad_arguments(kind: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments = {
        "logprobs": TANGLED.logprobs,
        "cu_seqlens": TANGLED.cu_seqlens,
        "pairs": TANGLED.pairs,
        "reference_logprobs": TANGLED.reference,
        "beta": 0.1,
    }
    with pytest.raises(kind, match=message):
        dpo_loss(**{**arguments, **changes})  # type: ignore[arg-type]


def test_no_sequences_but_pairs() -> None:
    with pytest.raises(IndexError, match="1 pairs, but no sequences"):
        dpo_loss(
            torch.zeros(0),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(0),
            beta=1.0,
        )
