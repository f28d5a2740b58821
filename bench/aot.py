"""What the compiler makes of every Triton kernel for A100 (sm_80) and H100 (sm_90), without a GPU.

    python -m bench.aot --json bench/results/aot.json

writes, a row a kernel and architecture: registers a thread, shared bytes a program, spilled bytes, SASS instructions,
the matrix instruction, and how many programs fit a multiprocessor. tests/kernels/test_ahead_of_time.py compares with
that file. Needs triton and the tools in its wheel; numbers depend on triton's version, which is recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot_variants import Variant, variants

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a program can have
SHARED_OF_PROCESSOR = {80: 164 << 10, 90: 228 << 10}  # each program takes 1 KiB more than it asks for
REGISTERS = 65536  # of a multiprocessor; a warp gets them in units of 256
WARPS = 64  # of a multiprocessor
PROGRAMS = 32  # of a multiprocessor
SHARED_GROWTH = 1.1  # of the recorded shared memory, beyond which a change is a regression
INSTRUCTION_GROWTH = 1.25


class Row(NamedTuple):
    """One kernel on one architecture."""

    kernel: str
    architecture: int
    warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    instructions: int
    matrix: str | None
    resident: int  # programs that fit a multiprocessor together


def resident(architecture: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Programs that a multiprocessor holds at once: its registers, warps and shared memory divided among them."""
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // warps
    by_shared = SHARED_OF_PROCESSOR[architecture] // (shared_bytes + 1024)
    return min(by_registers, by_shared, WARPS // warps, PROGRAMS)


def build(variant: Variant, architecture: int) -> Any:
    """Triton's compiled kernel; its `asm` holds ttir, ptx and cubin."""
    kernel = variant.kernel
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in variant.constants else variant.types.get(name, "i32")
        if signature[name] == "i32" or signature[name].startswith("*"):
            attributes[index,] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True},
    )


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(variant: Variant, architecture: int, built: Any) -> Row:
    """The row of a compiled kernel. Raises ValueError where the tools' output has another form."""
    cubin, ptx = built.asm["cubin"], built.asm["ptx"]
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump(cubin, "-res-usage"))
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", _dump(cubin, "-sass"), re.MULTILINE))
    if usage is None or instructions == 0:
        raise ValueError(
            f"cannot read what {CUOBJDUMP} prints: use the one of triton {triton.__version__}'s wheel"
        )
    registers, stack, local = (int(number) for number in usage.groups())
    shared = built.metadata.shared
    return Row(
        variant.name,
        architecture,
        variant.warps,
        registers,
        shared,
        stack + local,
        instructions,
        "wgmma" if "wgmma.mma_async" in ptx else "mma.sync" if "mma.sync" in ptx else None,
        resident(architecture, variant.warps, registers, shared),
    )


def broken_limits(variant: Variant, row: Row) -> list[str]:
    """What a kernel must not do on any version of triton, and does."""
    matrix = (variant.matrix or {}).get(row.architecture)
    found = {
        f"spills {row.spilled_bytes} bytes": row.spilled_bytes > 0,
        f"takes {row.shared_bytes} shared bytes": row.shared_bytes > SHARED_BYTES[row.architecture],
        f"multiplies by {row.matrix}, not {matrix}": row.matrix != matrix,
        f"{row.resident} programs fit a multiprocessor, not {variant.resident}": row.resident
        < variant.resident,
    }
    return [reason for reason, is_so in found.items() if is_so]


def regressions(row: Row, recorded: Row) -> list[str]:
    """In what a kernel is worse than it was, with the same triton: fewer programs fit a multiprocessor (more registers
    that cross no such step are none), shared memory or code grew beyond the margins above.
    """
    found = []
    if row.resident < recorded.resident:
        cause = f"{recorded.registers} registers are now {row.registers}"
        found.append(f"{row.resident} programs fit a multiprocessor, not {recorded.resident}; {cause}")
    if row.shared_bytes > recorded.shared_bytes * SHARED_GROWTH:
        found.append(f"{recorded.shared_bytes} shared bytes are now {row.shared_bytes}")
    if row.instructions > recorded.instructions * INSTRUCTION_GROWTH:
        found.append(f"{recorded.instructions} instructions are now {row.instructions}")
    return found


def table() -> dict[str, Any]:
    """Every variant on its architectures, in the order of the list."""
    rows = []
    for variant in variants():
        for architecture in variant.architectures:
            row = measure(variant, architecture, build(variant, architecture))
            if broken := broken_limits(variant, row):
                raise ValueError(f"{variant.name} on sm_{architecture}: {', '.join(broken)}")
            print(*row, sep="  ", flush=True)
            rows.append(row._asdict())
    return {"triton": triton.__version__, "kernels": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the table")
    arguments = parser.parse_args()
    found = table()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(row) for row in found["kernels"])
    arguments.json.write_text(f'{{\n  "triton": "{found["triton"]}",\n  "kernels": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
