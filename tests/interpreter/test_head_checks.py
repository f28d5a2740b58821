"""tests/kernels/head_checks.py through the ops' Triton kernels."""

from __future__ import annotations

import pytest
from metareward_kernels.dispatch import TRITON_OPS

from tests.kernels import head_checks

NEEDED = {
    "gather_logprob": {"head_rows"},
    "gather_logprob, logits kept": {"head_rows"},
    "linear_logprob": {"head_rows", "linear_logprob"},
}


def test_every_op_is_named() -> None:
    assert NEEDED.keys() == head_checks.OPS.keys()


@pytest.mark.parametrize("check", list(head_checks.CHECKS))
@pytest.mark.parametrize("op", [op for op, needed in NEEDED.items() if needed <= TRITON_OPS])
def test_check(op: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")
    monkeypatch.setattr(head_checks, "VOCABULARIES", (1, 7, 130, 257))  # the interpreter is slow
    head_checks.CHECKS[check](head_checks.OPS[op])
