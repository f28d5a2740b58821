"""pack_linear: the product of F.linear, for every number of rows, from one pack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from metareward_kernels import implementation, pack_gated_linear, pack_linear, packed_linear
from metareward_kernels.packed_linear import why_not_packed
from torch import Tensor

ONEDNN = why_not_packed(torch.ones(1, 1, dtype=torch.bfloat16)) is None
TILES = implementation("linear_fp32") == "cpp"
ROWS = [1, 2, 3, 5, 16, 17, 31, 64, 100, 264, 448, 511, 600]


@pytest.fixture(params=["cpp", "onednn"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of packing that this machine has."""
    if not (TILES if request.param == "cpp" else ONEDNN):
        pytest.skip(f"no {request.param} product of packed bf16 weights here")
    monkeypatch.setattr(
        packed_linear, "has_tiles", lambda weight: weight.numel() > 0 and request.param == "cpp"
    )
    return str(request.param)


def assert_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within one rounding to bf16 of the fp64 product, and fp32's error in summing its terms."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().T
    assert found.shape == exact.shape
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6 * terms + 1e-6).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (1, 7), (33, 576), (576, 1536)])
def test_one_pack_serves_every_number_of_rows(chosen: str, outputs: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(outputs)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    added = torch.randn(outputs).bfloat16() if bias else None
    linear = pack_linear(weight, added)
    assert linear.implementation == chosen
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        assert_product(linear(x), x, weight, added)


def test_inputs_of_other_shapes_and_strides(chosen: str) -> None:
    weight = torch.randn(24, 32).bfloat16()
    linear = pack_linear(weight.t().contiguous().t())
    assert linear.implementation == chosen
    x = torch.randn(6, 64).bfloat16()
    for view in (x[:, ::2], x[:, 16:48], x[::2, :32], x[0, :32], x.view(2, 3, 64)[..., :32], x[:0, :32]):
        assert_product(linear(view), view, weight, None)


def test_a_nan_stays_in_its_row_and_the_pack_is_a_copy(chosen: str) -> None:
    weight = torch.randn(40, 32).bfloat16()
    linear, x = pack_linear(weight), torch.randn(9, 32).bfloat16()
    x[4, 3] = float("nan")
    found = linear(x)
    assert found[4].isnan().all()
    assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert linear.implementation == chosen
    weight.zero_()
    assert torch.equal(linear(x).nan_to_num(), found.nan_to_num())


def test_what_cannot_be_packed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    linear = pack_linear(weight)
    assert linear.implementation == "torch"
    assert "bfloat16" in str(linear.reason)
    assert torch.equal(linear(x), F.linear(x, weight))
    monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    forced = pack_linear(weight.bfloat16())
    assert forced.implementation == "torch"
    assert forced.reason == "METAREWARD_KERNELS=torch"
    assert torch.equal(forced(x.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))


def test_bad_arguments() -> None:
    weight = torch.ones(8, 16).bfloat16()
    with pytest.raises(ValueError, match=r"bias \[N\]"):
        pack_linear(weight, torch.ones(7).bfloat16())
    with pytest.raises(TypeError, match="dtype"):
        pack_linear(weight, torch.ones(8))
    with pytest.raises(ValueError, match="does not fit"):
        pack_linear(weight)(torch.ones(2, 8).bfloat16())
    with pytest.raises(TypeError, match="float32"):
        pack_linear(weight)(torch.ones(2, 16))


def assert_gated(found: Tensor, x: Tensor, gate_up: Tensor, bias: Tensor | None, *, fused: bool) -> None:
    """Near the fp64 result: rounded once where it is fused, after the products and after the activation else."""
    both = F.linear(x.double(), gate_up.double(), None if bias is None else bias.double())
    gate, up = both.chunk(2, dim=-1)
    exact = F.silu(gate) * up
    # A rounded gate moves silu by at most 1.1 times as much, a rounded up scales with the result.
    slack = 0.0 if fused else 2.0**-8 * (1.1 * gate.abs() * up.abs() + exact.abs())
    assert found.shape == exact.shape
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + slack + 2e-5).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "inputs"), [(48, 64), (1, 7), (33, 576), (200, 96)])
def test_gated_product(chosen: str, size: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(size)
    gate_up = (torch.randn(2 * size, inputs) * 3.0 * inputs**-0.5).bfloat16()
    added = torch.randn(2 * size).bfloat16() if bias else None
    linear = pack_gated_linear(gate_up, added)
    assert linear.implementation == chosen
    assert linear.fused == (chosen == "cpp" and not bias)
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        assert_gated(linear(x), x, gate_up, added, fused=linear.fused)


def test_gated_product_of_extreme_gates_and_other_strides(chosen: str) -> None:
    gate_up = torch.cat([torch.eye(16), torch.ones(16, 16)]).bfloat16()
    linear = pack_gated_linear(gate_up)
    x = torch.zeros(4, 16).bfloat16()
    x[0, 0], x[1, 1], x[2, 2] = 1e4, -1e4, float("nan")
    found = linear(x)
    assert float(found[0, 0]) == pytest.approx(1e8, rel=0.01)
    assert float(found[1, 1]) == 0.0
    assert found[2].isnan().all()
    assert not found[[0, 1, 3]].isnan().any()
    wide = torch.randn(6, 32).bfloat16()
    for view in (wide[:, ::2], wide[::2, :16], wide[0, :16], wide.view(2, 3, 32)[..., :16], wide[:0, :16]):
        assert_gated(linear(view), view, gate_up, None, fused=linear.fused)


def test_gated_product_says_what_does_not_fit(chosen: str) -> None:
    linear = pack_gated_linear(torch.randn(8, 16).bfloat16())
    assert linear.implementation == chosen
    with pytest.raises(ValueError, match="does not fit"):
        linear(torch.zeros(3, 15).bfloat16())
    with pytest.raises(TypeError, match="x is"):
        linear(torch.zeros(3, 16))
    with pytest.raises(ValueError, match="gate_up"):
        pack_gated_linear(torch.zeros(7, 16).bfloat16())
    with pytest.raises(TypeError, match="differ in dtype"):
        pack_gated_linear(torch.zeros(8, 16).bfloat16(), torch.zeros(8))
