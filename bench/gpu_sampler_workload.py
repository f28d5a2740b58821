"""What gpu_sampler.py decodes: models of random weights, and prompts of which groups begin alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder
from metareward.sampler import Request


@dataclass(frozen=True)
class Shapes:
    """A model and what it decodes. `context` is the mean over the measured tokens, `shared` the part that each
    `group` of sequences has in common; `copied_bytes` is what the bandwidth is measured with."""

    model: ModelConfig
    batch: int
    context: int
    shared: int
    group: int
    few: int
    many: int
    max_step_tokens: int
    copied_bytes: int

    @property
    def prompt(self) -> int:
        """Tokens of each prompt, such that the measured tokens lie around `context`."""
        return self.context - (self.few + self.many) // 2

    @property
    def groups(self) -> int:
        return -(-self.batch // self.group)

    @property
    def unique_prompt_tokens(self) -> int:
        return self.groups * self.shared + self.batch * (self.prompt - self.shared)


def llama(**sizes: int) -> ModelConfig:
    return ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, **sizes})


SHAPES = {
    "llama3-8b": Shapes(
        llama(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        ),
        batch=256,
        context=1500,
        shared=1000,
        group=11,
        few=32,
        many=160,
        max_step_tokens=16384,
        copied_bytes=4 * 2**30,
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
        ),
        batch=24,
        context=128,
        shared=40,
        group=11,
        few=8,
        many=72,
        max_step_tokens=1024,
        copied_bytes=2**26,
    ),
}


def make_requests(shapes: Shapes, seed: int) -> list[Request]:
    """Random prompts; those of a group begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(shapes.model.vocab_size, (count,), generator=generator).tolist())

    prefixes = [draw(shapes.shared) for _ in range(shapes.groups)]
    return [
        Request(f"{index}", prefixes[index // shapes.group] + draw(shapes.prompt - shapes.shared))
        for index in range(shapes.batch)
    ]


def random_decoder(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Decoder:
    """A decoder of random weights, made in `dtype` on `device`: no fp32 copy is ever held."""
    with torch.device("meta"):
        decoder = Decoder(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(decoder.named_parameters()):
        weight: Tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 1:
            weight.fill_(1.0)
        else:
            # Keeps activations at their size from layer to layer, and the logits far from infinite.
            weight.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(weight))
    return decoder
