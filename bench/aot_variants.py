"""Every Triton kernel of the package in every tuning that it ships with, as arguments of the compiler.

A new kernel goes into `variants()`; tests/kernels/test_ahead_of_time.py fails while one is missing. Types are those of
real models, bf16 first; "i32" arguments and pointers are multiples of 16, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from metareward_kernels import (
    triton_dpo_loss,
    triton_fused_rows,
    triton_head_rows,
    triton_head_tiles,
    triton_linear_logprob,
    triton_paged_attention,
    triton_random_keys,
    triton_sample,
)
from metareward_kernels.attention_tiles import COLUMNS

ARCHITECTURES = (80, 90)


class Variant(NamedTuple):
    """One kernel as it is launched."""

    name: str  # unique: the kernel, its tuning, its dtypes
    kernel: Any
    types: dict[str, str]  # of the arguments; those not named are i32
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    architectures: tuple[int, ...] = ARCHITECTURES
    matrix: dict[int, str] | None = (
        None  # the matrix instruction that an architecture must use: wgmma or mma.sync
    )
    asynchronous: bool = False  # must fetch global memory ahead, 16 bytes a thread
    resident: int = 1  # programs that must fit a multiprocessor together


def attention() -> Iterator[Variant]:
    """Paged attention: each tuning with the grouped heads of Llama 3, and SmolLM2's and an odd head dimension."""
    tuned = [(key, key[2], 4) for key in triton_paged_attention.TUNINGS]
    tuned += [
        ((2, wide, padded), dim, group)
        for padded, dim, group in ((64, 64, 3), (128, 80, 1))
        for wide in (False, True)
    ]
    for key, dim, group in tuned:
        size, wide, padded = key
        tuning = triton_paged_attention.TUNINGS[key]
        element = {2: "*bf16", 4: "*fp32"}[size]
        types = dict.fromkeys(("query", "key_pages", "value_pages"), element)
        types |= dict.fromkeys(("page_ids", "entry_rows", "limits", "tiles", "entry_slots"), "*i32")
        types |= {"partial_values": "*fp32", "partial_lse": "*fp32", "score_scale": "fp32"}
        constants = {"PAGE": 16, "GROUP": group, "DIM": dim, "COLUMNS": COLUMNS}
        constants |= {"BLOCK_M": tuning.stacked, "BLOCK_N": tuning.tokens, "BLOCK_D": padded}
        yield Variant(
            f"attend_tiles/{element[1:]}/{'wide' if wide else 'narrow'}/dim{dim}/group{group}",
            triton_paged_attention.attend_tiles,
            types,
            constants,
            tuning.warps,
            tuning.stages,
            matrix={80: "mma.sync", 90: "wgmma" if wide else "mma.sync"} if size == 2 else None,
            asynchronous=size == 2,
            resident=2 if size == 2 else 1,
        )
    types = {"partial_values": "*fp32", "partial_lse": "*fp32", "merge_starts": "*i32", "out": "*bf16"}
    for dim in (64, 128):
        constants = {"DIM": dim, "BLOCK_H": triton_paged_attention.BLOCK_HEADS, "BLOCK_D": dim}
        yield Variant(f"merge_slots/dim{dim}", triton_paged_attention.merge_slots, types, constants, 1)


def sampler() -> Iterator[Variant]:
    """Sampling and its random numbers."""
    types = {"uniforms": "*fp64", "tokens": "*i64", "list_ids": "*i32"}
    types |= dict.fromkeys(("logprobs", "kept_logprobs", "list_values"), "*fp32")
    types |= dict.fromkeys(("temperature_bits", "top_p_bits", "min_p_bits"), "i64")
    flags = ("GREEDY", "LIMITED", "NUCLEUS", "MIN_P")
    chosen: list[tuple[str, tuple[str, ...]]] = [("bf16", ("GREEDY",)), ("fp32", ()), ("bf16", ("LIMITED",))]
    chosen += [("bf16", ("NUCLEUS",)), ("fp32", ("LIMITED", "NUCLEUS", "MIN_P"))]
    for element, on in chosen:
        constants: dict[str, Any] = {flag: flag in on for flag in flags}
        constants["BLOCK"] = triton_sample.LARGEST_BLOCK
        constants["CAPACITY"] = triton_sample.LARGEST_BLOCK * triton_sample.LIST_BLOCKS
        yield Variant(
            "/".join(("sample_rows", element, *(flag.lower() for flag in on))),
            triton_sample.sample_rows,
            {**types, "logits": f"*{element}"},
            constants,
            triton_sample.WARPS,
        )
    types = {"keys": "*i64", "positions": "*i64", "uniforms": "*fp64"}
    constants = {"BLOCK": triton_random_keys.BLOCK}
    yield Variant("philox_uniforms", triton_random_keys.philox_uniforms, types, constants, 4)


def fused_rows() -> Iterator[Variant]:
    """The decoder's row kernels."""
    for residual, width, warps in (("bf16", 1024, 2), ("bf16", 8192, 16), ("fp32", 8192, 16)):
        types = dict.fromkeys(("delta", "weight", "out"), "*bf16")
        types |= {"residual": f"*{residual}", "eps": "fp32"}
        yield Variant(
            f"add_rms_norm_rows/{residual}/{width}",
            triton_fused_rows.add_rms_norm_rows,
            types,
            {"ADD": True, "BLOCK": width},
            warps,
        )
    tensors = ("qkv", "cos", "sin", "query", "key_pages", "value_pages", "q_norm_weight", "k_norm_weight")
    types = dict.fromkeys(tensors, "*bf16") | {"slots": "*i64", "eps": "fp32"}
    for norm in (False, True):
        constants = {"PAGE": 16, "HALF": 64, "NORM_Q": norm, "NORM_K": norm, "BLOCK_HALF": 64}
        constants["BLOCK_HEADS"] = triton_fused_rows.BLOCK_HEADS
        name = "rotate_and_store_rows" + ("/norm" if norm else "")
        yield Variant(name, triton_fused_rows.rotate_and_store_rows, types, constants, 1)
    types, constants = {"gate_up": "*bf16", "out": "*bf16"}, {"BLOCK": triton_fused_rows.BLOCK_CHANNELS}
    yield Variant("silu_mul_rows", triton_fused_rows.silu_mul_rows, types, constants, 4)


def head_rows() -> Iterator[Variant]:
    """The head's passes over rows of logits."""
    block, warps = triton_head_rows.LARGEST_BLOCK, triton_head_rows.WARPS
    state = dict.fromkeys(("tops", "totals", "weights", "target_logits", "lse"), "*fp32") | {"scale": "fp32"}
    for entropy in (False, True):
        suffix = "/entropy" if entropy else ""
        constants: dict[str, Any] = {"ENTROPY": entropy, "BLOCK": block}
        for element in ("bf16", "fp32"):
            types = {**state, "logits": f"*{element}", "targets": "*i64"}
            name = f"logprob_partials/{element}{suffix}"
            yield Variant(name, triton_head_rows.logprob_partials, types, constants, warps, resident=2)
        types = {**state, "logprobs": "*fp32", "entropies": "*fp32"}
        constants = {"ENTROPY": entropy, "BLOCK": triton_head_rows.MERGE_BLOCK}
        yield Variant(f"merge_logprobs{suffix}", triton_head_rows.merge_logprobs, types, constants, 4)
    for element, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
        types = {"logits": f"*{element}", "out": f"*{out}", "targets": "*i64"}
        types |= {"lse": "*fp32", "coefficients": "*fp32", "inverse_temperature": "fp32"}
        name = f"logit_gradients/{element}/{out}"
        yield Variant(name, triton_head_rows.logit_gradients, types, {"BLOCK": block}, warps, resident=2)


def linear_logprob() -> Iterator[Variant]:
    """The head's fused products: every tuning, plain and with all options."""
    fp32 = ("tops", "totals", "weights", "target_logits", "lse", "coefficients")
    for (architecture, size, few), tuning in triton_head_tiles.TUNINGS.items():
        element = {2: "bf16", 4: "fp32"}[size]
        types = dict.fromkeys(("hidden", "weight", "bias", "out"), f"*{element}") | dict.fromkeys(
            fp32, "*fp32"
        )
        types |= {"targets": "*i64", "scale": "fp32", "inverse_temperature": "fp32"}
        for options in (False, True):  # bias, entropy, a width that is no multiple of a tile's depth
            constants = {"BIAS": options, "PRECISION": "ieee", "EVEN": not options, "GROUP": tuning.group}
            constants |= {"BLOCK_M": tuning.tokens, "BLOCK_N": tuning.vocabulary, "BLOCK_K": tuning.depth}
            constants |= {"hidden_step": 1, "weight_step": 1}
            for name in ("logprob_tiles", "gradient_tiles"):
                kernel = getattr(triton_linear_logprob, name)
                more = {"ENTROPY": options} if name == "logprob_tiles" else {}
                yield Variant(
                    f"{name}/{element}/{'few' if few else 'many'}{'/options' if options else ''}",
                    kernel,
                    types,
                    {**constants, **more},
                    tuning.warps,
                    tuning.stages,
                    architectures=(architecture,),
                    matrix={80: "mma.sync", 90: "wgmma"} if size == 2 else None,
                    asynchronous=size == 2 and not options,
                )


def pair_loss() -> Iterator[Variant]:
    """The fused pair loss and its gradient, with cu_seqlens of both integer types."""
    scores = (
        "logprobs",
        "reference_logprobs",
        "losses",
        "sums",
        "chosen_rewards",
        "rejected_rewards",
        "margins",
    )
    fp32 = dict.fromkeys((*scores, "slopes", "grad_losses", "grad_sums", "gradient"), "*fp32")
    fp32 |= {"beta": "fp32", "smoothing": "fp32"}
    for index in ("i32", "i64"):
        types = {**fp32, "cu_seqlens": f"*{index}", "pairs": "*i64"}
        for loss in ("sigmoid", "ipo", "hinge"):
            constants: dict[str, Any] = {"LOSS": loss, "BLOCK": triton_dpo_loss.BLOCK_TOKENS}
            name = f"score_pairs/{loss}/{index}"
            yield Variant(name, triton_dpo_loss.score_pairs, types, constants, triton_dpo_loss.WARPS)
        constants = {"BLOCK": triton_dpo_loss.BLOCK_TOKENS, "BLOCK_PAIRS": triton_dpo_loss.BLOCK_PAIRS}
        yield Variant(
            f"spread_gradient/{index}",
            triton_dpo_loss.spread_gradient,
            types,
            constants,
            triton_dpo_loss.WARPS,
        )


def variants() -> list[Variant]:
    """All of them."""
    return [*attention(), *sampler(), *fused_rows(), *head_rows(), *linear_logprob(), *pair_loss()]
