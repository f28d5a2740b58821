"""Every Triton kernel compiled for A100 (sm_80) and H100 (sm_90) without a GPU, as it is tuned: no spill, shared memory
within the device's, matrix instructions where matrices are multiplied, and nothing worse than bench/results/aot.json.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import metareward_kernels
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from bench.aot import (  # noqa: E402
    CUOBJDUMP,
    SHARED_BYTES,
    Row,
    broken_limits,
    build,
    measure,
    regressions,
    resident,
)
from bench.aot_variants import Variant, variants  # noqa: E402

RECORDED = json.loads((Path(__file__).parents[2] / "bench/results/aot.json").read_text())
ROWS = {(row["kernel"], row["architecture"]): Row(**row) for row in RECORDED["kernels"]}
VARIANTS = variants()
CASES = [(variant, architecture) for variant in VARIANTS for architecture in variant.architectures]
REMEDY = "if it is meant, run `python -m bench.aot --json bench/results/aot.json` and commit the table"


@pytest.mark.skipif(not CUOBJDUMP.is_file(), reason=f"{CUOBJDUMP} is missing")
@pytest.mark.parametrize(
    ("variant", "architecture"), [pytest.param(*case, id=f"{case[0].name}-sm_{case[1]}") for case in CASES]
)
def test_compiles_within_the_limits(variant: Variant, architecture: int) -> None:
    built = build(variant, architecture)
    row = measure(variant, architecture, built)
    assert broken_limits(variant, row) == []
    if variant.asynchronous:
        assert "cp.async.cg.shared.global" in built.asm["ptx"]  # fetched ahead, 16 bytes a thread
    if RECORDED["triton"] == triton.__version__:
        assert regressions(row, ROWS[variant.name, architecture]) == [], REMEDY


@pytest.mark.parametrize(
    ("name", "ones"),
    [
        ("logprob_partials/fp32/entropy", ("rows", "vocabulary", "row_stride")),
        ("merge_logprobs/entropy", ("tokens", "splits")),
        ("logit_gradients/fp32/fp32", ("vocabulary", "row_stride", "out_stride")),
        ("logprob_tiles/fp32/few/options", ("tokens", "vocabulary", "width", "hidden_row", "weight_row")),
        ("gradient_tiles/fp32/few", ("tokens", "slab_end", "width", "hidden_row", "weight_row", "out_row")),
    ],
)
def test_arguments_of_one_are_constants(name: str, ones: tuple[str, ...]) -> None:
    # At launch Triton makes a constant of every integer that is 1, which the interpreter does not: one token, V = 1.
    variant = next(variant for variant in VARIANTS if variant.name == name)
    assert set(ones) <= set(variant.kernel.arg_names)
    constants = {**variant.constants, **dict.fromkeys(ones, 1)}
    assert build(variant._replace(constants=constants), variant.architectures[0]).asm["ptx"]


def test_the_table_is_of_these_kernels() -> None:
    assert list(ROWS) == [(variant.name, architecture) for variant, architecture in CASES], REMEDY


def test_no_kernel_is_left_out() -> None:
    launched = set()
    for source in sorted(Path(metareward_kernels.__file__).parent.glob("triton_*.py")):
        module, text = importlib.import_module(f"metareward_kernels.{source.stem}"), source.read_text()
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and f"{name}[" in text:
                launched.add(name)
    assert len(launched) > 5
    assert launched == {variant.kernel.__name__ for variant in VARIANTS}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"resident": 1, "registers": 200},
            "1 programs fit a multiprocessor, not 2; 128 registers are now 200",
        ),
        ({"shared_bytes": 50000}, "40000 shared bytes are now 50000"),
        ({"instructions": 1300}, "1000 instructions are now 1300"),
        ({"registers": 130, "shared_bytes": 43000, "instructions": 1200}, None),
    ],
)
def test_a_regression_is_seen(changes: dict[str, Any], complaint: str | None) -> None:
    recorded = Row("k", 90, 4, 128, 40000, 0, 1000, "wgmma", 2)
    assert regressions(recorded._replace(**changes), recorded) == ([] if complaint is None else [complaint])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": SHARED_BYTES[90] + 16}, "shared bytes"),
        ({"matrix": "mma.sync"}, "multiplies by mma.sync, not wgmma"),
        ({"resident": 1}, "1 programs fit"),
    ],
)
def test_a_broken_limit_is_seen(changes: dict[str, Any], complaint: str) -> None:
    variant = Variant("k", None, {}, {}, 4, matrix={90: "wgmma"}, resident=2)
    row = Row("k", 90, 4, 128, 40000, 0, 1000, "wgmma", 2)
    assert broken_limits(variant, row) == []
    assert len(broken_limits(variant, row._replace(**changes))) == 1
    assert complaint in broken_limits(variant, row._replace(**changes))[0]


def test_programs_that_fit_a_multiprocessor() -> None:
    # By hand: 65,536 registers over 8 warps of 32 threads are 256 a thread; 128 let two programs in, 129 (rounded up to
    # 136) one. 228 KiB hold one program of 192 KiB.
    assert resident(90, 8, 128, 0) == 2
    assert resident(90, 8, 129, 0) == 1
    assert resident(90, 4, 128, 192 << 10) == 1
    assert resident(80, 16, 32, 0) == 4  # 64 warps
    assert resident(80, 1, 16, 0) == 32  # the most programs
