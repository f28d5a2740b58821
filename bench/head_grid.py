"""Measures every method in every cell of a grid: correct first, then time and memory in interleaved rounds.

A cell is an op, a pass, a dtype and a shape. All its methods get the same inputs. Each is called once to warm up, and
what it returns is compared with `linear_logprob`'s; one that deviates is not timed. Then come rounds: the bare matrix
products once, then every method once, so that a machine that slows down slows all. The median counts.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from bench.head_inputs import DTYPES, Inputs, Shape, make_inputs
from bench.head_methods import Call, Method, Op, Unavailable, forced, one_line
from bench.peak_memory import available_bytes, timed_with_peak

Pass = Literal["forward", "forward+backward"]
Row = dict[str, Any]
Found = tuple[Tensor, tuple[Tensor, ...]]  # the result, and the gradients of hidden [T,H] and weight [V,H]
# Of a log-prob in nats; of a loss or a sum of log-probs relative; of a gradient the norm of the difference over the norm.
# In bf16 a peer may round logits (to steps of 1/32 near 4), every term of a gradient, and a running sum.
TOLERANCE = {
    "bf16": {"logprob": 0.1, "sum": 0.1, "loss": 1e-2, "gradient": 5e-2},
    "fp32": {"logprob": 1e-3, "sum": 1e-4, "loss": 1e-4, "gradient": 1e-3},
}


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


def in_token_order(call: Call, found: Found) -> Found:
    """The gradient of hidden as [T,H], whatever its layout."""
    if call.positions is None or not found[1]:
        return found
    hidden, weight = found[1]
    return found[0], (hidden.flatten(0, -2)[call.positions], weight)


def deviations(found: Found, expected: Found) -> dict[str, float]:
    """How far a result and its gradients are from the expected ones; by the names of TOLERANCE's measures."""
    result, wanted = found[0].double(), expected[0].double()
    if result.dim() == 1:
        worst = {"logprob": float((result - wanted).abs().max())}
    else:
        name, wanted = ("loss", wanted) if wanted.dim() == 0 else ("sum", wanted.sum())
        worst = {name: float((result - wanted).abs() / wanted.abs())}
    for name, ours, theirs in zip(("hidden", "weight"), expected[1], found[1], strict=bool(found[1])):
        difference = torch.linalg.vector_norm(theirs.float() - ours.float())
        worst[f"gradient_{name}"] = float(difference / torch.linalg.vector_norm(ours.float()))
    return worst


def too_far(found: dict[str, float], dtype: str) -> str | None:
    """Which deviation is above its tolerance (NaN is), as a phrase; or None."""
    for name, value in found.items():
        tolerance = TOLERANCE[dtype][name.partition("_")[0]]
        if not value <= tolerance:
            return f"{name} deviates by {value:.2g}, more than {tolerance:.2g}"
    return None


def refuse_too_large(method: Method, cell: Cell) -> None:
    """Raises Unavailable where the machine cannot hold what the method holds: a CPU process would be killed."""
    needed = method.logit_copies * 4 * cell.shape.tokens * cell.shape.vocabulary
    free = available_bytes(cell.device)
    if free is not None and needed > free:
        raise Unavailable(f"it holds about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free")


def measure_cell(
    cell: Cell, methods: Sequence[Method], *, rounds: int, seed: int, soft_end: float, hard_end: float
) -> list[Row]:
    """One row a method. Rounds after the first start before `soft_end`; nothing starts after `hard_end`."""
    inputs = make_inputs(cell.shape, DTYPES[cell.dtype], cell.device, seed)
    if cell.pass_ == "forward":
        inputs = inputs._replace(hidden=inputs.hidden.detach(), weight=inputs.weight.detach())
    check = Check(cell)
    entries, rows = [], []
    for method in (method for method in methods if method.op == cell.op):
        row = blank_row(cell, method)
        rows.append(row)
        entry = check.first_call(method, inputs, row, hard_end)
        if entry is not None:
            entries.append(entry)
    check.forget()
    limit = BareProducts(inputs, cell.products)
    limit()
    limits: list[float] = []
    while len(limits) < rounds:
        gc.collect()
        start = perf_counter()
        if start > (soft_end if limits else hard_end):
            break
        limits.append(timed_with_peak(limit, cell.device)[1])
        for entry in entries:
            if perf_counter() <= hard_end:
                time_once(entry, cell)
        if perf_counter() + (perf_counter() - start) > soft_end:
            break
    for entry in entries:
        fill(entry, limits)
    return rows


class Check:
    """First calls: the reference's is kept, the others' are compared with it."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.reference: Call | None = None
        self.expected: dict[bool, Found] = {}  # by whether the log-probs' gradients are all 1

    def first_call(self, method: Method, inputs: Inputs, row: Row, hard_end: float) -> Entry | None:
        """The method, ready to be timed; or None, and its row says why not."""
        try:
            row["implementation"] = method.implementation(self.cell.device, self.cell.dtype)
            if perf_counter() > hard_end:
                raise Unavailable("the time budget ran out before it")
            refuse_too_large(method, self.cell)
            with forced(method.forced):
                call = method.prepare(inputs)
                found = in_token_order(call, run_pass(call, self.cell.pass_))
        except Unavailable as reason:
            row["reason"] = str(reason)
            return None
        except Exception as error:
            # Another package's failure is a finding; ours is a defect, except that memory can run out for anyone.
            if method.ours and not isinstance(error, torch.OutOfMemoryError):
                raise
            row["reason"] = f"it failed here: {one_line(error)}"
            return None
        row["gradient_bytes"] = sum(gradient.nbytes for gradient in found[1])
        if self.reference is None:
            self.reference = call
            self.expected[False] = found
        row["deviation"] = deviations(found, self._expected(call))
        reason = too_far(row["deviation"], self.cell.dtype)
        row["wrong"] = reason is not None
        if reason is not None:
            row["reason"] = f"not timed: {reason}"
            row["deviation"] = {name: one_number(value) for name, value in row["deviation"].items()}
            return None
        return Entry(method, call, row)

    def _expected(self, call: Call) -> Found:
        assert self.reference is not None
        ones = self.reference.upstream is not None and call.upstream is None
        if ones not in self.expected:
            upstream = torch.ones_like(self.reference.upstream)
            self.expected[ones] = run_pass(self.reference._replace(upstream=upstream), self.cell.pass_)
        return self.expected[ones]

    def forget(self) -> None:
        self.expected.clear()


def one_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)


def time_once(entry: Entry, cell: Cell) -> None:
    with forced(entry.method.forced):
        _, seconds, peak = timed_with_peak(lambda: run_pass(entry.call, cell.pass_), cell.device)
    entry.seconds.append(seconds)
    entry.peaks.append(peak)


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
    for index, cell in enumerate(todo):
        now = perf_counter()
        share = cell.weight / sum(other.weight for other in todo[index:])
        soft_end = now + share * max(0.0, hard_end - now)
        after_cell(
            cell,
            measure_cell(cell, methods, rounds=rounds, seed=seed, soft_end=soft_end, hard_end=hard_end),
        )
        if cell.device == "cuda":
            torch.cuda.empty_cache()
