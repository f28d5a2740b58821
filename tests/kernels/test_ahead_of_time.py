"""Every Triton kernel compiled for A100 (sm_80) and H100 (sm_90) without a GPU, as it is tuned: no spill, shared memory
within the device's, matrix instructions where matrices are multiplied. bf16, as on a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from metareward_kernels import (  # noqa: E402
    triton_fused_rows,
    triton_paged_attention,
    triton_random_keys,
    triton_sample,
)
from metareward_kernels.attention_tiles import COLUMNS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
pytestmark = pytest.mark.skipif(not CUOBJDUMP.is_file(), reason=f"{CUOBJDUMP} is missing")

ARCHITECTURES = [80, 90]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a multiprocessor, for programs
REGISTERS = 65536  # of a multiprocessor


class Compiled(NamedTuple):
    ptx: str
    registers: int
    shared: int


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    tmp_path: Path,
    *,
    warps: int,
    stages: int = 3,
) -> Compiled:
    """types: of the arguments; those not named are i32. Pointers and i32 are multiples of 16, as in real models."""
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name] == "i32" or signature[name].startswith("*"):
            attributes[index,] = [["tt.divisibility", 16]]
    where = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=where, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    assert (int(found[2]), int(found[3])) == (0, 0), f"spills: {found[0]}"
    assert built.metadata.shared <= SHARED_BYTES[architecture]
    return Compiled(built.asm["ptx"], int(found[1]), built.metadata.shared)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("tuned", "dim", "group"),
    [
        *((tuned, tuned[2], 4) for tuned in triton_paged_attention.TUNINGS),
        *(((2, wide, 64), 64, 3) for wide in (False, True)),  # SmolLM2
        *(((2, wide, 128), 80, 1) for wide in (False, True)),
    ],
)
def test_attention(
    tuned: tuple[int, bool, int], dim: int, group: int, architecture: int, tmp_path: Path
) -> None:
    element = {2: "*bf16", 4: "*fp32"}[tuned[0]]
    tuning = triton_paged_attention.TUNINGS[tuned]
    types = dict.fromkeys(("query", "key_pages", "value_pages"), element)
    types |= dict.fromkeys(("page_ids", "entry_rows", "limits", "tiles", "entry_slots"), "*i32")
    types |= {"partial_values": "*fp32", "partial_lse": "*fp32", "score_scale": "fp32"}
    constants = {
        "PAGE": 16,
        "GROUP": group,
        "DIM": dim,
        "COLUMNS": COLUMNS,
        "BLOCK_M": tuning.stacked,
        "BLOCK_N": tuning.tokens,
        "BLOCK_D": tuned[2],
    }
    built = compiled(
        triton_paged_attention.attend_tiles,
        types,
        constants,
        architecture,
        tmp_path,
        warps=tuning.warps,
        stages=tuning.stages,
    )
    if tuned[0] == 2:
        matrix = r"wgmma\.mma_async" if architecture == 90 and tuned[1] else r"mma\.sync"
        assert re.search(matrix, built.ptx)
        assert "cp.async.cg.shared.global" in built.ptx  # pages are fetched ahead, 16 bytes a thread
        assert 2 * built.registers * 32 * tuning.warps <= REGISTERS
        assert 2 * built.shared <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 128])
def test_merge(dim: int, architecture: int, tmp_path: Path) -> None:
    types = {"partial_values": "*fp32", "partial_lse": "*fp32", "merge_starts": "*i32", "out": "*bf16"}
    constants = {"DIM": dim, "BLOCK_H": triton_paged_attention.BLOCK_HEADS, "BLOCK_D": dim}
    compiled(triton_paged_attention.merge_slots, types, constants, architecture, tmp_path, warps=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("logits", "flags"),
    [
        ("*bf16", ("GREEDY",)),
        ("*fp32", ()),
        ("*bf16", ("LIMITED",)),
        ("*bf16", ("NUCLEUS",)),
        ("*fp32", ("LIMITED", "NUCLEUS", "MIN_P")),
    ],
)
def test_sample(logits: str, flags: tuple[str, ...], architecture: int, tmp_path: Path) -> None:
    types = {"logits": logits, "uniforms": "*fp64", "tokens": "*i64", "list_ids": "*i32"}
    types |= dict.fromkeys(("logprobs", "kept_logprobs", "list_values"), "*fp32")
    types |= dict.fromkeys(("temperature_bits", "top_p_bits", "min_p_bits"), "i64")
    constants: dict[str, Any] = {name: name in flags for name in ("GREEDY", "LIMITED", "NUCLEUS", "MIN_P")}
    constants["BLOCK"] = triton_sample.LARGEST_BLOCK
    constants["CAPACITY"] = triton_sample.LARGEST_BLOCK * triton_sample.LIST_BLOCKS
    compiled(triton_sample.sample_rows, types, constants, architecture, tmp_path, warps=triton_sample.WARPS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_uniforms(architecture: int, tmp_path: Path) -> None:
    types = {"keys": "*i64", "positions": "*i64", "uniforms": "*fp64"}
    constants = {"BLOCK": triton_random_keys.BLOCK}
    compiled(triton_random_keys.philox_uniforms, types, constants, architecture, tmp_path, warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_rows(architecture: int, tmp_path: Path) -> None:
    types = dict.fromkeys(("residual", "delta", "weight", "out"), "*bf16") | {"eps": "fp32"}
    for residual, width, warps in (("*bf16", 1024, 2), ("*bf16", 8192, 16), ("*fp32", 8192, 16)):
        constants: dict[str, Any] = {"ADD": True, "BLOCK": width}
        types["residual"] = residual
        compiled(triton_fused_rows.add_rms_norm_rows, types, constants, architecture, tmp_path, warps=warps)
    tensors = ("qkv", "cos", "sin", "query", "key_pages", "value_pages", "q_norm_weight", "k_norm_weight")
    types = dict.fromkeys(tensors, "*bf16") | {"slots": "*i64", "eps": "fp32"}
    for norm in (False, True):
        constants = {"PAGE": 16, "HALF": 64, "NORM_Q": norm, "NORM_K": norm, "BLOCK_HALF": 64}
        constants["BLOCK_HEADS"] = triton_fused_rows.BLOCK_HEADS
        compiled(triton_fused_rows.rotate_and_store_rows, types, constants, architecture, tmp_path, warps=1)
    types = {"gate_up": "*bf16", "out": "*bf16"}
    constants = {"BLOCK": triton_fused_rows.BLOCK_CHANNELS}
    compiled(triton_fused_rows.silu_mul_rows, types, constants, architecture, tmp_path, warps=4)
