"""The head's kernels on a GPU: correctness first, then time and memory at Llama-3-8B and SmolLM2 shapes.

    python bench/gpu_kernels.py

Runs the kernel tests on the GPU, then the grid of bench.kernels in bf16 up to 16,384 tokens, 4,096 hidden units and
128,256 words, and writes bench/results/DEVICE-kernels.json, in less than ten minutes. Beside the methods of bench.kernels
it times ours under forced implementations, so that the choice between cuBLAS with row kernels and a Triton product that
ends in the row pass is one by measurement.

A failed test does not end the run: the file says so, every method is compared with the reference on the grid's own inputs
before it is timed, and the exit status is 1.

Needs a checkout, PyTorch, Triton, NumPy and pytest; peers that are not installed get a row that says so. Draw the file with
bench/head_plot.py. Not yet run on a GPU. `--device cpu --shapes small --no-tests` runs the rest of it on a CPU, for its
test only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # run from a checkout that is not installed
    for folder in (".", "kernels"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from metareward_kernels.head_rows import logprob_rows
from metareward_kernels.linear_fp32 import linear_fp32

from bench.head_grid import Cell, Row
from bench.head_inputs import Inputs, Shape
from bench.head_methods import (
    HEAD_OPS,
    METHODS,
    OURS,
    Call,
    Method,
    Unavailable,
    both_ops,
    installed,
    our_linear_logprob,
    our_preference,
)
from bench.head_peers import PEERS
from bench.head_run import make_cells, run, wrong_of_ours
from bench.record import ROOT, check_writable, file_words
from metareward.errors import UserError

SHAPES = {
    "all": [
        *(Shape(tokens, 576, 49152) for tokens in (2048, 8192)),
        *(Shape(tokens, 4096, 128256) for tokens in (2048, 4096, 8192, 16384)),
    ],
    "small": [Shape(256, 64, 1280)],
}
CHUNK = 4096
# Neither of them touches the GPU: one is the interpreter, the other compiles for GPUs that need not be there.
WITHOUT_GPU = ("test_interpreter.py", "test_ahead_of_time.py")


def rows_after_product(inputs: Inputs) -> Call:
    """cuBLAS products with fp32 results, a chunk of tokens at a time, and the row kernel: forward alone."""
    if inputs.hidden.requires_grad:
        raise Unavailable("forward alone; linear_preference is its training pass")
    leaves = (inputs.hidden, inputs.weight)

    def logprobs() -> Tensor:
        found = [
            logprob_rows(linear_fp32(hidden, inputs.weight), targets).logprobs
            for hidden, targets in zip(inputs.hidden.split(CHUNK), inputs.targets.split(CHUNK), strict=True)
        ]
        return torch.cat(found)

    return Call(logprobs, leaves)


def forced_methods() -> list[Method]:
    """Ours under forced implementations."""
    found = [
        Method("linear_fp32 + logprob_rows, chunked", "logprob", rows_after_product, OURS, HEAD_OPS[2:]),
    ]
    for choice in ("triton", "torch"):
        found += both_ops(
            f"linear_logprob, {choice} forced",
            our_linear_logprob,
            package=OURS,
            reported=("linear_logprob",),
            forced=choice,
        )
        found.append(
            Method(
                f"linear_preference, {choice} forced",
                "preference",
                our_preference,
                OURS,
                ("head_rows",),
                forced=choice,
            )
        )
    return found


def run_tests(seconds: float) -> dict[str, Any]:
    """The kernel tests that use the GPU, in a process of their own; what ran, how it ended, and pytest's last line."""
    ignored = [f"--ignore=tests/kernels/{name}" for name in WITHOUT_GPU]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreter", "tests/kernels", *ignored]
    found: dict[str, Any] = {"command": " ".join(("python", *command))}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {**found, "passed": False, "summary": f"not done after {seconds:.0f} s", "output": ""}
    passed = done.returncode == 0
    return {
        **found,
        "passed": passed,
        "summary": (done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]])[-1],
        "seconds": perf_counter() - start,
        "output": "" if passed else done.stdout[-8000:],
    }


def benchmark(
    *,
    shapes: str = "all",
    device: str = "cuda",
    rounds: int = 7,
    minutes: float = 5.0,
    tests: bool = True,
    out: Path = ROOT / "bench" / "results",
    seed: int = 0,
) -> bool:
    """Test, measure and write DEVICE-kernels.json; whether everything of ours was right.

    Args:
        shapes: Of SHAPES.
        device: Where to run, "cuda" (in bf16) or "cpu" (in fp32).
        rounds: How often each method is timed at most; the median counts.
        minutes: For the grid; the tests have four of their own.
        tests: Run the kernel tests first.
        out: The folder for the file.
        seed: Of the inputs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device: run this on a GPU machine, or give --device cpu --shapes small --no-tests"
        )
    if rounds < 1 or not minutes > 0:
        raise UserError(f"--rounds is {rounds} and --minutes {minutes}: give 1 or more, and more than 0")
    if tests and installed("pytest") is None:
        raise UserError("pytest is not installed: pip install pytest, or give --no-tests")
    suffix = "kernels" if shapes == "all" else f"{shapes}-kernels"
    path = out / f"{file_words(device)}-{suffix}.json"
    check_writable(path)
    tested = run_tests(240.0) if tests else {"passed": None, "summary": "not run: --no-tests"}
    print(f"tests: {tested['summary']}", flush=True)
    methods = [*METHODS, *forced_methods(), *PEERS]
    if device == "cpu":
        methods = [method for method in methods if not method.compiled]
    record = run(
        make_cells(SHAPES[shapes], ["bf16" if device == "cuda" else "fp32"], device),
        methods,
        path,
        rounds=rounds,
        minutes=minutes,
        seed=seed,
        tell=lambda cell, rows: print(table(cell, rows), flush=True),
        tests=tested,
    )
    print(f"wrote {path}")
    wrong = wrong_of_ours(record["rows"])
    for name in wrong:
        print(f"wrong results of {name}: see the reasons in {path}", file=sys.stderr)
    return not wrong and tested["passed"] is not False


def table(cell: Cell, rows: Sequence[Row]) -> str:
    """A cell in plain text, the fastest first."""
    T, H, V = cell.shape.tokens, cell.shape.hidden, cell.shape.vocabulary
    flop = cell.products * cell.shape.product_flop()
    lines = [f"\n{cell.op}, {cell.pass_}, {cell.dtype}, T {T:,}, H {H:,}, V {V:,}"]
    for row in sorted(rows, key=lambda row: row["ms"] or float("inf")):
        if row["ms"] is None:
            lines.append(f"  {row['method']:<52}{row['reason']}")
            continue
        rate = flop / row["ms"] / 1e9
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(
            f"  {row['method']:<52}{row['ms']:>10.2f} ms {row['limit_ratio']:>6.2f} of limit {rate:>7.1f} TFLOP/s {peak:>10}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    # Not tyro, as elsewhere: a bare GPU machine may not have it.
    parser = argparse.ArgumentParser(
        description="Test and measure the head's kernels, write DEVICE-kernels.json."
    )
    parser.add_argument("--shapes", choices=list(SHAPES), default="all", help="the grid")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where to run")
    parser.add_argument("--rounds", type=int, default=7, help="each method is timed so often at most")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="for the grid; the tests have four of their own"
    )
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the kernel tests out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the file")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    try:
        right = benchmark(**vars(parser.parse_args(arguments)))
    except UserError as error:
        print(f"gpu_kernels: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
