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
from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.flops import Flops, attention_pairs, block_weights, peak_flops, peak_of, step_flops
from metareward.training.objectives import pair_objective, sft_objective
from metareward.training.packing import Segment, pack
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


def test_llama_3_8b_by_hand() -> None:
    # q and o: 4096 x 4096 each; k and v: 4096 x 1024 each; gate, up and down: 4096 x 14336 each.
    assert block_weights(LLAMA_3_8B) == 2 * 16_777_216 + 2 * 4_194_304 + 3 * 58_720_256 == 218_103_808
    # 1000 * 1001 / 2, then 200 * 1000 + 200 * 201 / 2, then 100 * 1000 + 100 * 101 / 2.
    assert attention_pairs(tree()) == 500_500 + 220_100 + 105_050 == 825_650
    found = step_flops(LLAMA_3_8B, tree(), 300, recompute_blocks=False)
    # 6 FLOPs a weight and token: 6 * 1300 * 32 * 218,103,808.
    assert found.dense == 54_438_710_476_800
    # 12 FLOPs a pair, channel and layer: 12 * 825,650 * 32 layers * 4096 channels.
    assert found.attention == 1_298_635_161_600
    # 6 * 300 * 4096 * 128,256.
    assert found.head == 945_605_836_800
    assert found.recomputed == 0
    assert found.model == 56_682_951_475_200


def test_what_is_computed_again_is_apart() -> None:
    plain = step_flops(LLAMA_3_8B, tree(), 300, recompute_blocks=False)
    found = step_flops(LLAMA_3_8B, tree(), 300, recompute_blocks=True, recomputed_head_rows=50)
    assert found.model == plain.model
    # A forward pass through the blocks, a third of forward and backward; 2 * 50 * 4096 * 128,256 for the head.
    assert found.recomputed == 54_438_710_476_800 / 3 + 1_298_635_161_600 / 3 + 52_533_657_600


def test_sharing_the_prompt_saves_its_flops() -> None:
    shared = step_flops(LLAMA_3_8B, tree(), 300, recompute_blocks=False)
    apart = step_flops(LLAMA_3_8B, [Segment(0, 1200), Segment(1200, 2300)], 300, recompute_blocks=False)
    assert apart.dense - shared.dense == 6.0 * 1000 * 32 * 218_103_808
    assert apart.attention - shared.attention == 12.0 * 500_500 * 32 * 4096


def test_sums() -> None:
    total = Flops(1.0, 2.0, 3.0, 4.0) + Flops(10.0, 20.0, 30.0, 40.0)
    assert total == Flops(11.0, 22.0, 33.0, 44.0)
    assert total.model == 66.0


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
    found = step_flops(decoder.config, batch.segments, len(batch.rows), recompute_blocks=False)
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
    found = step_flops(config, [Segment(0, 1)], 0, recompute_blocks=False)
    assert counter.get_total_flops() * config.num_layers == found.attention


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
    ],
)
def test_peaks_by_device_name(name: str, teraflops: float) -> None:
    assert peak_of(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A1000 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_device_that_is_not_known_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_peak_needs_a_gpu_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bfloat16") == 989.5e12
    assert peak_flops(torch.device("cuda"), "float32") is None
    assert peak_flops(CPU, "bfloat16") is None


def test_rates_of_a_device_by_hand() -> None:
    result = StepResult({}, 1.0, 10, 20, flops=2e15, recomputed_flops=5e14)
    assert device_rates(result, 4.0, 1e15) == {"tflops": 500.0, "recomputed_tflops": 125.0, "mfu": 0.5}
    assert "mfu" not in device_rates(result, 4.0, None)


def test_rows_whose_logits_are_made_twice(make_examples: Callable[..., list[Example]]) -> None:
    """A chunk has 576 tokens on a CPU: the second pair is longer, the first fits to the token."""
    batch = replace(pack(make_examples(3), CPU), lengths=(500, 76, 500, 77, 3, 4))
    assert pair_objective(TrainSettings(), {}).recomputed_rows(batch) == 577
    assert sft_objective().recomputed_rows(batch) == 500 + 76 + 500 + 77 + 3 + 4


def test_figures_of_a_step_on_a_cpu(
    models: dict[str, tuple[Any, Path]],
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    worker: ModuleType,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rates follow from the batch and the seconds; there is no MFU, and the log says why."""
    examples = make_examples(4)
    settings = make_settings(epochs=1, micro_batch_tokens=10_000, activation_checkpointing=True)
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
    wanted = step_flops(config, batch.segments, sum(batch.lengths), recompute_blocks=True)
    assert figures["tflops"] * figures["seconds"] * 1e12 == pytest.approx(wanted.model)
    assert figures["recomputed_tflops"] * figures["seconds"] * 1e12 == pytest.approx(wanted.recomputed)
