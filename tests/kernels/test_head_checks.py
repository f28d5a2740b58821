"""head_checks.py in the implementations that a CPU has; tests/interpreter/test_head_checks.py runs Triton's."""

from __future__ import annotations

import pytest
import torch
from metareward_kernels import implementation

from tests.kernels import head_checks


@pytest.mark.parametrize("check", list(head_checks.CHECKS))
@pytest.mark.parametrize("op", list(head_checks.OPS))
@pytest.mark.parametrize("kernels", ["cpp", "torch"])
def test_check(kernels: str, op: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    elif implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    head_checks.CHECKS[check](head_checks.OPS[op])


@pytest.mark.parametrize("op", list(head_checks.OPS))
@pytest.mark.parametrize("kernels", ["cpp", "torch"])
def test_bf16(kernels: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    elif implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    head_checks.check_half_precision(head_checks.OPS[op], torch.bfloat16)
