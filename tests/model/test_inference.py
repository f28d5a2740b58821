"""The fused forward of sampling computes what the decoder's plain forward computes, over pages and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from metareward_kernels import Segments, implementation
from torch import Tensor

from metareward.model.decoder import Decoder
from metareward.model.hf_files import load_decoder
from metareward.model.inference import InferenceDecoder
from metareward.model.packed_attention import packed_attention

Tiny = Callable[[str], tuple[Any, Path]]
FAMILIES = ["llama", "llama-tied-gqa", "llama-llama3-rope", "llama-linear-rope", "llama-bias-head-dim"]
FAMILIES += ["mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied-bias"]
PAGE = 8


def plain(decoder: Decoder, ids: Tensor) -> Tensor:
    hidden = decoder(ids, torch.arange(len(ids)), packed_attention([0, len(ids)]))
    return decoder.logits(hidden)


def chunk_segments(pages: Tensor, start: int, end: int) -> Segments:
    """Rows start .. end of one sequence, each of which sees the tokens up to itself."""
    one = torch.tensor([0], dtype=torch.int32)
    rows = torch.arange(end - start, dtype=torch.int32)
    return Segments(
        page_ids=pages,
        page_starts=one,
        lengths=torch.tensor([end], dtype=torch.int32),
        rows=rows,
        row_starts=torch.tensor([0, end - start], dtype=torch.int32),
        limits=rows + start + 1,
    )


def by_chunks(model: InferenceDecoder, ids: Tensor, bounds: list[int]) -> Tensor:
    """Logits of all tokens, computed chunk by chunk over scattered pages that begin as NaN."""
    config, count = model.config, -(-len(ids) // PAGE)
    generator = torch.Generator().manual_seed(1)
    pages = torch.randperm(count + 3, generator=generator)[:count].to(torch.int32)
    shape = (count + 3, PAGE, config.num_kv_heads, config.head_dim)
    dtype = next(model.decoder.parameters()).dtype
    keys = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
    values = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
    logits = []
    for start, end in pairwise(bounds):
        at = torch.arange(start, end)
        places = pages[at // PAGE].long() * PAGE + at % PAGE
        segments = chunk_segments(pages, start, end)
        rows = torch.arange(end - start)
        logits.append(model.forward(ids[start:end], at, places, segments, keys, values, rows).clone())
    return torch.cat(logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_in_chunks_equals_the_plain_forward(tiny: Tiny, family: str) -> None:
    decoder = load_decoder(tiny(family)[1], dtype=torch.float32)
    ids = torch.randint(0, 300, (61,))
    expected = plain(decoder, ids)
    model = InferenceDecoder(decoder)
    model.prepare()
    for bounds in ([0, 61], [0, 1, 2, 3, 30, 61], [0, 8, 16, 17, 60, 61]):
        torch.testing.assert_close(by_chunks(model, ids, bounds), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_bf16_is_as_close_to_fp32_as_the_plain_forward(tiny: Tiny) -> None:
    directory = tiny("llama-tied-gqa")[1]
    ids = torch.randint(0, 300, (200,))
    exact = plain(load_decoder(directory, dtype=torch.float32), ids)
    decoder = load_decoder(directory, dtype=torch.bfloat16)
    theirs = (plain(decoder, ids).float() - exact).abs().mean()
    model = InferenceDecoder(decoder)
    model.prepare()
    assert (by_chunks(model, ids, [0, 100, 200]).float() - exact).abs().mean() < 1.25 * theirs


def test_weights_are_held_once_and_changes_in_place_are_followed(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("qwen2")[1], dtype=torch.float32)
    names = [name for name, _ in decoder.named_parameters()]
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    model = InferenceDecoder(decoder)
    key = model.prepare()
    assert model.prepare() == key
    assert [name for name, _ in decoder.named_parameters()] == names
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    attention = decoder.model.layers[0].self_attn  # type: ignore[union-attr]
    held = {
        projection.weight.untyped_storage().data_ptr() for projection in (attention.q_proj, attention.v_proj)
    }
    assert len(held) == 1
    ids = torch.randint(0, 300, (20,))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
        assert model.prepare() != key
        expected = plain(decoder, ids)
        torch.testing.assert_close(by_chunks(model, ids, [0, 20]), expected, atol=1e-4, rtol=0)
        other = load_decoder(tiny("qwen2")[1], dtype=torch.float32)
        decoder.model.layers = other.model.layers  # new tensors, not new contents
        assert model.prepare() != key
        torch.testing.assert_close(by_chunks(model, ids, [0, 20]), plain(decoder, ids), atol=1e-4, rtol=0)


def test_rows_pick_what_gives_logits(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[1], dtype=torch.float32)
    model = InferenceDecoder(decoder)
    model.prepare()
    ids = torch.randint(0, 300, (8,))
    config = model.config
    shape = (1, PAGE, config.num_kv_heads, config.head_dim)
    with torch.inference_mode():
        cache = [[torch.zeros(shape) for _ in range(config.num_layers)] for _ in range(2)]
        at = torch.arange(8)
        segments = chunk_segments(torch.tensor([0], dtype=torch.int32), 0, 8)
        got = model.forward(ids, at, at, segments, *cache, torch.tensor([7, 2]))
        torch.testing.assert_close(got, plain(decoder, ids)[[7, 2]], atol=1e-4, rtol=0)


@pytest.mark.skipif(implementation("decoder_layers") != "cpp", reason="needs csrc and AVX-512 BF16")
@pytest.mark.parametrize("family", ["llama", "llama-tied-gqa", "mistral", "qwen3"])
def test_all_layers_in_one_call_change_no_bit(
    family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny(family)[1], dtype=torch.bfloat16)
    ids = torch.randint(0, decoder.config.vocab_size, (37,), generator=torch.Generator().manual_seed(3))
    model = InferenceDecoder(decoder)
    model.prepare()
    assert model._stack is not None
    at_once = by_chunks(model, ids, [0, 20, 21, 37])
    monkeypatch.setattr("metareward.model.inference.runs_here", lambda stack: False)
    assert torch.equal(by_chunks(model, ids, [0, 20, 21, 37]), at_once)


@pytest.mark.skipif(implementation("decoder_layers") != "cpp", reason="needs csrc and AVX-512 BF16")
def test_layers_in_one_call_check_what_they_are_given(tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[1], dtype=torch.bfloat16)
    model = InferenceDecoder(decoder)
    model.prepare()
    config, pages = decoder.config, torch.arange(2, dtype=torch.int32)
    keys, values = (
        [
            torch.zeros(2, PAGE, config.num_kv_heads, config.head_dim).bfloat16()
            for _ in range(config.num_layers)
        ]
        for _ in range(2)
    )
    ids, at = torch.arange(4), torch.arange(4)
    segments = chunk_segments(pages, 0, 4)
    with pytest.raises(IndexError, match="slots span"):
        model.forward(ids, at, at + 2 * PAGE, segments, keys, values, at)
    with pytest.raises(RuntimeError, match="logit row 4 is outside"):
        model.forward(ids, at, at, segments, keys, values, at + 1)
    with pytest.raises(IndexError, match="the segments name pages"):
        model.forward(ids, at, at, segments._replace(page_ids=pages + 5), keys, values, at)
