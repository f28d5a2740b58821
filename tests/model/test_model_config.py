"""config.json: both spellings of the rope settings; models we would compute wrongly are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.rope import inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_of_an_old_llama() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


def test_old_and_new_rope_settings_read_alike() -> None:
    inner = {**SCALING, "rope_type": "llama3", "original_max_position_embeddings": 256}
    old = ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": inner})
    older = ModelConfig.from_hf(
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **inner, "rope_type": None}}
    )
    new = ModelConfig.from_hf({**LLAMA, "rope_parameters": {**inner, "rope_theta": 5e5}})
    assert old.rope_theta == older.rope_theta == new.rope_theta == 5e5
    assert old.rope_scaling == older.rope_scaling == new.rope_scaling == inner
    assert inverse_frequencies(new).equal(inverse_frequencies(old))


@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_what_is_written_reads_back_the_same(rope: str) -> None:
    extra = {"default": {}, "linear": {"factor": 2.0}, "llama3": SCALING}[rope]
    config = ModelConfig.from_hf(
        {**LLAMA, "rope_parameters": {"rope_type": rope, "rope_theta": 7e4, **extra}}
    )
    written = config.to_hf("bfloat16")
    again = ModelConfig.from_hf(written)
    assert again.to_hf("bfloat16") == written
    assert (again.rope_theta, again.rope_scaling) == (config.rope_theta, config.rope_scaling)
    only_old = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert ModelConfig.from_hf(only_old).rope_scaling == config.rope_scaling
    only_new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert ModelConfig.from_hf(only_new).rope_theta == config.rope_theta


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "use_sliding_window": True},
            "sliding",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"head_dim": 15}, "15"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf({**LLAMA, **change})
