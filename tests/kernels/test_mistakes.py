"""Tests of the tests: with a deliberate defect in a kernel, the suite fails, by an assertion.

Each mistake replaces a piece of a source file of the package. A copy of the package with it runs the tests named, the Triton
kernels in the interpreter, the PyTorch paths as they are. One of the tests must fail, and not for want of compiling. The
undamaged copy passes all of them. The C++ sources are not damaged here: a build a mistake would take minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import mistakes_torch, mistakes_triton
from tests.kernels.mistakes import Mistake

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("mistake_runner.py")
MISTAKES = [*mistakes_triton.MISTAKES, *mistakes_torch.MISTAKES]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, str]]:
    """Outcome of every mistake, and of none ("triton" and "torch", the undamaged copies)."""
    pytest.importorskip("triton", reason="triton is not installed")
    plan = [
        {"name": m.name, "edits": [[m.file, m.old, m.new]], "tests": m.tests, "kernels": m.kernels}
        for m in MISTAKES
    ]
    for kernels in ("triton", "torch"):
        tests = sorted({test for m in MISTAKES if m.kernels == kernels for test in m.tests})
        plan.append({"name": kernels, "edits": [], "tests": tests, "kernels": kernels})
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(plan),
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_undamaged_package_passes(results: dict[str, dict[str, str]], kernels: str) -> None:
    found = results[kernels]
    assert found["outcome"] == "passed", f"{found['by']}: {found['error']}"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_the_suite_tells(results: dict[str, dict[str, str]], mistake: Mistake) -> None:
    found = results[mistake.name]
    assert found["outcome"] == "failed", f"{found['outcome']} ({found['by']}): {found['error']}"


def test_names_are_unique() -> None:
    assert len({m.name for m in MISTAKES} | {"triton", "torch"}) == len(MISTAKES) + 2
