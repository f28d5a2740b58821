"""Tiny random models of each family, written by transformers, with a byte-level tokenizer and a template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-gqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama-bias-head-dim": ("Llama", {"attention_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 128, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied-bias": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """Save a tokenizer of the 256 bytes and a few special tokens that puts <s> before plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def build_tiny(family: str, directory: Path) -> Any:
    """Save a random fp32 model of `family` with a tokenizer in `directory` and return transformers' model."""
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    torch.manual_seed(sum(family.encode()))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of ones, biases of zero and near-uniform logits would hide mistakes.
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    model.save_pretrained(directory)
    byte_tokenizer(directory)
    return model


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """tiny(family) -> (transformers' model, its directory)."""

    def build(family: str) -> tuple[Any, Path]:
        return build_tiny(family, tmp_path / family), tmp_path / family

    return build


@pytest.fixture(scope="session")
def save_byte_tokenizer() -> Callable[..., None]:
    """byte_tokenizer, for tests that vary the chat template."""
    return byte_tokenizer
