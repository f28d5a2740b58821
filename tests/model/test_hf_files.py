"""Model directories: the round trip with transformers, and every kind of damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metareward.errors import UserError
from metareward.model.hf_files import iterate_tensors, load_decoder, read_config, save_model, weights_digest
from metareward.model.packed_attention import packed_attention

Tiny = Callable[[str], tuple[Any, Path]]


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "family",
    [
        "llama-llama3-rope",
        "llama-linear-rope",
        "llama-tied-gqa",
        "mistral-window",
        "qwen2",
        "qwen3-tied-bias",
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [40_000, 10**9])
@torch.no_grad()
def test_round_trip_through_transformers(
    tiny: Tiny, tmp_path: Path, family: str, max_shard_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference, source = tiny(family)
    decoder = load_decoder(source, dtype=torch.float32)
    out = tmp_path / "runs" / "out"
    drawn: list[str] = []

    def pairs() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in decoder.named_parameters():
            drawn.append(name)
            yield name, tensor
        if decoder.lm_head is None:
            yield "lm_head.weight", decoder.head_weight

    save_model(
        out,
        pairs(),
        decoder.config,
        tokenizer_from=source,
        dtype=torch.float32,
        max_shard_bytes=max_shard_bytes,
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_bytes == 40_000)
    assert (out / "model.safetensors.index.json").exists() == (len(shards) > 1)
    stored = [name for shard in shards for name in load_file(shard)]
    assert sorted(stored) == sorted(drawn)

    ids = torch.randint(0, 300, (50,))
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.float32
    assert torch.equal(again(ids[None]).logits, reference(ids[None]).logits)
    assert again.generation_config.eos_token_id == 257
    text = "Straße 12"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(source)(text)
    ours = load_decoder(out, dtype=torch.float32)
    hidden = ours(ids, torch.arange(50), packed_attention([0, 50]))
    torch.testing.assert_close(ours.logits(hidden), reference(ids[None]).logits[0], atol=1e-4, rtol=0)


def test_bf16_is_written_and_read(tiny: Tiny, tmp_path: Path) -> None:
    _, source = tiny("qwen2")
    decoder = load_decoder(source, dtype=torch.float32)
    save_model(
        tmp_path / "out", decoder.state_dict(), decoder.config, tokenizer_from=source, dtype=torch.bfloat16
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    again = dict(iterate_tensors(tmp_path / "out"))
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16())
    assert load_decoder(tmp_path / "out", dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16


def test_digest_sees_content_and_not_sharding(tiny: Tiny, tmp_path: Path) -> None:
    _, source = tiny("llama")
    decoder = load_decoder(source, dtype=torch.float32)

    def save(name: str, **settings: Any) -> str:
        save_model(tmp_path / name, decoder.state_dict(), decoder.config, tokenizer_from=source, **settings)
        return weights_digest(tmp_path / name)

    one = save("one", dtype=torch.float32)
    assert one == save("sharded", dtype=torch.float32, max_shard_bytes=30_000) == weights_digest(source)
    assert one != save("bf16", dtype=torch.bfloat16)
    with torch.no_grad():
        decoder.model.norm.weight[0] += 1e-3
    assert one != save("changed", dtype=torch.float32)


def test_loaded_weights_do_not_hang_on_the_file(tiny: Tiny) -> None:
    _, directory = tiny("llama")
    decoder = load_decoder(directory, dtype=torch.float32)
    before = decoder.head_weight.detach().clone()
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 100_000)
    assert torch.equal(decoder.head_weight, before)


def test_leftover_rotary_buffers_and_equal_tied_heads_are_skipped(tiny: Tiny) -> None:
    _, directory = tiny("llama-tied-gqa")
    digest = weights_digest(directory)

    def add(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(directory, add)
    names = [name for name, _ in iterate_tensors(directory)]
    assert "lm_head.weight" not in names
    assert weights_digest(directory) == digest
    edit_weights(directory, lambda weights: weights["lm_head.weight"][3].add_(1.0))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_decoder(directory, dtype=torch.float32)


def poison(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights[name].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update(surprise=torch.ones(2)), "holds surprise"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(47)}),
            r"model.norm.weight has the shape \[47\]",
        ),
        (
            poison("model.layers.2.mlp.down_proj.weight", float("nan")),
            "model.layers.2.mlp.down_proj.weight.*NaN",
        ),
        (poison("model.norm.weight", float("-inf")), "model.norm.weight.*infinite"),
    ],
)
def test_damaged_weights_are_named(
    tiny: Tiny, change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    _, directory = tiny("llama")
    edit_weights(directory, change)
    with pytest.raises(UserError, match=named):
        load_decoder(directory, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_found_in_half_precision_files(tiny: Tiny, dtype: torch.dtype) -> None:
    _, directory = tiny("llama")

    def halve(weights: dict[str, Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name].to(dtype)
        weights["lm_head.weight"][17, 5] = float("nan")

    edit_weights(directory, halve)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_decoder(directory, dtype=torch.float32)


def test_overflow_in_float16_is_named(tiny: Tiny) -> None:
    _, directory = tiny("llama")
    edit_weights(directory, poison("lm_head.weight", 1e6))
    load_decoder(directory, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"lm_head.weight.*float16"):
        load_decoder(directory, dtype=torch.float16)


@pytest.mark.parametrize("keep", [0, 5, 300, 50_000])
def test_half_written_file_is_named(tiny: Tiny, keep: int) -> None:
    _, directory = tiny("llama")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors.*(damaged|half-written)"):
        load_decoder(directory, dtype=torch.float32)


def test_missing_files_are_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model directory"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path / "empty")
    _, directory = tiny("llama")
    (directory / "model.safetensors").rename(directory / "elsewhere")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_decoder(directory, dtype=torch.float32)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_decoder(directory, dtype=torch.float32)
    (directory / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        load_decoder(directory, dtype=torch.float32)


def test_damaged_index_is_named(tiny: Tiny, tmp_path: Path) -> None:
    _, source = tiny("llama")
    decoder = load_decoder(source, dtype=torch.float32)
    out = tmp_path / "out"
    save_model(
        out,
        decoder.state_dict(),
        decoder.config,
        tokenizer_from=source,
        dtype=torch.float32,
        max_shard_bytes=90_000,
    )
    index = out / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    moved = next(name for name, shard in weight_map.items() if shard == first)
    edit_json(index, weight_map={**weight_map, moved: second})
    with pytest.raises(UserError, match=f"{second} lacks {moved}"):
        load_decoder(out, dtype=torch.float32)
    edit_json(index, weight_map=weight_map)
    (out / second).unlink()
    with pytest.raises(UserError, match=f"names {second}, which is not there"):
        load_decoder(out, dtype=torch.float32)
    edit_json(index, weight_map=None)
    with pytest.raises(UserError, match="weight_map"):
        load_decoder(out, dtype=torch.float32)


def test_failed_save_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    _, source = tiny("llama")
    decoder = load_decoder(source, dtype=torch.float32)
    good = decoder.state_dict()
    out = tmp_path / "runs" / "out"

    def save(state: dict[str, Tensor], tokenizer_from: Path = source) -> None:
        save_model(out, state, decoder.config, tokenizer_from=tokenizer_from, dtype=torch.float32)

    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match=rf"{name}.*NaN"):
        save({**good, name: torch.full_like(good[name], float("nan"))})
    with pytest.raises(ValueError, match=rf"lacks {name}"):
        save({key: value for key, value in good.items() if key != name})
    with pytest.raises(ValueError, match="not a tensor of this model"):
        save({**good, "extra": torch.ones(1)})
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no tokenizer files"):
        save(good, tmp_path / "bare")
    assert list(out.parent.iterdir()) == []
    save(good)
    with pytest.raises(UserError, match="exists already"):
        save(good)
    assert weights_digest(out) == weights_digest(source)
