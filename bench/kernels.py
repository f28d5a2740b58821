"""The head's ops against plain PyTorch, PyTorch's own fused loss, Liger, cut-cross-entropy and TRL, in one run.

    python -m bench.kernels --json FILE.json [--tokens 2048 8192] [--dtype bf16 fp32] [--device cuda] [--quick]

A row a method and cell: time, peak memory above the inputs, and the time over that of the bare matrix products of the
pass (`limit_ratio`), measured in between. A method that cannot run here has a row too, with the reason. The peers and
the plot come from the extra: pip install "metareward[bench]". A plot is written beside the file, as FILE.svg.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench import head_plot
from bench.head_grid import Cell, Row
from bench.head_inputs import Inputs, Shape, check_shape
from bench.head_methods import METHODS, Call, Method, Op, Unavailable
from bench.head_peers import PEERS
from bench.head_run import make_cells, run, wrong_of_ours
from bench.record import check_writable
from metareward.cli import fail
from metareward.errors import UserError

QUICK = Shape(tokens=128, hidden=64, vocabulary=1280)


def benchmark(
    *,
    json: Path,
    tokens: tuple[int, ...] = (2048, 8192),
    hidden: int = 576,
    vocabulary: int = 49152,
    dtype: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32"),
    op: tuple[Op, ...] = ("logprob", "preference"),
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 5,
    minutes: float = 9.0,
    quick: bool = False,
    compiled: bool = True,
    plot: bool = True,
    seed: int = 0,
    add: bool = False,
) -> None:
    """Measure log-probs and preference loss, ours and others'.

    Args:
        json: The file for the results; complete after the last cell, and there after the first.
        tokens: How many tokens, T; each a column of the plot.
        hidden: Size of a hidden state, H.
        vocabulary: Words, V.
        dtype: Of hidden states and weight.
        op: Per-token log-probs (forward, and with backward), the preference loss (forward and backward), or both.
        device: Where all run.
        rounds: How often each method is timed at most; the median counts.
        minutes: The time for everything; dear cells get fewer rounds when it is short, and the file says how many.
        quick: Sizes that take seconds, to try the benchmark itself; `tokens`, `hidden` and `vocabulary` are left aside.
        compiled: Also run what goes through torch.compile, which takes seconds to minutes for each at the first call.
        plot: Draw FILE.svg too.
        seed: Of the inputs.
        add: Keep the rows that FILE has of other cells, measured on this machine and commit: a long grid in parts.
    """
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: set 1 or more")
    if not minutes > 0:
        raise UserError(f"--minutes is {minutes}: give more than 0")
    if not tokens or not dtype or not op:
        raise UserError("--tokens, --dtype or --op names nothing: give one or more, or leave it out")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and there is no CUDA device: leave it out")
    shapes = [Shape(count, hidden, vocabulary) for count in dict.fromkeys(tokens)]
    if quick:
        shapes = [replace(QUICK, tokens=times * QUICK.tokens) for times in (1, 2)]
    for shape in shapes:
        check_shape(shape)
    if json.suffix != ".json":
        raise UserError(f"{json} does not end in .json: the plot lies beside it under the same name")
    check_writable(json)
    if plot:
        head_plot.check_available()
    quiet_peers()
    cells = [cell for cell in make_cells(shapes, list(dict.fromkeys(dtype)), device) if cell.op in op]
    methods = [
        method if compiled or not method.compiled else leave_out(method) for method in (*METHODS, *PEERS)
    ]
    record = run(cells, methods, json, rounds=rounds, minutes=minutes, seed=seed, tell=tell, add=add)
    print_table(record["rows"])
    if plot:
        print(f"wrote {json} and {head_plot.draw(record, json.with_suffix('.svg'))}")
    wrong = wrong_of_ours(record["rows"])
    if wrong:
        raise UserError(f"wrong results of our own, see the reasons in {json}: {', '.join(wrong)}")


def tell(cell: Cell, rows: list[Row]) -> None:
    """One line a cell, while the rest is running."""
    done = [row for row in rows if row["ms"] is not None]
    best = min(done, key=lambda row: row["ms"], default=None)
    fastest = "nothing timed" if best is None else f"fastest {best['method']}, {best['ms']:.1f} ms"
    name = f"{cell.op}, {cell.pass_}, {cell.dtype}, T {cell.shape.tokens}"
    print(f"{name}: {len(done)} of {len(rows)} timed; {fastest}", flush=True)


def leave_out(method: Method) -> Method:
    """The same with a row that says why it was not run."""

    def refuse(inputs: Inputs) -> Call:
        raise Unavailable("left out by --no-compiled")

    return replace(method, prepare=refuse)


def quiet_peers() -> None:
    """Peers log and warn while they load and compile; what matters goes into their rows."""
    for noisy in ("torch", "transformers", "httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|trl|liger_kernel|cut_cross_entropy)\b.*")


def print_table(rows: Sequence[Row]) -> None:
    """A table a cell, the fastest first; what could not run comes last, with the reason."""
    console = Console(width=130)
    cells = dict.fromkeys(cell_key(row) for row in rows)
    for key in cells:
        here = [row for row in rows if cell_key(row) == key]
        op, pass_, dtype, T, H, V = key
        table = Table("method", "ms", "of limit", "peak MB", "rounds", title_justify="left")
        table.title = f"{op}, {pass_}, {dtype}, T {T:,}, H {H:,}, V {V:,}"
        for row in sorted(here, key=lambda row: row["ms"] or float("inf")):
            name = f"[bold]{row['method']}[/bold]" if row["ours"] else row["method"]
            if row["ms"] is None:
                table.add_row(name, f"[dim]{row['reason']}[/dim]")
                continue
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
            table.add_row(
                name, f"{row['ms']:.1f}", f"{row['limit_ratio']:.2f}", peak, str(len(row["rounds_ms"]))
            )
        console.print(table)


def cell_key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "pass", "dtype", "T", "H", "V"))


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tyro.cli(benchmark, prog="python -m bench.kernels", args=arguments)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
