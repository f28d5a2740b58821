"""The decoder computes what transformers computes, alone and packed, in training and in the log-prob head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder, RMSNorm
from metareward.model.hf_files import load_decoder
from metareward.model.packed_attention import packed_attention

Tiny = Callable[[str], tuple[Any, Path]]
FAMILIES = [
    "llama",
    "llama-tied-gqa",
    "llama-llama3-rope",
    "llama-linear-rope",
    "llama-bias-head-dim",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3-tied-bias",
]


def run_alone(decoder: Decoder, ids: Tensor) -> Tensor:
    hidden = decoder(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
    return decoder.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(tiny: Tiny, family: str) -> None:
    reference, directory = tiny(family)
    decoder = load_decoder(directory, dtype=torch.float32)
    ids = torch.randint(0, 300, (100,))
    expected = reference(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(run_alone(decoder, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama-tied-gqa", "llama-llama3-rope", "qwen3"])
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_transformers(tiny: Tiny, family: str) -> None:
    reference, directory = tiny(family)
    ids = torch.randint(0, 300, (200,))
    exact = reference(ids[None]).logits[0]
    theirs = (reference.bfloat16()(ids[None]).logits[0].float() - exact).abs().mean()
    ours = (run_alone(load_decoder(directory, dtype=torch.bfloat16), ids).float() - exact).abs().mean()
    assert ours < 1.25 * theirs


@pytest.mark.parametrize("family", ["llama-tied-gqa", "qwen2", "qwen3"])
@pytest.mark.parametrize("as_tensor", [False, True])
@torch.no_grad()
def test_packed_equals_each_alone(tiny: Tiny, family: str, as_tensor: bool) -> None:
    decoder = load_decoder(tiny(family)[1], dtype=torch.float32)
    sequences = [torch.randint(0, 300, (n,)) for n in (7, 1, 33, 12)]
    bounds = [0, 7, 8, 41, 53]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    attend = packed_attention(torch.tensor(bounds) if as_tensor else bounds)
    packed = decoder.logits(decoder(torch.cat(sequences), positions, attend))
    alone = torch.cat([run_alone(decoder, s) for s in sequences])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bounds", [[0], [1, 5], [0, 5, 5], [0, 5, 3], [0, 4]])
def test_wrong_boundaries_are_refused(bounds: list[int]) -> None:
    query = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_attention(bounds)(0, query, query, query)


@torch.no_grad()
def test_rows_pick_positions(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("qwen2")[1], dtype=torch.float32)
    ids, positions = torch.randint(0, 300, (20,)), torch.arange(20)
    everything = decoder(ids, positions, packed_attention([0, 20]))
    rows = torch.tensor([3, 19, 0])
    torch.testing.assert_close(
        decoder(ids, positions, packed_attention([0, 20]), rows=rows), everything[rows]
    )
    mask = torch.zeros(20, dtype=torch.bool).index_fill_(0, rows, True)
    torch.testing.assert_close(
        decoder(ids, positions, packed_attention([0, 20]), rows=mask), everything[rows.sort().values]
    )


@pytest.mark.parametrize("family", ["llama", "llama-tied-gqa"])
def test_targets_give_logprobs_and_exact_gradients(tiny: Tiny, family: str) -> None:
    pytest.importorskip("metareward_kernels", reason="the kernels are not installed")
    decoder = load_decoder(tiny(family)[1], dtype=torch.float32)
    ids, positions, rows = torch.randint(0, 300, (30,)), torch.arange(30), torch.arange(10, 29)
    attend = packed_attention([0, 30])
    weights = torch.randn(len(rows))

    logprobs = decoder(ids, positions, attend, rows=rows, targets=ids[rows + 1])
    assert logprobs.dtype == torch.float32
    assert (logprobs <= 0).all()
    (logprobs * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    assert ours.keys() == dict(decoder.named_parameters()).keys()

    decoder.zero_grad()
    logits = decoder.logits(decoder(ids, positions, attend, rows=rows))
    expected = logits.log_softmax(-1).gather(-1, ids[rows + 1][:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    (expected * weights).sum().backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_gradients_equal_transformers(tiny: Tiny) -> None:
    reference, directory = tiny("qwen3-tied-bias")
    decoder = load_decoder(directory, dtype=torch.float32)
    ids = torch.randint(0, 300, (40,))
    direction = torch.randn(40, 300)
    (reference(ids[None]).logits[0] * direction).mean().backward()
    (run_alone(decoder, ids) * direction).mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_activation_checkpointing_changes_no_gradient(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[1], dtype=torch.float32)
    ids = torch.randint(0, 300, (25,))
    calls: list[int] = []
    handle = decoder.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute in ("none", "full", "selective"):
        decoder.activation_checkpointing = recompute
        decoder.zero_grad()
        run_alone(decoder, ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    handle.remove()
    assert len(calls) == 1 + 2 + 2
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, gradient) for gradient in recomputed)


def test_meta_start_keeps_the_rotary_frequencies(tiny: Tiny) -> None:
    config = load_decoder(tiny("llama-llama3-rope")[1], dtype=torch.float32).config
    with torch.device("meta"):
        started_on_meta = Decoder(config)
    assert all(p.is_meta for p in started_on_meta.parameters())
    assert not list(started_on_meta.buffers())
    (frequencies,) = started_on_meta.to(torch.bfloat16)._frequencies.values()
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, Decoder(config)._frequencies[torch.device("cpu")])


def test_inference_mode_first_then_training(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[1], dtype=torch.float32)
    ids = torch.randint(0, 300, (5,))
    with torch.inference_mode():
        run_alone(decoder, ids)
    run_alone(decoder, ids).sum().backward()


def test_rms_norm_reduces_in_fp32() -> None:
    # 2,000 squares summed in bf16 would stop growing at 256.
    norm = RMSNorm(2000, 1e-6).bfloat16()
    out = norm(torch.full((1, 2000), 3.0, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.ones(1, 2000), atol=0.01, rtol=0)


def test_tied_models_have_no_head_parameter(tiny: Tiny) -> None:
    tied = load_decoder(tiny("qwen2-tied")[1], dtype=torch.float32)
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert [block.self_attn.layer for block in tied.blocks] == [0, 1, 2]


@torch.no_grad()
def test_real_model_equals_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "The capital of France is Paris.\n\n1. It lies on the Seine, and 2,100,000 people live there."
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"])
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    decoder = load_decoder(smollm2, dtype=torch.float32)
    expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(run_alone(decoder, ids), expected, atol=5e-4, rtol=0)
    assert run_alone(decoder, ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None]).mean() > -3.5


def test_max_context_is_the_smaller_of_window_and_positions(tiny: Tiny) -> None:
    def config(family: str) -> ModelConfig:
        return load_decoder(tiny(family)[1], dtype=torch.float32).config

    assert config("mistral-window").max_context == 128
    assert config("mistral").max_context == 256
