"""A whole run of the head benchmark: the cells of a grid, and the record that grows from cell to cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.head_grid import Cell, Pass, Row, measure_grid
from bench.head_inputs import BETA, Shape
from bench.head_methods import Method, Op, installed
from bench.head_peers import PEERS
from bench.record import environment, write_json
from metareward.errors import UserError

PASSES: tuple[tuple[Op, Pass], ...] = (
    ("logprob", "forward"),
    ("logprob", "forward+backward"),
    ("preference", "forward+backward"),
)


def make_cells(shapes: Sequence[Shape], dtypes: Sequence[str], device: str) -> list[Cell]:
    return [
        Cell(op, pass_, dtype, shape, device) for op, pass_ in PASSES for dtype in dtypes for shape in shapes
    ]


def run(
    cells: Sequence[Cell],
    methods: Sequence[Method],
    path: Path,
    *,
    rounds: int,
    minutes: float,
    seed: int,
    tell: Callable[[Cell, list[Row]], None],
    add: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    """Measure and return the record, with `fields` added; the file is written anew after every cell.

    `add` keeps the file's rows of other cells: what was measured on one machine may be measured part by part.

    Raises:
        UserError: with `add`, when the file's rows come from another machine, commit or version of a package.
    """
    record: dict[str, Any] = {
        **environment(),
        **fields,
        "peers": {package: installed(package) for package in dict.fromkeys(peer.package for peer in PEERS)},
        "pair_loss": f"sigmoid, beta {BETA}, references 0",
        "limit": "torch.mm into existing buffers: 1 product forward, 3 forward+backward",
        "rounds": rounds,
        "minutes": minutes,
        "complete": False,
        "rows": rows_to_keep(path, cells) if add else [],
    }

    def after_cell(cell: Cell, rows: list[Row]) -> None:
        record["rows"] += rows
        write_json(path, record)
        tell(cell, rows)

    measure_grid(cells, methods, rounds=rounds, seconds=60 * minutes, seed=seed, after_cell=after_cell)
    record["complete"] = True
    write_json(path, record)
    return record


def rows_to_keep(path: Path, cells: Sequence[Cell]) -> list[Row]:
    """The file's rows of cells other than these; none where there is no file."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = record["rows"]
        names = [(row["op"], row["pass"], row["dtype"], row["T"], row["H"], row["V"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of this benchmark: leave out --add, or name another") from None
    now = environment()
    for field in ("machine", "versions", "commit"):
        if record.get(field) != now[field]:
            raise UserError(
                f"the rows in {path} were measured with another {field} ({record.get(field)}, now {now[field]}): "
                "leave out --add to measure all of them anew, or name another file"
            )
    new = {
        (cell.op, cell.pass_, cell.dtype, cell.shape.tokens, cell.shape.hidden, cell.shape.vocabulary)
        for cell in cells
    }
    return [row for row, name in zip(rows, names, strict=True) if name not in new]


def wrong_of_ours(rows: Sequence[Row]) -> list[str]:
    """Methods of ours that some cell found wrong."""
    return list(dict.fromkeys(row["method"] for row in rows if row["ours"] and row["wrong"]))
