"""Measures every method in every cell of a grid: correct first, then time and memory in interleaved rounds.

A cell is an op, a pass, a dtype and a shape. All its methods get the same inputs. Each is called once to warm up, and
what it returns is compared with `linear_logprob`'s; one that deviates is not timed. Then come rounds: the bare matrix
products once, then every method once, so that a machine that slows down slows all. The median counts. Large cells are
dear: a first call counts there as a round, if a smaller cell has warmed the method up and it is not compiled on the spot.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

import torch

from bench.head_check import Found, deviations, in_token_order, one_number, too_far
from bench.head_inputs import DTYPES, Inputs, Shape, make_inputs
from bench.head_methods import Call, Method, Op, Unavailable, forced, one_line
from bench.peak_memory import available_bytes, timed_with_peak

Pass = Literal["forward", "forward+backward"]
Row = dict[str, Any]

SLOW = 4.0  # times the fastest method's first call


@dataclass(frozen=True)
class Cell:
    op: Op
    pass_: Pass
    dtype: str  # of DTYPES
    shape: Shape
    device: str = "cpu"

    @property
    def products(self) -> int:
        return 1 if self.pass_ == "forward" else 3

    @property
    def weight(self) -> float:
        """Roughly what its measuring costs beside other cells."""
        slow = 4.0 if self.device == "cpu" and self.dtype == "fp32" else 1.0
        return slow * self.products * self.shape.product_flop()


@dataclass
class Entry:
    """A method that is being timed."""

    method: Method
    call: Call
    row: Row
    seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    first_seconds: float = 0.0
    first_peak: int | None = None
    settled: bool = False  # timed once, and that will do

    def settle_for_first_call(self) -> None:
        """Far behind the others: one call says so, more would take the time from those that compete."""
        self.seconds, self.settled = [self.expected_seconds()], True
        self.peaks = self.peaks or [self.first_peak]
        said = f"timed once, on its first call: more than {SLOW:.0f} times slower than the fastest"
        self.row["note"] = said if not self.row.get("note") else f"{self.row['note']}; {said}"

    def forget_time(self) -> None:
        """The call so far was to warm up. Compiling says nothing about later calls."""
        self.first_seconds = 0.0 if self.method.compiled else self.seconds[-1]
        self.first_peak = self.peaks[-1]
        self.seconds.clear()
        self.peaks.clear()

    def expected_seconds(self) -> float:
        return self.seconds[-1] if self.seconds else self.first_seconds


class BareProducts:
    """The matrix products of a pass alone, into buffers that are there already: the limit of any method."""

    def __init__(self, inputs: Inputs, products: int) -> None:
        self.hidden, self.weight, self.products = inputs.hidden.detach(), inputs.weight.detach(), products
        self.logits = torch.zeros(len(inputs.targets), len(self.weight)).to(self.hidden)
        self.grads = (torch.zeros_like(self.hidden), torch.zeros_like(self.weight))

    def __call__(self) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)
        if self.products == 3:
            torch.mm(self.logits, self.weight, out=self.grads[0])
            torch.mm(self.logits.T, self.hidden, out=self.grads[1])


def run_pass(call: Call, pass_: Pass) -> Found:
    """The result, and in the training pass the gradients of hidden and weight as the method lays them out."""
    if pass_ == "forward":
        with torch.no_grad():
            return call.forward(), ()
    result = call.forward()
    upstream = None if call.upstream is None else call.upstream.to(result.dtype)
    return result.detach(), torch.autograd.grad(result, call.leaves, upstream)


def refuse_too_large(method: Method, cell: Cell) -> None:
    """Raises Unavailable where the machine cannot hold what the method holds: a CPU process would be killed."""
    needed = method.logit_copies * 4 * cell.shape.tokens * cell.shape.vocabulary
    free = available_bytes(cell.device)
    if free is not None and needed > free:
        raise Unavailable(f"it holds about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free")


def measure_cell(
    cell: Cell,
    methods: Sequence[Method],
    *,
    rounds: int,
    seed: int,
    soft_end: float,
    hard_end: float,
    warm: Container[str] = (),
) -> list[Row]:
    """One row a method. What has been timed once is timed again only before `soft_end`; nothing starts after `hard_end`.

    warm: methods that a smaller cell has called already: their first call here counts as a round.
    """
    start = perf_counter()
    inputs = make_inputs(cell.shape, DTYPES[cell.dtype], cell.device, seed)
    if cell.pass_ == "forward":
        inputs = inputs._replace(hidden=inputs.hidden.detach(), weight=inputs.weight.detach())
    limit = BareProducts(inputs, cell.products)
    limit()
    limits = [timed_with_peak(limit, cell.device)[1]] if warm else []
    check = Check(cell, hard_end)
    entries, rows = [], []
    for method in (method for method in methods if method.op == cell.op):
        row = blank_row(cell, method)
        rows.append(row)
        entry = check.first_call(method, inputs, row, counts=method.name in warm and not method.compiled)
        if entry is not None:
            entries.append(entry)
    del check  # and the reference's gradients
    known = [entry.expected_seconds() for entry in entries if entry.expected_seconds() > 0.0]
    for entry in entries:  # never ours: a first call may only have warmed up
        if not entry.method.ours and entry.expected_seconds() > SLOW * min(known, default=0.0):
            entry.settle_for_first_call()
    last = perf_counter() - start
    while len(limits) < rounds and perf_counter() < hard_end:
        late = perf_counter() + last > soft_end
        due = [entry for entry in entries if not (entry.seconds and (late or entry.settled))]
        if not due:
            break
        gc.collect()
        start = perf_counter()
        limits.append(timed_with_peak(limit, cell.device)[1])
        for entry in due:
            if perf_counter() + entry.expected_seconds() < hard_end:
                time_once(entry, cell)
        last = perf_counter() - start
    for entry in entries:
        fill(entry, limits)
    return rows


class Check:
    """First calls: the reference's is kept, the others' are compared with it."""

    def __init__(self, cell: Cell, hard_end: float) -> None:
        self.cell = cell
        self.hard_end = hard_end
        self.reference: Call | None = None
        self.expected: dict[bool, Found] = {}  # by whether the log-probs' gradients are all 1

    def first_call(self, method: Method, inputs: Inputs, row: Row, *, counts: bool) -> Entry | None:
        """The method, ready to be timed; or None, and its row says why not. counts: this call is a round already."""
        try:
            row["implementation"] = method.implementation(self.cell.device, self.cell.dtype)
            if perf_counter() > self.hard_end:
                raise Unavailable("the time budget ran out before it")
            refuse_too_large(method, self.cell)
            with forced(method.forced):
                entry = Entry(method, method.prepare(inputs), row)
            found = in_token_order(entry.call, time_once(entry, self.cell))
        except Unavailable as reason:
            row["reason"] = str(reason)
            return None
        except Exception as error:
            # Another package's failure is a finding; ours is a defect, except that memory can run out for anyone.
            if method.ours and not isinstance(error, torch.OutOfMemoryError):
                raise
            row["reason"] = f"it failed here: {one_line(error)}"
            return None
        if not counts:
            entry.forget_time()
        row["gradient_bytes"] = sum(gradient.nbytes for gradient in found[1])
        if self.reference is None:
            self.reference = entry.call
            self.expected[False] = found
        row["deviation"] = deviations(found, self._expected(entry.call))
        wrong = too_far(row["deviation"], self.cell.dtype)
        row["wrong"] = wrong is not None
        if wrong is not None:
            row["reason"] = f"not timed: {wrong}"
            row["deviation"] = {name: one_number(value) for name, value in row["deviation"].items()}
            return None
        return entry

    def _expected(self, call: Call) -> Found:
        assert self.reference is not None
        upstream = self.reference.upstream
        ones = upstream is not None and call.upstream is None
        if upstream is not None and ones not in self.expected:
            summed = self.reference._replace(upstream=torch.ones_like(upstream))
            self.expected[ones] = run_pass(summed, self.cell.pass_)
        return self.expected[ones]


def time_once(entry: Entry, cell: Cell) -> Found:
    """One timed call; its time and peak go into the entry."""
    with forced(entry.method.forced):
        found, seconds, peak = timed_with_peak(lambda: run_pass(entry.call, cell.pass_), cell.device)
    entry.seconds.append(seconds)
    entry.peaks.append(peak)
    return found


def blank_row(cell: Cell, method: Method) -> Row:
    return {
        "op": cell.op,
        "method": method.name,
        "ours": method.ours,
        "implementation": method.package,
        "device": cell.device,
        "dtype": cell.dtype,
        "T": cell.shape.tokens,
        "H": cell.shape.hidden,
        "V": cell.shape.vocabulary,
        "pass": cell.pass_,
        "ms": None,
        "peak_bytes": None,
        "gradient_bytes": None,
        "limit_ms": None,
        "limit_ratio": None,
        "rounds_ms": [],
        "deviation": None,
        "wrong": False,
        "note": method.note,
        "reason": None,
    }


def fill(entry: Entry, limits: Sequence[float]) -> None:
    """The medians, into the row."""
    row = entry.row
    if not entry.seconds:
        row["reason"] = "the time budget ran out before its first round"
        return
    row["rounds_ms"] = [seconds * 1e3 for seconds in entry.seconds]
    row["ms"] = statistics.median(row["rounds_ms"])
    row["limit_ms"] = statistics.median(limits) * 1e3
    row["limit_ratio"] = row["ms"] / row["limit_ms"]
    known = [peak for peak in entry.peaks if peak is not None]
    row["peak_bytes"] = int(statistics.median(known)) if known else None


def measure_grid(
    cells: Sequence[Cell],
    methods: Sequence[Method],
    *,
    rounds: int,
    seconds: float,
    seed: int,
    after_cell: Callable[[Cell, list[Row]], None],
) -> None:
    """Every cell, the cheap ones first; each gets its share, by cost, of the time that is left."""
    hard_end = perf_counter() + seconds
    todo = sorted(cells, key=lambda cell: cell.weight)
    warm: dict[Cell, set[str]] = {}  # by the cell at no particular shape
    for index, cell in enumerate(todo):
        now = perf_counter()
        share = cell.weight / sum(other.weight for other in todo[index:])
        called = warm.setdefault(replace(cell, shape=Shape(0, 0, 0)), set())
        rows = measure_cell(
            cell,
            methods,
            rounds=rounds,
            seed=seed,
            soft_end=now + share * max(0.0, hard_end - now),
            hard_end=hard_end,
            warm=called,
        )
        called.update(row["method"] for row in rows if row["ms"] is not None)
        after_cell(cell, rows)
        if cell.device == "cuda":
            torch.cuda.empty_cache()
