"""One undisturbed run of the tiny recipe, through the command line, for all tests of the loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]
# One thread: the same sums in the same order whatever else the machine does, and no rank in another's way.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    """Start `metareward ARGUMENTS`, under torchrun where there are several processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    return subprocess.Popen(
        [*launcher, "metareward", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    output, _ = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


@pytest.fixture(scope="session")
def metareward() -> Command:
    """metareward("run", ..., processes=1) -> finished process; its output is in `stdout`."""
    return lambda *arguments, processes=1: finish(start([str(item) for item in arguments], processes))


@pytest.fixture(scope="session")
def launch() -> Callable[[list[str]], subprocess.Popen[str]]:
    """Start a command and hand the process over, to be killed."""
    return start


@pytest.fixture(scope="session")
def finished_run(tiny_world: Path, metareward: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed run of the tiny recipe."""
    root = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = metareward("run", tiny_world / "recipe.toml", "--run-dir", root)
    assert done.returncode == 0, done.stdout
    return root
