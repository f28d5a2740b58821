"""Runs parts of the suite against damaged copies of the package: see test_mistakes.py.

Standard input: a JSON list of {"name", "edits": [[file, old, new], ...], "tests", "kernels"}. Standard output: a JSON object
from each name to {"outcome": "passed" | "failed" | "error", "by": the first test that failed, "error": what it raised}.
Triton, PyTorch and pytest are imported once, in the interpreter's mode; each copy has a forked process of its own, with a
pytest session in it. The damaged files are real files: Triton reads its kernels' source.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo
import triton  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "metareward_kernels"


class FirstFailure:
    """A pytest plugin: which test failed first, and by what."""

    def __init__(self) -> None:
        self.passed = 0
        self.found: dict[str, str] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        result = yield
        report = result.get_result()
        self.passed += report.when == "call" and report.passed
        if report.failed and not self.found:
            raised = call.excinfo.type if call.excinfo else Exception
            # Of the assertions' own: a kernel that does not compile or run is no proof that a test can tell.
            kind = "failed" if issubclass(raised, AssertionError) else "error"
            self.found = {"outcome": kind, "by": item.nodeid, "error": str(report.longrepr)[-1500:]}


def damaged_copy(edits: list[list[str]], folder: Path) -> None:
    package = folder / "metareward_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, old, new in edits:
        source = (package / name).read_text()
        if old not in source:
            raise LookupError(f"{name} does not hold {old!r}: write the mistake anew")
        (package / name).write_text(source.replace(old, new, 1))


def run(mistake: dict[str, Any]) -> dict[str, str]:
    """In a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    os.environ["METAREWARD_KERNELS"] = mistake["kernels"]
    if mistake["kernels"] != "triton":
        del os.environ["TRITON_INTERPRET"]
    with tempfile.TemporaryDirectory() as name:
        try:
            damaged_copy(mistake["edits"], Path(name))
        except LookupError as error:
            return {"outcome": "error", "by": "damaged_copy", "error": str(error)}
        sys.path[:0] = [name, str(ROOT)]
        import metareward_kernels

        assert Path(metareward_kernels.__file__).is_relative_to(name)
        plugin = FirstFailure()
        options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath=", f"--rootdir={ROOT}"]
        code = pytest.main([*options, *mistake["tests"]], plugins=[plugin])
        if plugin.found:
            return plugin.found
        if code != 0 or plugin.passed == 0:
            return {"outcome": "error", "by": "pytest", "error": f"exit code {code}, {plugin.passed} passed"}
        return {"outcome": "passed", "by": f"{plugin.passed} tests", "error": ""}


def main() -> None:
    assert not any(name.startswith("metareward_kernels") for name in sys.modules)
    mistakes = json.load(sys.stdin)
    os.chdir(ROOT)
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        results = pool.map(run, mistakes, chunksize=1)
    json.dump({m["name"]: r for m, r in zip(mistakes, results, strict=True)}, sys.stdout)


if __name__ == "__main__":
    main()
