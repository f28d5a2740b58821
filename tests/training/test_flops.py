"""FLOPs of a training step against figures worked out by hand, and against PyTorch's own counter of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from metareward.config import TrainSettings
from metareward.model.config import ModelConfig
from metareward.model.flops import Work, block_weights, step_flops
from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.objectives import pair_objective, sft_objective
from metareward.training.packing import Segment, attention_pairs, pack, work_of
from metareward.training.step import StepResult
from metareward.training.trainer import device_rates

CPU = torch.device("cpu")
LLAMA_3_8B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
)


def tree() -> list[Segment]:
    """A prompt of 1,000 tokens with completions of 200 and 100."""
    prompt = Segment(0, 1000)
    return [prompt, Segment(1000, 1200, (prompt,)), Segment(1200, 1300, (prompt,))]


def work(segments: list[Segment], head_rows: int) -> Work:
    rows = sum(segment.stop - segment.start for segment in segments)
    return Work(rows=rows, logit_rows=head_rows, pairs=attention_pairs(segments))


def test_llama_3_8b_by_hand() -> None:
    # q and o: 4096 x 4096 each; k and v: 4096 x 1024 each; gate, up and down: 4096 x 14336 each.
    assert block_weights(LLAMA_3_8B) == 2 * 16_777_216 + 2 * 4_194_304 + 3 * 58_720_256 == 218_103_808
    # 1000 * 1001 / 2, then 200 * 1000 + 200 * 201 / 2, then 100 * 1000 + 100 * 101 / 2.
    assert attention_pairs(tree()) == 500_500 + 220_100 + 105_050 == 825_650
    found = step_flops(LLAMA_3_8B, work(tree(), 300))
    # 6 FLOPs a weight and token: 6 * 1300 * 32 * 218,103,808.
    assert found.dense == 54_438_710_476_800
    # 12 FLOPs a pair, channel and layer: 12 * 825,650 * 32 layers * 4096 channels.
    assert found.attention == 1_298_635_161_600
    # 6 * 300 * 4096 * 128,256.
    assert found.head == 945_605_836_800
    assert found.recomputed == 0
    assert found.model == 56_682_951_475_200


def test_what_is_computed_again_is_apart() -> None:
    plain = step_flops(LLAMA_3_8B, work(tree(), 300))
    found = step_flops(LLAMA_3_8B, work(tree(), 300), recompute_blocks=True, recomputed_head_rows=50)
    assert found.model == plain.model
    # A forward pass through the blocks, a third of forward and backward, without the last product of each of 32 blocks,
    # 2 * 1300 * 4096 * 14,336; 2 * 50 * 4096 * 128,256 for the head.
    last = 32 * 152_672_665_600
    assert found.recomputed == 54_438_710_476_800 / 3 - last + 1_298_635_161_600 / 3 + 52_533_657_600


def test_sharing_the_prompt_saves_its_flops() -> None:
    shared = step_flops(LLAMA_3_8B, work(tree(), 300))
    apart = step_flops(LLAMA_3_8B, work([Segment(0, 1200), Segment(1200, 2300)], 300))
    assert apart.dense - shared.dense == 6.0 * 1000 * 32 * 218_103_808
    assert apart.attention - shared.attention == 12.0 * 500_500 * 32 * 4096


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_dense_and_head_by_pytorch_s_counter(
    models: dict[str, tuple[Any, Path]], make_examples: Callable[..., list[Example]], family: str
) -> None:
    """Forward and backward counted by PyTorch, with attention that multiplies nothing and an eager head.

    The first block's input is the embedding, which is trained: no product of the backward pass is left out.
    """
    decoder = load_decoder(models[family][1], dtype=torch.float32)
    batch = pack(make_examples(3), CPU)
    with FlopCounterMode(display=False) as counter:
        hidden = decoder(
            batch.token_ids, batch.positions, lambda layer, query, key, value: query * 1.0, rows=batch.rows
        )
        (hidden @ decoder.head_weight.T).square().sum().backward()
    found = step_flops(decoder.config, Work.of(work_of(batch)))
    # Keys and values go nowhere here, so the two products of their backward passes are missing: of key and value weights.
    keys = decoder.config.hidden_size * decoder.config.num_kv_heads * decoder.config.head_dim
    missing = 2 * keys * decoder.config.num_layers * 4 * batch.tokens
    assert counter.get_total_flops() == found.dense + found.head - missing


def test_attention_by_pytorch_s_counter(
    models: dict[str, tuple[Any, Path]],
) -> None:
    """One token after one token: no pair is masked, so a kernel's count is the tree's."""
    config = load_decoder(models["qwen3"][1], dtype=torch.float32).config
    query = torch.randn(1, config.num_heads, 1, config.head_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scores = query @ torch.randn(1, config.num_heads, config.head_dim, 1, requires_grad=True)
        (scores @ torch.randn(1, config.num_heads, 1, config.head_dim, requires_grad=True)).sum().backward()
    found = step_flops(config, work([Segment(0, 1)], 0))
    assert counter.get_total_flops() * config.num_layers == found.attention


def test_rates_of_a_device_by_hand() -> None:
    result = StepResult({}, 1.0, 10, 20, flops=2e15, recomputed_flops=5e14)
    assert device_rates(result, 4.0, 1e15) == {"tflops": 500.0, "recomputed_tflops": 125.0, "mfu": 0.5}
    assert "mfu" not in device_rates(result, 4.0, None)


@pytest.mark.parametrize("fused", [False, True])
def test_work_of_a_micro_batch_by_hand(fused: bool) -> None:
    prompt, completions = tuple(range(5)), ((7, 8), (8, 7, 9))
    batch = pack([Example("a", "actor", prompt, completions)], CPU)
    found = work_of(batch, fused_head=fused)
    assert (found["rows"], found["logit_rows"], found["completions"]) == (10, 5, 2)
    # The prompt 5 * 6 / 2; then 2 * 5 + 2 * 3 / 2 and 3 * 5 + 3 * 4 / 2.
    assert found["pairs"] == 15 + 13 + 21
    assert found["unshared_rows"] == 7 + 8
    assert found["fused_rows"] == (5 if fused else 0)


def test_rows_whose_logits_are_made_twice(make_examples: Callable[..., list[Example]]) -> None:
    """A chunk has 576 tokens on a CPU: the second pair is longer, the first fits to the token."""
    batch = replace(pack(make_examples(3), CPU), lengths=(500, 76, 500, 77, 3, 4))
    assert pair_objective(TrainSettings(), {}).recomputed_rows(batch) == 577
    assert sft_objective().recomputed_rows(batch) == 500 + 76 + 500 + 77 + 3 + 4


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_figures_of_a_step_on_a_cpu(
    models: dict[str, tuple[Any, Path]],
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    worker: ModuleType,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    """Rates follow from the batch and the seconds; there is no MFU, and the log says why."""
    examples = make_examples(4)
    settings = make_settings(epochs=1, micro_batch_tokens=10_000, activation_checkpointing=mode)
    caplog.set_level("INFO", "metareward")
    outcome = worker.run(worker.Job(models["qwen3"][1], examples, settings, tmp_path))
    (figures,) = outcome.steps
    assert "mfu" not in figures
    assert "no MFU: the peak rate of a CPU is in no table" in caplog.text
    config = load_decoder(models["qwen3"][1], dtype=torch.float32).config
    # One kind after the other, longest first: the step's own order, which decides what is shared.
    batch = pack(
        worker.training_set(worker.Job(models["qwen3"][1], examples, settings, tmp_path)).micro(0)[0], CPU
    )
    wanted = step_flops(config, Work.of(work_of(batch)), recompute_blocks=mode == "full")
    assert figures["tflops"] * figures["seconds"] * 1e12 == pytest.approx(wanted.model)
    assert figures["recomputed_tflops"] * figures["seconds"] * 1e12 == pytest.approx(wanted.recomputed)
