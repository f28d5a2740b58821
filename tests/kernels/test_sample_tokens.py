"""sample_tokens: the token of the reference, for both implementations, and the distribution itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metareward_kernels import implementation, reference, sample_tokens
from metareward_kernels.sample import sample_tokens_torch
from scipy import stats
from torch import Tensor

COMPILED = implementation("sample_tokens") == "cpp"


def torch_path(logits: Tensor, uniforms: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sample_tokens_torch(logits, uniforms, **settings)


def chosen_path(logits: Tensor, uniforms: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sample_tokens(logits, uniforms, **settings, truncated_logprobs=True)


PATHS = [torch_path, chosen_path]
SETTINGS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.8, "top_k": 0, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 500, "top_p": 0.9},
    {"temperature": 4.0, "top_k": 0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 10**9, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    {"temperature": 1e-4, "top_k": 0, "top_p": 0.5},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.013},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.97, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 7, "top_p": 1.0, "min_p": 1.0},
    {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.5},
    {"temperature": 1e-40, "top_k": 0, "top_p": 1.0},
    {"temperature": 1e40, "top_k": 0, "top_p": 0.9},
]


def assert_same(logits: Tensor, uniforms: Tensor, **chosen: Any) -> None:
    expected = reference.sample_tokens(logits, uniforms, **chosen)
    for path in PATHS:
        tokens, logprobs, truncated = path(logits, uniforms, **chosen)
        assert tokens.tolist() == expected[0].tolist()
        torch.testing.assert_close(logprobs, expected[1], rtol=2e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(truncated, expected[2], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("chosen", SETTINGS)
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 49152])
def test_draws_the_token_of_the_reference(chosen: dict[str, Any], vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(18, vocabulary, generator=generator) * 3
    logits[3:6] *= 5  # peaked
    logits[6:9] = logits[6:9].round()  # many ties
    logits[9] = 0.0  # flat
    logits[10] = -100.0
    logits[11, vocabulary // 2 :] = -math.inf
    logits[11, 0] = 1.0
    logits[12] = torch.where(logits[12] > 0, 0.0, -0.0)  # equal zeros of both signs
    logits[13] = logits[13] * 1e-3 - 1e4
    uniforms = torch.rand(18, generator=generator, dtype=torch.float64)
    uniforms[14], uniforms[15] = 2.0**-54, 1 - 2.0**-53
    assert_same(logits, uniforms, **chosen)


@settings(max_examples=150, deadline=None)
@given(
    row=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-40, 40, width=32), st.just(-math.inf)),
        min_size=1,
        max_size=80,
    ),
    uniform=st.integers(1, 2**30 - 1).map(lambda k: k / 2**30),
    temperature=st.sampled_from([0.0, 0.31, 1.0, 2.7]),
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([1.0, 0.9131, 0.5003, 0.1007, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.0713, 0.6031, 1.0]),
)
def test_any_row(
    row: list[float], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert_same(torch.tensor([row]), uniforms, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("chosen", SETTINGS)
@pytest.mark.parametrize("vocabulary", [1, 33, 4097])
def test_bf16_draws_what_the_same_values_in_fp32_draw(chosen: dict[str, Any], vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(40, vocabulary, generator=generator) * 4).bfloat16()
    logits[3] = logits[3].round()
    logits[4, vocabulary // 2] = -math.inf
    logits[5, vocabulary // 2] = math.nan
    logits[6] = -math.inf
    logits[7, 0] = math.inf
    uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
    assert_same(logits, uniforms, **chosen)
    for path in PATHS:
        for narrow, wide in zip(
            path(logits, uniforms, **chosen), path(logits.float(), uniforms, **chosen), strict=True
        ):
            assert torch.equal(narrow.nan_to_num(7.0), wide.nan_to_num(7.0))


@pytest.mark.parametrize("chosen", SETTINGS)
def test_rows_without_a_distribution(chosen: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 100)
    logits[0, 99] = math.nan
    logits[1] = -math.inf
    logits[2, 40] = math.inf
    logits[3, 0] = math.nan
    logits[3, 50] = math.inf
    for path in PATHS:
        uniforms = torch.full((5,), 0.5, dtype=torch.float64)
        tokens, logprobs, truncated = path(logits, uniforms, **chosen)
        assert tokens[:4].tolist() == [-1] * 4
        assert logprobs[:4].isnan().all()
        assert truncated[:4].isnan().all()
        assert tokens[4] >= 0
        if chosen["temperature"] in (0.0, 1.0):  # elsewhere the temperature may make a rare token rarer
            assert logprobs[4] <= truncated[4] + 1e-6
        assert max(logprobs[4], truncated[4]) <= 0


@pytest.mark.parametrize("path", PATHS)
def test_ties_go_to_the_lower_token(path: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0, 1.0]]).repeat(200, 1)
    uniforms = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    drawn = {
        "top_k": path(logits, uniforms, temperature=1.0, top_k=2, top_p=1.0)[0],
        "top_p": path(logits, uniforms, temperature=1.0, top_k=0, top_p=0.3)[0],
        "greedy": path(logits, uniforms, temperature=0.0, top_k=0, top_p=1.0)[0],
    }
    assert set(drawn["top_k"].tolist()) == {1, 2}
    assert set(drawn["top_p"].tolist()) == {1, 2}
    assert set(drawn["greedy"].tolist()) == {1}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("min_p", [0.0, 0.11])
def test_200_000_draws_follow_the_distribution(path: Any, min_p: float) -> None:
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(30, generator=generator) * 1.5
    draws = 200_000
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64)
    chosen = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": min_p}
    tokens, logprobs, truncated = path(row.expand(draws, 30), uniforms, **chosen)
    kept = reference.kept_tokens(row, **chosen)  # type: ignore[arg-type]
    assert 3 < kept.numel() < 20
    assert set(tokens.unique().tolist()) == set(kept.tolist())
    expected = (row[kept].double() / 0.8).softmax(dim=0)
    counts = torch.bincount(tokens, minlength=30)[kept]
    assert stats.chisquare(counts.numpy(), (expected * draws).numpy()).pvalue > 1e-4
    torch.testing.assert_close(logprobs, row.log_softmax(dim=0)[tokens])
    by_token = torch.full((30,), math.nan)
    by_token[kept] = expected.log().float()
    torch.testing.assert_close(truncated, by_token[tokens])


def test_draws_lie_in_the_top_p_set() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(40, 5000, generator=generator) * 2
    logits[::2] = logits[::2].bfloat16().float()  # many ties
    for path in PATHS:
        for top_p, min_p in [(0.9, 0.0), (0.5, 0.0), (0.99, 0.02), (1.0, 0.1)]:
            chosen: dict[str, Any] = {"temperature": 0.9, "top_k": 0, "top_p": top_p, "min_p": min_p}
            # The ends of each row's interval and its middle.
            for uniform in (2.0**-53, 0.5, 1 - 2.0**-53):
                tokens, _, _ = path(logits, torch.full((40,), uniform, dtype=torch.float64), **chosen)
                for row, token in zip(logits, tokens.tolist(), strict=True):
                    assert token in reference.kept_tokens(row, **chosen).tolist()


@pytest.mark.parametrize("path", PATHS)
def test_the_deep_tail_is_drawn(path: Any) -> None:
    # Each of 4096 tail tokens has 2e-9 of the mass: an fp32 sum would lose them after the heavy first token.
    row = torch.full((4097,), math.log(2e-9))
    row[0] = 0.0
    tail = 4096 * 2e-9
    inside = torch.linspace(0.0, 1.0, 402, dtype=torch.float64)[1:-1]
    tokens, *_ = path(row.expand(400, 4097), 1.0 - tail * inside, temperature=1.0, top_k=0, top_p=1.0)
    wanted = 4096 - (4096 * inside)
    assert tokens.min() >= 1
    assert (tokens - wanted).abs().max() < 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_k", [0, 900])  # the whole row by blocks; candidates only
@pytest.mark.parametrize("heavy", [0, 897])
def test_tokens_of_the_deep_tail_come_as_often_as_they_should(path: Any, top_k: int, heavy: int) -> None:
    # Probabilities of 2^-26 to 2^-20 about one heavy token, probed by a fine comb of uniforms over the tail: each
    # token must take its own share of the unit interval, to the spacing of the comb.
    generator = torch.Generator().manual_seed(heavy)
    row = torch.full((1200,), -math.inf)
    row[::6] = -math.log(2.0) * (20 + 6 * torch.rand(200, generator=generator))
    row[heavy] = 0.0
    shares = row.double().softmax(dim=0)
    counts = torch.zeros(1200, dtype=torch.float64)
    before, after = float(shares[:heavy].sum()), float(shares[heavy + 1 :].sum())
    spacing = 2.0**-29
    for low, high in [(0.0, before), (1 - after, 1.0)]:
        if high == low:
            continue
        comb = torch.arange(low + spacing / 2, high, spacing, dtype=torch.float64)
        for uniforms in comb.split(2000):
            rows = row.expand(len(uniforms), 1200)
            tokens, *_ = path(rows, uniforms, temperature=1.0, top_k=top_k, top_p=1.0)
            counts += torch.bincount(tokens, minlength=1200) * spacing
    counts[heavy] = shares[heavy]
    assert shares[::6].min() < 2.0**-25
    assert (counts - shares).abs().max() < 1.5 * spacing


@pytest.mark.skipif(not COMPILED, reason="the compiled library is not built")
def test_strided_rows_and_threads_change_nothing() -> None:
    logits = torch.randn(9, 3000)
    uniforms = torch.rand(9, dtype=torch.float64)
    chosen = {"temperature": 0.9, "top_k": 0, "top_p": 0.9}
    expected = sample_tokens(logits, uniforms, **chosen)  # type: ignore[arg-type]
    spread = torch.zeros(9, 6000)
    spread[:, ::2] = logits
    padded = torch.zeros(9, 3100)
    padded[:, :3000] = logits
    threads = torch.get_num_threads()
    try:
        for count, view in [(1, logits), (3, logits), (2, spread[:, ::2]), (2, padded[:, :3000])]:
            torch.set_num_threads(count)
            found = sample_tokens(view, uniforms, **chosen)  # type: ignore[arg-type]
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments() -> None:
    logits, uniforms = torch.zeros(2, 3), torch.full((2,), 0.5, dtype=torch.float64)
    good: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with pytest.raises(TypeError, match="float64 uniforms"):
        sample_tokens(logits, uniforms.float(), **good)
    with pytest.raises(TypeError, match="float32 or bfloat16 logits"):
        sample_tokens(logits.half(), uniforms, **good)
    with pytest.raises(ValueError, match=r"uniforms \[S\]"):
        sample_tokens(logits, uniforms[:1], **good)
    for name, value in [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
    ]:
        with pytest.raises(ValueError, match=name):
            sample_tokens(logits, uniforms, **{**good, name: value})


def test_opcheck() -> None:
    for logits in (
        torch.randn(3, 50),
        torch.randn(3, 50).bfloat16(),
        torch.randn(3, 100)[:, ::2],
        torch.randn(0, 50),
    ):
        uniforms = torch.rand(logits.shape[0], dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.metareward.sample_tokens.default, (logits, uniforms, 0.8, 5, 0.9, 0.1)
        )
        if COMPILED:
            compiled = (logits.contiguous(), uniforms, 0.8, 5, 0.9, 0.1)
            torch.library.opcheck(torch.ops.metareward.sample_tokens_cpp.default, compiled)
