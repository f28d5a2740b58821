"""Rotary position embeddings (RoFormer, arXiv 2104.09864), with the linear and the Llama 3 scaling of
frequencies.

Angles and their cosines are computed in fp32 whatever the model's dtype: at position 8,000 a bf16 angle is
off by whole turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metareward.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per token of each pair of channels: [head_dim / 2] float32 on the CPU, also within a
    meta-device context.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (even / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / float(scaling["factor"])
    assert scaling["rope_type"] == "llama3", scaling
    return _llama3_frequencies(
        frequencies,
        factor=float(scaling["factor"]),
        low=float(scaling["low_freq_factor"]),
        high=float(scaling["high_freq_factor"]),
        original_context=int(scaling["original_max_position_embeddings"]),
    )


def _llama3_frequencies(
    frequencies: Tensor, *, factor: float, low: float, high: float, original_context: int
) -> Tensor:
    """Llama 3.1: keep the fast channels, divide the slow ones by `factor`, blend linearly in between.

    A channel is fast when it makes at least `high` turns within the original context, slow when at most
    `low`.
    """
    turns = original_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / factor


def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every channel's angle, [T, 1, head_dim] each in `dtype`, from positions [T] int64.

    Computed in fp32. The sine of the first half of the channels is negated, so that `rotate` needs no negation.
    """
    angles = (positions.to(torch.float32)[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of x [T, heads, head_dim] by their angles."""
    # Three passes over x; addcmul also rounds the sum once, where two products and a sum round three times.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
