"""Tensor parallelism for sampling: a group of ranks shares one copy of a model, each with some of the heads and of the MLP.

The split is Megatron-LM's (arXiv 1909.08053, section 3). Query, key, value, gate and up are cut by outputs: a rank computes
whole heads, with their part of the key-value cache, and units of the MLP without a word from the others. Output and down are
cut by inputs: every rank has a term of the result, and one all-reduce after each adds the terms up. Norms, the embedding and the
head are whole on every rank; of the models that need a group they are a small part.

Terms are added in float32 and go so into the float32 residual, for twice the bytes of bf16: else every hop of the all-reduce
would round the sum, the more so the more ranks, and the log-probs would move away from the trainer's. Runs on CPU ranks (gloo);
has never run on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metareward.errors import UserError
from metareward.model.config import ModelConfig

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share a model, and this one's place among them; alone unless said otherwise.

    All but `is_first` are collectives of the group: every rank of it calls them in the same order.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the group: draws its requests and writes its results."""
        return self.rank == 0

    def sum(self, term: Tensor) -> Tensor:
        """All ranks' terms added up in float32, the same bits on every rank. May overwrite `term`."""
        total = term.float()
        if self.size > 1:
            dist.all_reduce(total, group=self.process_group)
        return total

    def copy_first_(self, tensor: Tensor) -> None:
        """Make the tensor the first rank's, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.process_group, group_src=0)

    def from_first(self, action: Callable[[], int]) -> int:
        """What `action`, run on the first rank alone, returns there."""
        number = torch.tensor(action() if self.is_first else 0, dtype=torch.int64)
        self.copy_first_(number)
        return int(number)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor(number, dtype=torch.int64)
        if self.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.process_group)
        return int(found)


ALONE = TensorGroup()


def check_tensor_parallel(size: int, world_size: int, config: ModelConfig) -> None:
    """Groups of `size` ranks must take up all ranks, and cut the model's heads and MLP evenly.

    Raises:
        UserError: naming the values that do.
    """
    by_model = math.gcd(config.num_heads, config.num_kv_heads, config.intermediate_size)
    if math.gcd(by_model, world_size) % size == 0:
        return
    common = math.gcd(by_model, world_size)
    *choices, last = [str(number) for number in range(1, common + 1) if common % number == 0]
    more = f", or start a multiple of {size} processes" if by_model % size == 0 else ""
    raise UserError(
        f"sampler.tensor_parallel = {size} must divide the number of processes ({world_size}) and the model's attention heads "
        f"({config.num_heads}), key-value heads ({config.num_kv_heads}) and intermediate_size ({config.intermediate_size}): "
        f"set it to {', '.join(choices)}{' or ' if choices else ''}{last}{more}"
    )


def part_config(config: ModelConfig, size: int) -> ModelConfig:
    """The sizes of one rank's part, of `size`; `hf` still describes the whole model."""
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def read_part(stored: Any, name: str, group: TensorGroup) -> Tensor:
    """This rank's part of the weight `name`. stored: its slice of a safetensors file, of which nothing else is read."""
    module, leaf = name.split(".")[-2:]
    shape = stored.get_shape()
    if module in BY_OUTPUTS:
        return stored[_mine(shape[0], group)]
    if module in BY_INPUTS and leaf == "weight":
        return stored[:, _mine(shape[1], group)]
    if module in BY_INPUTS and not group.is_first:
        # A bias of the sum is in one of its terms.
        return torch.zeros_like(stored[:])
    return stored[:]


def _mine(length: int, group: TensorGroup) -> slice:
    part = length // group.size
    return slice(group.rank * part, (group.rank + 1) * part)


def sum_outputs(decoder: nn.Module, group: TensorGroup) -> None:
    """Make the plain forward pass of a decoder of parts, in which modules are called, that of the whole; then a collective."""

    def summed(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return group.sum(output).to(output.dtype)

    for name, module in decoder.named_modules():
        if name.split(".")[-1] in BY_INPUTS:
            module.register_forward_hook(summed)
