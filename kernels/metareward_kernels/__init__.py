"""The kernels of metareward, importable without the trainer: linear log-probs,
log-probs of logits, preference losses, products with fp32 results, paged
attention, sampling, and the fused rows of inference.

Every op has a plain PyTorch implementation and, where the compiled library is present, a C++ one for the CPU.
`report()` says which implementation of each op runs in this process.

Targets of a head op lie in [0, V). On a CPU one outside raises IndexError. On a GPU to say so would wait for the device:
`linear_logprob` returns NaN for it, from the Triton kernel (its PyTorch path, METAREWARD_KERNELS=torch, ends in a
device-side assertion, as `gather_logprob` always does there). `linear_preference`, which waits for the device anyway,
raises IndexError everywhere. Labels of -100 are such targets: leave their tokens out instead. The GPU's share of this has
never run on a GPU.
"""

from __future__ import annotations

from metareward_kernels.decoder_layers import LayerStack, LayerWeights, decoder_layers, stack_layers
from metareward_kernels.dispatch import implementation, report
from metareward_kernels.dpo_loss import DpoLoss, dpo_loss
from metareward_kernels.fused_rows import add_rms_norm, rotate_and_store, silu_mul
from metareward_kernels.gather_logprob import gather_logprob
from metareward_kernels.linear_fp32 import linear_fp32, pack_bf16_weight, packed_bf16_linear
from metareward_kernels.linear_logprob import linear_logprob
from metareward_kernels.linear_preference import Preference, linear_preference
from metareward_kernels.packed_linear import (
    PackedGatedLinear,
    PackedLinear,
    pack_gated_linear,
    pack_linear,
)
from metareward_kernels.paged_attention import Segments, paged_attention
from metareward_kernels.random_keys import keyed_uniforms, request_key
from metareward_kernels.sample import sample_tokens
from metareward_kernels.segment_attention import segment_attention
from metareward_kernels.segment_graph import traced_segment_attention
from metareward_kernels.segment_tree import SegmentTree

__all__ = [
    "DpoLoss",
    "LayerStack",
    "LayerWeights",
    "PackedGatedLinear",
    "PackedLinear",
    "Preference",
    "SegmentTree",
    "Segments",
    "add_rms_norm",
    "decoder_layers",
    "dpo_loss",
    "gather_logprob",
    "implementation",
    "keyed_uniforms",
    "linear_fp32",
    "linear_logprob",
    "linear_preference",
    "pack_bf16_weight",
    "pack_gated_linear",
    "pack_linear",
    "packed_bf16_linear",
    "paged_attention",
    "report",
    "request_key",
    "rotate_and_store",
    "sample_tokens",
    "segment_attention",
    "silu_mul",
    "stack_layers",
    "traced_segment_attention",
]
