"""AdamW on the float32 master weights, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from metareward.config import TrainSettings
from metareward.model.decoder import Decoder


def build_optimizer(decoder: Decoder, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW on what requires gradients; weight decay on matrices only, as is customary (norms and biases are vectors)."""
    assert all(isinstance(parameter, DTensor) for parameter in decoder.parameters()), (
        "weights are not sharded now"
    )
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": settings.weight_decay}]
    # Adapters are matrices all.
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, foreach=True)


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then a cosine.

    The warm-up takes `warmup_share` of the steps, rounded up, and starts above 0, so that no step is spent on nothing.
    """
    # Rounded first, because 0.07 * 100 is a little more than 7 in floating point.
    warmup = math.ceil(round(settings.warmup_share * steps, 6))
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    floor = settings.min_learning_rate_share
    return settings.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
