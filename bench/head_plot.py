"""Time and peak memory of the head benchmark against T, our lines and the others'.

    python bench/head_plot.py FILE.json        draws FILE.svg, here or from a file that another machine wrote

Needs matplotlib, of the extra: pip install "metareward[bench]".
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metareward.errors import UserError

Row = dict[str, Any]


def check_available() -> None:
    """Raises UserError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('matplotlib is not installed: pip install "metareward[bench]", or give --no-plot')


def draw(record: dict[str, Any], path: Path) -> Path:
    """Draw the rows of a record: a column an op and pass; for each dtype, H and V a row of time and one of memory."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if row["ms"] is not None]
    if not rows:
        raise UserError("nothing was timed, so there is nothing to draw")
    columns = list(dict.fromkeys((row["op"], row["pass"]) for row in record["rows"]))
    groups = list(dict.fromkeys((row["dtype"], row["H"], row["V"]) for row in record["rows"]))
    styles = line_styles(rows)
    figure = Figure(figsize=(8.4 * len(columns), 8.4 * len(groups)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2 * len(groups), len(columns), squeeze=False)
    for g, group in enumerate(groups):
        for c, column in enumerate(columns):
            here = [
                row
                for row in rows
                if (row["op"], row["pass"]) == column and (row["dtype"], row["H"], row["V"]) == group
            ]
            title = f"{column[0]}, {column[1]}\n{group[0]}, H {group[1]:,}, V {group[2]:,}"
            draw_cells(axes[2 * g][c], here, styles, "ms", "ms", 1.0)
            axes[2 * g][c].set_title(title)
            draw_cells(axes[2 * g + 1][c], here, styles, "peak_bytes", "peak MB above the inputs", 1e-6)
    machine = record["machine"]
    name = machine.get("gpu", machine["cpu"])
    figure.suptitle(f"{name}, torch {record['versions']['torch']}, {record['date'][:10]}")
    figure.savefig(path)
    return path


def base_name(method: str) -> str:
    """A method for both ops has one look."""
    return method.removesuffix(" + pair loss")


def line_styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By base name: ours wide with five colours of their own, the others thin with the other five."""
    styles: dict[str, dict[str, Any]] = {}
    for ours in (True, False):
        names = dict.fromkeys(base_name(row["method"]) for row in rows if row["ours"] == ours)
        for place, name in enumerate(names):
            styles[name] = {
                "color": f"C{place % 5 + (0 if ours else 5)}",
                "linestyle": ("-", "--", ":")[place // 5 % 3],
                "linewidth": 2.6 if ours else 1.0,
                "marker": "o" if ours else "x",
            }
    return styles


def draw_cells(
    axes: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]], field: str, label: str, scale: float
) -> None:
    """Lines of one figure; the limit is black. The legend stands beside the figure of time."""
    for name in dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: not row["ours"])):
        points = sorted(
            (row["T"], row[field] * scale) for row in rows if row["method"] == name and row[field] is not None
        )
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                **styles[base_name(name)],
            )
    limits = sorted({row["T"]: row["limit_ms"] for row in rows}.items())
    if field == "ms" and limits:
        axes.plot(*zip(*limits, strict=True), label="bare matrix products", color="black", linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["T"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3, which="both")
    if field == "ms" and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if len(given) != 1 or not Path(given[0]).is_file():
            raise UserError("give the JSON file of a run of bench.kernels or gpu_kernels")
        check_available()
        path = Path(given[0])
        print(f"wrote {draw(json.loads(path.read_text(encoding='utf-8')), path.with_suffix('.svg'))}")
    except UserError as error:
        print(f"head_plot: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
