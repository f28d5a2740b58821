"""What a deliberate defect is: see test_mistakes.py."""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    kernels: str = "triton"


def interpreter(file: str, *nodes: str) -> tuple[str, ...]:
    return tuple(f"tests/interpreter/test_{file}.py::test_{node}" for node in nodes)


def room(file: str, *nodes: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{file}.py::test_{node}" for node in nodes)
