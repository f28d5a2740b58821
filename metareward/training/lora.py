"""LoRA (arXiv 2106.09685): low-rank adapters are trained beside frozen matrices, and merged into them when the model is written.

peft puts its layers in place of the decoder's linear layers, W x becomes W x + alpha / rank B (A x). B starts at zero, so an
adapted model starts as the model itself, whose log-probs are the reference. Needs `pip install metareward[lora]`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder

# peft's name of an adapter that is given none.
ADAPTER = "default"
FROZEN = ".base_layer."
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
"""Matrices of a block by `train.lora_targets`."""


def check_lora(settings: TrainSettings, setting: str = "train.lora_rank") -> None:
    """
    Raises:
        UserError: adapters are asked for and peft is not installed.
    """
    if settings.lora_rank and find_spec("peft") is None:
        raise UserError(
            f"{setting} = {settings.lora_rank} needs peft, which is not installed: pip install metareward[lora], "
            f"or set it to 0 to train all weights"
        )


def add_adapters(decoder: Decoder, settings: TrainSettings) -> None:
    """Adapters on the recipe's matrices of every block, in place; only they require gradients then. For the meta device."""
    check_lora(settings)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=list(TARGETS[settings.lora_targets]),
        # It would be another policy than the one whose log-probs the loss compares.
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, decoder, low_cpu_mem_usage=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def checkpoint_name(name: str) -> str:
    """A frozen parameter's name without adapters, as in the model's files."""
    return name.replace(FROZEN, ".")


@torch.no_grad()
def fill_adapters(decoder: Decoder, seed: Sequence[int]) -> None:
    """A uniform in +-1 / sqrt(inputs), peft's own choice, and B zero: a pure function of seed and name on any number of ranks."""
    for name, parameter in decoder.named_parameters():
        if not is_adapter(name):
            continue
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            keyed = np.random.SeedSequence([*seed, zlib.crc32(name.encode())]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(keyed[0] >> np.uint64(1)))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5.0), generator=generator)
        assert isinstance(parameter, DTensor)
        mine = distribute_tensor(
            whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(mine.to_local())


def merged(decoder: Decoder, name: str, weight: Tensor) -> Tensor:
    """The whole weight [out,in] of the frozen parameter `name` with its adapter's product added in float32. A collective."""
    if not name.endswith(f"{FROZEN}weight"):
        return weight
    layer: Any = decoder.get_submodule(name.removesuffix(f"{FROZEN}weight"))
    down, up = (
        part.full_tensor() if isinstance(part, DTensor) else part
        for part in (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
    )
    # [out,rank] @ [rank,in].
    return weight + layer.scaling[ADAPTER] * (up.float() @ down.float()).to(weight)


def adapter_weights(decoder: Decoder) -> int:
    """Weights of one block's adapters, over all ranks; 0 where there are none."""
    block = next(iter(decoder.blocks))
    return sum(parameter.numel() for name, parameter in block.named_parameters() if is_adapter(name))


def adapter_parameters(config: ModelConfig, settings: TrainSettings) -> int:
    """Weights of all adapters that a recipe asks for: rank x (inputs + outputs) of every matrix that has one."""
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + middle,
        "up_proj": hidden + middle,
        "down_proj": middle + hidden,
    }
    return config.num_layers * settings.lora_rank * sum(ends[name] for name in TARGETS[settings.lora_targets])
