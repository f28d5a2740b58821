"""FLOPs of a training step, counted once and here, and the peak rates that they are held against.

A product of [m,k] and [k,n] is 2 m k n FLOPs; the two products of its backward pass are as many each. Only matrix products count:
norms, rotary embedding, activations and softmax are below a hundredth of them. What is computed again (activation
checkpointing, logits made twice) is reported apart and is no part of MFU (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from metareward.model.config import ModelConfig
from metareward.training.packing import Segment

# Device names of CUDA, as regular expressions, to dense bf16 TFLOP/s of NVIDIA's data sheets; the first that is found counts.
# A bare "H100" is in no device's name: the variants differ by a third.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH200 NVL\b", 835.5),
    (r"\bG?H200\b", 989.5),
    (r"\bH[18]00 PCIe\b", 756.5),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100 80GB HBM3\b", 989.5),
    (r"\bA[18]00\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL4\b", 121.0),
)


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward passes, by part; `recomputed` is on top of the others."""

    dense: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """What the step has to compute, however it is done: the FLOPs of MFU."""
        return self.dense + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.dense + other.dense,
            self.attention + other.attention,
            self.head + other.head,
            self.recomputed + other.recomputed,
        )


def block_weights(config: ModelConfig) -> int:
    """Weights in the matrices of one block; biases and norms are no products."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    return attention + 3 * config.hidden_size * config.intermediate_size


def attention_pairs(segments: Iterable[Segment]) -> int:
    """Pairs of a query and a key it sees, in a packed tree: all of a segment's ancestors, and itself causally.

    This is what has to be computed, with shared prompts once. A kernel that computes masked pairs too does more.
    """
    total = 0
    for segment in segments:
        length = segment.stop - segment.start
        total += length * segment.context + length * (length + 1) // 2
    return total


def step_flops(
    config: ModelConfig,
    segments: Iterable[Segment],
    head_rows: int,
    *,
    recompute_blocks: bool,
    recomputed_head_rows: int = 0,
) -> Flops:
    """Forward and backward of one micro-batch with all weights trained.

    Args:
        segments: of the packed row; their tokens go through the blocks.
        head_rows: rows of the head, one a completion token, in three products.
        recompute_blocks: whether activation checkpointing runs every block's forward pass twice.
        recomputed_head_rows: rows whose logits are computed a second time.
    """
    segments = list(segments)
    tokens = sum(segment.stop - segment.start for segment in segments)
    dense = 2.0 * tokens * config.num_layers * block_weights(config)
    # Scores and their product with the values.
    pairs = attention_pairs(segments)
    attention = 4.0 * pairs * config.num_layers * config.num_heads * config.head_dim
    head = 2.0 * config.hidden_size * config.vocab_size
    recomputed = recomputed_head_rows * head + (dense + attention if recompute_blocks else 0.0)
    return Flops(3.0 * dense, 3.0 * attention, 3.0 * head_rows * head, recomputed)


def peak_of(name: str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device by its name; None for one that is not in the table.

    A MIG slice bears its whole device's name and is a part of it: unknown.
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak * 1e12 for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


def peak_flops(device: torch.device, compute_dtype: str) -> float | None:
    """FLOP/s that MFU is a share of. None where it is not known: CPUs, devices that are not in the table, and float32, whose
    rate depends on PyTorch's TF32 setting.
    """
    if device.type != "cuda" or compute_dtype != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def no_mfu(device: torch.device, compute_dtype: str) -> str:
    """Why a step has no MFU, as a sentence for the log."""
    if device.type != "cuda":
        return "no MFU: the peak rate of a CPU is in no table"
    if compute_dtype != "bfloat16":
        return f"no MFU: the table of peak rates is for bfloat16, not {compute_dtype}"
    name = torch.cuda.get_device_name(device)
    return f"no MFU: the peak rate of {name} is not known; add it to metareward/training/flops.py"
