"""FLOPs and bytes against hand arithmetic, PyTorch's own counter and published figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder
from metareward.model.flops import (
    Work,
    attention_flops,
    block_weights,
    forward_flops,
    inference_bytes,
    inference_flops,
    kv_token_bytes,
    optimizer_bytes,
    parameter_count,
    projection_weights,
    read_weights,
    sampling_bytes,
    step_flops,
)

SMALL = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
)
LLAMA3_8B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    }
)


def test_a_small_model_by_hand() -> None:
    # Query, key, value: 4 x (4 + 2 + 2) = 32 weights a block. Output 4 x 4 and MLP 3 x 4 x 6: 88. Head: 40.
    work = Work(passes=1, rows=3, logit_rows=1, pairs=6)
    attention = 4 * 2 * 2 * 2 * 6
    assert attention_flops(SMALL, 6) == attention
    assert (projection_weights(SMALL), block_weights(SMALL)) == (32, 120)
    forward = forward_flops(SMALL, work)
    assert (forward.dense, forward.attention, forward.head) == (2 * 3 * 2 * 120, attention, 2 * 40)
    assert forward.recomputed == 0
    assert step_flops(SMALL, work).model == 3 * forward.model
    # The sampler's second block goes on with one row behind its keys and values.
    assert inference_flops(SMALL, work) == 2 * 3 * (2 * 32 + 88) + 2 * (88 + 40) + attention


@pytest.mark.parametrize("tie", [False, True])
def test_pytorch_counts_the_same_products(tie: bool) -> None:
    config = ModelConfig.from_hf({**SMALL.hf, "tie_word_embeddings": tie})
    decoder = Decoder(config)
    rows = torch.tensor([1, 4])
    # Attention that multiplies nothing: heads of values repeated.
    with FlopCounterMode(display=False) as counter:
        hidden = decoder(
            torch.arange(5), torch.arange(5), lambda layer, q, k, v: v.repeat(1, 2, 1), rows=rows
        )
        decoder.logits(hidden)
    assert counter.get_total_flops() == forward_flops(config, Work(rows=5, logit_rows=2)).model
    assert parameter_count(config) == sum(parameter.numel() for parameter in decoder.parameters())


def test_llama3_8b_by_published_figures() -> None:
    assert parameter_count(LLAMA3_8B) == 8_030_261_248
    assert read_weights(LLAMA3_8B) == 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    # 2 N FLOPs a token, without the embedding's rows.
    assert forward_flops(LLAMA3_8B, Work(rows=1, logit_rows=1)).model == 2 * read_weights(LLAMA3_8B)
    assert kv_token_bytes(LLAMA3_8B, 2) == 131_072


def test_bytes_of_a_decode_step_of_llama3_8b() -> None:
    """Batch 256, context 1,500: 15.0 GB of weights and 50.3 GB of keys and values; 19.8 GB where 11 share 1,000 of them."""
    rows, logits = 256, 4 * 128_256 * 256
    written = rows * 131_072
    alone = inference_bytes(LLAMA3_8B, Work(1, rows, rows, rows * 1500, rows * 1500), 2)
    assert (alone - logits - written) / 1e9 == pytest.approx(15.0 + 50.3, abs=0.06)
    together = rows * 500 + rows / 11 * 1000
    shared = inference_bytes(LLAMA3_8B, Work(1, rows, rows, rows * 1500, together), 2)
    assert (shared - logits - written) / 1e9 == pytest.approx(15.0 + 19.8, abs=0.06)
    assert sampling_bytes(LLAMA3_8B, rows) == logits


def test_an_optimizer_step_moves_seven_floats_a_parameter() -> None:
    assert optimizer_bytes(10) == 10 * 4 * 7


def test_work_of_counts_ignores_others() -> None:
    assert Work.of({"rows": 3, "completions": 2}) == Work(rows=3)
