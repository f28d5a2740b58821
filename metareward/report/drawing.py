"""Charts as SVG text that takes its colours from the page, so that one drawing serves light and dark.

matplotlib draws with stand-in colours, each of which is replaced by a CSS variable. Text stays text. Legends belong to the page:
they must wrap on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from metareward.errors import UserError

SERIES_COLOURS, RAMP_COLOURS = 8, 5
INK, MUTED, GRID, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
SERIES = tuple(f"#0b00{index:02x}" for index in range(SERIES_COLOURS))
"""For things of different kinds."""
RAMP = tuple(f"#0c00{index:02x}" for index in range(RAMP_COLOURS))
"""For one thing after another, pale to strong."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"}
VARIABLES |= {colour: f"--series-{index}" for index, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"--ramp-{index}" for index, colour in enumerate(RAMP)}

# Inches at 72 points: about as wide as a phone, so that the letters keep their size there.
WIDTH, HEIGHT = 4.7, 2.7
Values = Sequence[float | None]
Estimate = tuple[float, float | None, float | None]
"""A figure with the ends of its interval, None where it has none."""
LINE_POINTS = 300


def variable(colour: str) -> str:
    """The CSS value of a stand-in colour."""
    return f"var({VARIABLES[colour]})"


def ramp(count: int) -> list[str]:
    """`count` colours along the ramp, the last the strongest."""
    if count == 1:
        return [RAMP[-1]]
    return [RAMP[round(index * (len(RAMP) - 1) / (count - 1))] for index in range(count)]


def require_matplotlib() -> None:
    """Raises:
    UserError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "the report needs matplotlib: pip install 'metareward[report]', then `metareward report RUN`"
        ) from None


class Canvas:
    """One chart while it is drawn; `svg` is the result."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.svg = ""


@contextmanager
def canvas(height: float = HEIGHT) -> Iterator[Canvas]:
    """Axes in the page's style."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        # Else the ids in the file would differ from run to run.
        "svg.hashsalt": "metareward",
        "font.size": 10.5,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        drawn = Canvas(figure.add_subplot())
        yield drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.svg = themed(buffer.getvalue())


def themed(svg: str) -> str:
    """The drawing without its XML head and metadata, with variables for colours and the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var({name})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def apart(svg: str, prefix: str) -> str:
    """The same drawing with ids of its own, for a page that has several."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg)


def bars(
    categories: Sequence[str],
    series: Mapping[str, Values],
    colours: Sequence[str],
    *,
    label: str,
    percent: bool,
    highest: float | None = None,
) -> str:
    """Groups of upright bars: a group a category, a bar a series; None is drawn as nothing."""
    with canvas() as drawn:
        axes = drawn.axes
        width = 0.8 / max(1, len(series))
        for index, (values, colour) in enumerate(zip(series.values(), colours, strict=True)):
            places = [place - 0.4 + width * (index + 0.5) for place in range(len(categories))]
            axes.bar(places, [value or 0.0 for value in values], width * 0.92, color=colour)
        # Long names, such as those of stages, would run into each other.
        crowded = sum(map(len, categories)) > 30
        axes.set_xticks(range(len(categories)), categories, fontsize=8.5 if crowded else None)
        axes.set_xlabel(label)
        axes.set_ylim(0, highest)
        axes.grid(visible=False, axis="x")
        scale(axes.yaxis, percent)
    return drawn.svg


def lines(
    series: Mapping[str, tuple[Sequence[float], Values]],
    colours: Sequence[str],
    *,
    label: str,
    percent: bool = False,
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    whole: bool = False,
) -> str:
    """Lines over steps; `reference` is a dashed level with its name, `whole` marks each x, such as iterations."""
    from matplotlib.ticker import MaxNLocator

    with canvas() as drawn:
        axes = drawn.axes
        for (places, values), colour in zip(series.values(), colours, strict=True):
            known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
            few = len(known) <= 12
            axes.plot(
                *zip(*known, strict=True),
                color=colour,
                linewidth=1.8,
                marker="o" if few else None,
                markersize=4.5,
            )
        if reference is not None:
            axes.axhline(reference[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                reference[1], (1, reference[0]), (0, 3), ("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=9.5, color=MUTED,
            )  # fmt: skip
        axes.set_xlabel(label)
        if limits is not None:
            axes.set_ylim(*limits)
        if whole:
            places = sorted({x for xs, _ in series.values() for x in xs})
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.set_xlim(places[0] - 0.3, places[-1] + 0.3)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        scale(axes.yaxis, percent)
    return drawn.svg


def stacks(
    rows: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    label: str,
    most: float,
) -> str:
    """Rows of lying bars, each of several parts; the sum stands at the end, `most` is the largest sum of all panels."""
    with canvas(0.75 + 0.42 * max(2, len(rows))) as drawn:
        axes = drawn.axes
        places = list(range(len(rows)))[::-1]
        begin = [0.0] * len(rows)
        for values, colour in zip(parts.values(), colours, strict=True):
            axes.barh(places, values, 0.62, left=begin, color=colour, edgecolor=PAPER, linewidth=0.8)
            begin = [start + value for start, value in zip(begin, values, strict=True)]
        for place, total in zip(places, begin, strict=True):
            axes.annotate(
                f"{total:,.0f}" if total == round(total) or total >= 100 else f"{total:.1f}",
                (total, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
                color=MUTED,
            )
        axes.set_yticks(places, rows)
        axes.set_xlim(0, most * 1.16 or 1)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
    return drawn.svg


def ranges(
    rows: Sequence[str],
    quantiles: Sequence[Sequence[float]],
    colours: Sequence[str],
    label: str,
    limits: tuple[float, float] | None,
) -> str:
    """A row a distribution: thin from 5 to 95 %, thick from 25 to 75 %, a dot at the median."""
    with canvas(0.75 + 0.42 * max(2, len(rows))) as drawn:
        axes = drawn.axes
        places = list(range(len(rows)))[::-1]
        for place, (low, lower, middle, upper, high), colour in zip(places, quantiles, colours, strict=True):
            axes.plot([low, high], [place, place], color=colour, linewidth=1.4)
            axes.plot([lower, upper], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
            axes.plot([middle], [place], "o", color=PAPER, markeredgecolor=INK, markersize=5.5)
        axes.set_yticks(places, rows)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(limits)
        axes.set_xlabel(label)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
    return drawn.svg


def estimates(
    rows: Sequence[str],
    found: Sequence[Estimate],
    *,
    percent: bool,
    reference: float | None,
) -> str:
    """A row a figure: a dot, with a line over its interval (low, high) where it has one."""
    with canvas(0.75 + 0.42 * max(2, len(rows))) as drawn:
        axes = drawn.axes
        places = list(range(len(rows)))[::-1]
        for place, (value, low, high) in zip(places, found, strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=SERIES[0], linewidth=1.6)
            axes.plot([value], [place], "o", color=SERIES[0], markersize=6)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        # Names from a user's file: a dollar sign is no formula.
        axes.set_yticks(places, rows, parse_math=False)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        scale(axes.xaxis, percent)
    return drawn.svg


def scale(axis: Any, percent: bool) -> None:
    """How an axis writes its numbers."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    axis.set_major_formatter(
        PercentFormatter(1.0, decimals=0) if percent else FuncFormatter(lambda x, _: f"{x:,.6g}")
    )


def thinned(places: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most LINE_POINTS points of a long curve: means of equally long parts."""
    parts = -(-len(values) // LINE_POINTS)
    if parts <= 1:
        return list(places), list(values)
    cut = range(0, len(values), parts)
    return (
        [sum(places[start : start + parts]) / len(places[start : start + parts]) for start in cut],
        [sum(values[start : start + parts]) / len(values[start : start + parts]) for start in cut],
    )
