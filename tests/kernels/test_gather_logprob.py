"""gather_logprob: where the gradient lies, what is refused, leading dimensions. Values are in head_checks.py."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from metareward_kernels import gather_logprob, implementation
from torch import Tensor

# The package gives the function this name.
module = importlib.import_module("metareward_kernels.gather_logprob")


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpp" and implementation("head_rows") != "cpp":
        pytest.skip("the compiled library is not built")
    if request.param == "torch":
        monkeypatch.setenv("METAREWARD_KERNELS", "torch")
    return request.param


def make(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 3
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=generator)


def plain(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits / temperature).log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)


def test_the_gradient_lies_where_the_logits_lay() -> None:
    raw, targets = make(9, 40)
    raw.requires_grad_()
    logits = raw * 2.0
    passed: list[Tensor] = []
    logits.register_hook(lambda grad: passed.append(grad))
    gather_logprob(logits, targets).sum().backward()
    assert passed[0].data_ptr() == logits.data_ptr()
    assert torch.equal(logits.detach() * 2.0, raw.grad)  # type: ignore[arg-type]
    expected = torch.autograd.grad(plain(raw * 2.0, targets).sum(), raw)[0]
    torch.testing.assert_close(raw.grad, expected, rtol=2e-5, atol=2e-6)


def test_kept_logits_are_untouched_and_allow_a_second_backward() -> None:
    raw, targets = make(9, 40)
    raw.requires_grad_()
    logits = raw * 2.0
    before = logits.detach().clone()
    logprobs = gather_logprob(logits, targets, keep_logits=True)
    first = torch.autograd.grad(logprobs.sum(), raw, retain_graph=True)[0]
    second = torch.autograd.grad(logprobs.sum(), raw)[0]
    assert torch.equal(first, second)
    assert torch.equal(logits.detach(), before)


def test_a_second_backward_is_refused() -> None:
    raw, targets = make(3, 8)
    logprobs = gather_logprob(raw.requires_grad_() * 1, targets)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran backward before.*keep_logits=True"):
        logprobs.sum().backward()


def test_a_second_user_of_the_logits_is_told() -> None:
    raw, targets = make(3, 8)
    logits = raw.requires_grad_() * 1
    both = gather_logprob(logits, targets) + gather_logprob(logits, targets.flip(0))
    with pytest.raises(RuntimeError, match=r"the logits changed between .*keep_logits=True"):
        both.sum().backward()
    logits = raw * 1
    square = logits.square()  # saves the logits, and runs backward after gather_logprob, which is younger
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (gather_logprob(logits, targets) + square.sum(dim=1)).sum().backward()
    logits = raw * 1
    logprobs = gather_logprob(logits, targets)
    with torch.no_grad():
        logits.add_(1.0)
    with pytest.raises(RuntimeError, match="the logits changed between"):
        logprobs.sum().backward()


def test_logits_may_feed_ops_that_do_not_read_them_again() -> None:
    raw, targets = make(5, 12)
    raw.requires_grad_()
    logits = raw * 0.5
    (gather_logprob(logits, targets).sum() + 3.0 * logits.sum()).backward()
    expected = torch.autograd.grad(plain(raw * 0.5, targets).sum() + 1.5 * raw.sum(), raw)[0]
    torch.testing.assert_close(raw.grad, expected, rtol=2e-5, atol=2e-6)


def test_what_has_no_room_for_its_gradient_is_refused() -> None:
    raw, targets = make(4, 8)
    leaf = raw.requires_grad_()
    for logits in (leaf, leaf.view(2, 2, 8).view(4, 8), leaf[:, :6]):
        with pytest.raises(ValueError, match=r"a leaf, or a view of one.*keep_logits=True"):
            gather_logprob(logits, targets % 6)
    for logits in ((leaf * 1)[:1].expand(4, 8), (leaf * 1).flatten().as_strided((4, 8), (4, 1))):
        with pytest.raises(ValueError, match="share memory among themselves"):
            gather_logprob(logits, targets)
        kept = gather_logprob(logits, targets, keep_logits=True)
        torch.testing.assert_close(kept, plain(logits, targets), rtol=2e-5, atol=2e-6)
    with torch.no_grad():  # nothing is overwritten
        torch.testing.assert_close(gather_logprob(leaf, targets), plain(leaf, targets), rtol=2e-5, atol=2e-6)


LAYOUTS = {
    "contiguous": lambda x: x * 1,
    "columns": lambda x: torch.cat([x, x], dim=-1)[..., ::2][..., : x.shape[-1]],
    "padded": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "transposed": lambda x: (x * 1).transpose(0, 1).contiguous().transpose(0, 1),
    "last first": lambda x: (x * 1).movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_any_strides_and_leading_dimensions_in_place(
    layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    raw, targets = make(3, 2, 4, 20)
    raw.requires_grad_()
    seed = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    logits = LAYOUTS[layout](raw)
    logprobs = gather_logprob(logits, targets, temperature=0.8)
    expected = plain(LAYOUTS[layout](raw), targets, 0.8)
    torch.testing.assert_close(logprobs, expected, rtol=2e-5, atol=2e-6)
    wanted = torch.autograd.grad(expected, raw, seed)[0]
    passed: list[Tensor] = []
    logits.register_hook(lambda grad: passed.append(grad))
    found = torch.autograd.grad(logprobs, raw, seed)[0]
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
    assert passed[0].data_ptr() == logits.data_ptr()
    assert passed[0].stride() == logits.stride()


def test_one_row_without_leading_dimensions() -> None:
    raw, _ = make(1, 9)
    row = raw[0].clone().requires_grad_()
    found = gather_logprob(row * 1, torch.tensor(4))
    assert found.shape == ()
    found.backward()
    expected = torch.autograd.grad(row.log_softmax(0)[4], row)[0]
    torch.testing.assert_close(row.grad, expected, rtol=2e-5, atol=2e-6)


def test_gradcheck_in_fp64() -> None:
    raw, targets = make(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: gather_logprob(x, targets, temperature=0.8, keep_logits=True), (raw.requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_place_and_apart_are_equal(dtype: torch.dtype) -> None:
    raw, targets = make(33, 70, dtype=dtype)
    raw.requires_grad_()
    seed = torch.randn(33, generator=torch.Generator().manual_seed(0))
    gradients = []
    for keep in (True, False):
        logprobs = gather_logprob(raw * 1, targets, temperature=0.8, keep_logits=keep)
        assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        gradients += torch.autograd.grad(logprobs, raw, seed.to(logprobs.dtype))
    assert torch.equal(*gradients)


def test_masked_vocabulary() -> None:
    raw, targets = make(4, 8)
    targets[:] = torch.tensor([0, 1, 2, 7])
    mask = torch.zeros(8)
    mask[5:7] = -torch.inf
    leaf = raw.clone().requires_grad_()
    found = gather_logprob(leaf + mask, targets)
    found.sum().backward()
    expected = torch.autograd.grad(plain(raw.requires_grad_() + mask, targets).sum(), raw)[0]
    torch.testing.assert_close(leaf.grad, expected, rtol=2e-5, atol=2e-6)
    assert not leaf.grad[:, 5:7].any()  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_beyond_the_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No op of the pass makes more than a block of rows in fp32, forward or backward."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 16)
    raw, targets = make(512, 1000, dtype=dtype)
    logits = raw.requires_grad_() * 1
    with torch.profiler.profile(profile_memory=True) as profile:
        logprobs = gather_logprob(logits, targets)
        (logits_grad,) = torch.autograd.grad(logprobs.sum(), logits)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 << 16
    assert logits_grad.data_ptr() == logits.data_ptr()


def test_bad_arguments() -> None:
    logits, targets = make(3, 8)
    bad: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "float32, bfloat16, float16 or float64", (logits.long(), targets), {}),
        (TypeError, r"int64, got torch.int32; pass targets.long\(\)", (logits, targets.int()), {}),
        (ValueError, "one target a row", (logits, targets[:2]), {}),
        (ValueError, "one target a row", (logits[:, :0], targets), {}),
        (ValueError, "move one of them", (logits, targets.to("meta")), {}),
        (ValueError, "temperature must be positive", (logits, targets), {"temperature": 0.0}),
        (ValueError, "temperature must be positive", (logits, targets), {"temperature": float("nan")}),
        (
            IndexError,
            r"span \[1, 8\], outside the vocabulary's \[0, 7\]",
            (logits, torch.tensor([1, 8, 2])),
            {},
        ),
        (IndexError, r"span \[-1, 2\]", (logits, torch.tensor([1, -1, 2])), {}),
    ]
    for kind, message, arguments, named in bad:
        with pytest.raises(kind, match=message):
            gather_logprob(*arguments, **named)
