"""What gpu_dpo.py trains: models of random weights in files, and pairs of the size of judgments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu_sampler_workload import llama
from metareward.model.config import ModelConfig
from metareward.model.decoder import parameter_shapes
from metareward.model.model_writer import save_model
from metareward.training.examples import Example

PAD = "<pad>"


@dataclass(frozen=True)
class Shapes:
    """A model and its pairs: all prompts begin with `rubric` tokens and go on with `prompt`, then come two completions."""

    model: ModelConfig
    pairs: int = 64
    rubric: int = 300
    prompt: int = 650
    completion: int = 150
    micro_batch_tokens: int = 16384


SHAPES = {
    "smollm2-1.7b": Shapes(
        llama(
            vocab_size=49152,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ),
    "llama3.2-1b": Shapes(
        llama(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ),
    # The largest Llama whose fp32 weights, gradients and optimizer state (16 bytes a parameter) fit 80 GB.
    "llama3.2-3b": Shapes(
        llama(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ),
    "small": Shapes(
        llama(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        ),
        pairs=4,
        rubric=20,
        prompt=30,
        completion=12,
        micro_batch_tokens=512,
    ),
}


def make_pairs(shapes: Shapes, seed: int) -> tuple[Example, ...]:
    """Pairs of random tokens; their prompts begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        # Token 0 pads.
        return tuple(torch.randint(1, shapes.model.vocab_size, (count,), generator=generator).tolist())

    rubric = draw(shapes.rubric)
    return tuple(
        Example(
            f"pair {index}",
            "judge",
            rubric + draw(shapes.prompt),
            (draw(shapes.completion), draw(shapes.completion)),
        )
        for index in range(shapes.pairs)
    )


def write_random_model(folder: Path, config: ModelConfig, device: str, seed: int) -> None:
    """A model directory of random bf16 weights, with a tokenizer of one word that a peer can load."""
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    write_tokenizer(tokenizer)
    generator = torch.Generator(device).manual_seed(seed)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in parameter_shapes(config).items():
            weight = torch.ones(shape, dtype=torch.bfloat16, device=device)
            if len(shape) > 1:
                # Keeps activations at their size from layer to layer, and the logits far from infinite.
                weight.normal_(std=shape[-1] ** -0.5, generator=generator)
            yield name, weight.cpu()

    save_model(folder, weights(), config, tokenizer_from=tokenizer, dtype=torch.bfloat16)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True)
    Tokenizer(WordLevel({PAD: 0, "word": 1}, unk_token="word")).save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
