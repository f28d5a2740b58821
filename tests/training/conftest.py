"""Tiny random models, random examples, and the trainer's full path as a function, for the tests of the training room."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metareward.config import TrainSettings
from metareward.run import ranks
from metareward.training.examples import Example

# Not divisible by two or three ranks, so that their shards are unequal.
VOCABULARY = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A process group of this process alone, as the command line makes it; none is left for other rooms' tests."""
    ranks.start_ranks()
    yield
    ranks.stop_ranks()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Family -> (transformers' fp32 model, its directory). The model is shared: copy it before training it."""
    import transformers

    built = {}
    for family, (name, settings) in FAMILIES.items():
        folder = tmp_path_factory.mktemp("models") / family
        torch.manual_seed(sum(family.encode()))
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
        model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms of ones and near-uniform logits would hide mistakes.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        built[family] = (model, folder)
    return built


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """rank_worker.py as a module: Job, Outcome, run."""
    path = Path(__file__).with_name("rank_worker.py")
    spec = importlib.util.spec_from_file_location("rank_worker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_worker"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_settings() -> Callable[..., TrainSettings]:
    """TrainSettings in fp32, small enough for a test; changes are given by name."""

    def make(**changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "epochs": 2,
            "batch_pairs": 4,
            "learning_rate": 1e-4,
            "micro_batch_tokens": 120,
            "compute_dtype": "float32",
            "activation_checkpointing": "none",
            "checkpoint_steps": 1000,
        }
        return TrainSettings(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    """make(count, completions=2, seed=0): examples of two kinds; those of "judge" share a rubric of 24 tokens."""

    def make(count: int, completions: int = 2, seed: int = 0) -> list[Example]:
        draw = random.Random(seed)

        def tokens(least: int, most: int) -> tuple[int, ...]:
            return tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most)))

        rubric = tokens(24, 24)
        return [
            Example(
                f"{kind}-{index}",
                kind,
                (*rubric, *tokens(1, 9)) if kind == "judge" else tokens(3, 12),
                tuple(tokens(1, 10) for _ in range(completions)),
            )
            for index, kind in ((index, ("actor", "judge")[index % 2]) for index in range(count))
        ]

    return make
