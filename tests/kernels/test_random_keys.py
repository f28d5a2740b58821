"""Keyed uniforms: known answers, identical bits everywhere, an open interval."""

from __future__ import annotations

import pytest
import torch
from metareward_kernels import implementation, keyed_uniforms, reference, request_key
from metareward_kernels.random_keys import keyed_uniforms_torch, philox4x32_10
from scipy import stats

from tests.on_gpu import on_gpu

COMPILED = implementation("keyed_uniforms") == "cpp"
ONES = 0xFFFFFFFF
# The vectors published with Random123 for Philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert reference.philox4x32_10(counter, key) == answer  # type: ignore[arg-type]
    words = philox4x32_10(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == answer


def test_known_answer_through_the_public_op() -> None:
    # key 0, position 0: words 6627e8d5 and e169c58d, 53 bits of them
    expected = ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53
    zero = torch.zeros(1, dtype=torch.int64)
    assert keyed_uniforms(zero, zero).item() == expected
    assert keyed_uniforms_torch(zero, zero).item() == expected


def test_identical_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**63), 2**63 - 1, (2000,), generator=generator)
    positions = torch.arange(2000)
    positions[:4] = torch.tensor([-1, 2**63 - 1, -(2**63), 2**40])
    found = keyed_uniforms(keys, positions)
    assert torch.equal(found, keyed_uniforms_torch(keys, positions))
    if torch.cuda.is_available():
        assert torch.equal(found, on_gpu(keyed_uniforms)(keys, positions))
    exact = [reference.keyed_uniform(k, p) for k, p in zip(keys.tolist(), positions.tolist(), strict=True)]
    assert found.tolist() == exact


def test_uniform_inside_the_open_interval() -> None:
    keys = torch.tensor([request_key(7, f"request-{i}") for i in range(200)]).repeat_interleave(500)
    uniforms = keyed_uniforms(keys, torch.arange(500).repeat(200))
    assert uniforms.min() > 0.0
    assert uniforms.max() < 1.0
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 1e-4
    columns = uniforms.view(200, 500)
    assert (
        abs(float(torch.corrcoef(torch.stack([columns[:, :-1].flatten(), columns[:, 1:].flatten()]))[0, 1]))
        < 0.02
    )


def test_request_keys() -> None:
    assert request_key(0, "a") == request_key(0, "a")
    keys = {request_key(seed, f"p{i}") for seed in range(20) for i in range(200)}
    assert len(keys) == 4000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert min(keys) < 0 < max(keys)
    assert request_key(1, "1\n2") != request_key(11, "2")


def test_bad_arguments() -> None:
    keys = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        keyed_uniforms(keys.int(), keys)
    with pytest.raises(ValueError, match=r"\[S\]"):
        keyed_uniforms(keys, keys[:1])


def test_opcheck() -> None:
    for keys in (torch.arange(6), torch.arange(12)[::2], torch.arange(0)):
        torch.library.opcheck(torch.ops.metareward.keyed_uniforms.default, (keys, keys.clone()))
        if COMPILED:
            torch.library.opcheck(
                torch.ops.metareward.keyed_uniforms_cpp.default, (keys.contiguous(), keys.clone())
            )
