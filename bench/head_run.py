"""A whole run of the head benchmark: the cells of a grid, and the record that grows from cell to cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.head_grid import Cell, Pass, Row, measure_grid
from bench.head_inputs import BETA, Shape
from bench.head_methods import Method, Op, installed
from bench.head_peers import PEERS
from bench.record import environment, write_json

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
    **fields: Any,
) -> dict[str, Any]:
    """Measure and return the record, with `fields` added; the file is written anew after every cell."""
    record: dict[str, Any] = {
        **environment(),
        **fields,
        "peers": {package: installed(package) for package in dict.fromkeys(peer.package for peer in PEERS)},
        "pair_loss": f"sigmoid, beta {BETA}, references 0",
        "limit": "torch.mm into existing buffers: 1 product forward, 3 forward+backward",
        "rounds": rounds,
        "minutes": minutes,
        "complete": False,
        "rows": [],
    }

    def after_cell(cell: Cell, rows: list[Row]) -> None:
        record["rows"] += rows
        write_json(path, record)
        tell(cell, rows)

    measure_grid(cells, methods, rounds=rounds, seconds=60 * minutes, seed=seed, after_cell=after_cell)
    record["complete"] = True
    write_json(path, record)
    return record


def wrong_of_ours(rows: Sequence[Row]) -> list[str]:
    """Methods of ours that some cell found wrong."""
    return list(dict.fromkeys(row["method"] for row in rows if row["ours"] and row["wrong"]))
