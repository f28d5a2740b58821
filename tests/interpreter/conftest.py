"""The Triton kernels in Triton's interpreter, or compiled where there is a GPU (they have never been run on one).

Triton decides at import, so the interpreter needs a process of its own:
`TRITON_INTERPRET=1 python -m pytest tests/interpreter`; tests/kernels/test_interpreter.py starts one.
bf16 products and casts are wrong in the interpreter (casts cut off, products are garbage): fp32 and fp16 here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.on_gpu import run_on_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def run_here(launcher: Callable, *arguments: Any, **named: Any) -> Any:
    return launcher(*arguments, **named)


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """run(launcher, arguments ...): CPU tensors in, CPU tensors out."""
    return run_here if INTERPRETED else run_on_gpu
