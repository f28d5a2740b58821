"""SIGKILL in every phase of an optimizer step and of a checkpoint: the training that is started again ends bitwise the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metareward.config import TrainSettings
from metareward.training.examples import Example

STEPS = 14
# Two steps an epoch and a checkpoint after every second, so the even steps end an epoch. (place, step, rank that dies, steps with
# which the next start may begin): a checkpoint that is being written while the next step runs may be complete or not.
Row = tuple[str, int, int, set[int]]
KILLS: dict[int, list[Row]] = {
    2: [
        ("forward", 3, 1, {1, 3}),
        ("backward", 3, 0, {1, 3}),
        ("update", 4, 1, {1, 3}),
        ("updated", 4, 0, {1, 3}),
        # Step 6 has begun.
        ("write", 4, 1, {3}),
        ("index", 4, 0, {3}),
        ("named", 6, 0, {7}),
        ("deleting", 8, 0, {9}),
        ("step's end", 10, 1, {9, 11}),
        ("updated", 14, 1, {11, 13}),
    ],
    1: [("write", 2, 0, {1}), ("named", 4, 0, {5}), ("updated", 14, 0, {11, 13})],
}


@pytest.fixture(scope="module")
def outcomes(
    models: dict[str, tuple[Any, Path]],
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    worker: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder in which kill_worker.py leaves what every start and rank saw, of "killed-N" and "whole-N" on N ranks."""
    folder = tmp_path_factory.mktemp("kills")
    kill_worker = load_worker(worker)
    settings = make_settings(
        epochs=7, checkpoint_steps=2, keep_checkpoints=1, weight_decay=0.1, learning_rate=1e-3
    )

    def case(name: str, processes: int, rows: list[Row]) -> Any:
        job = {
            "model": models["llama-tied"][1],
            "examples": make_examples(6),
            "settings": settings,
            "checkpoints": folder / name,
        }
        return kill_worker.Case(name, job, processes, [kill_worker.Kill(*row[:3]) for row in rows])

    cases = [case(f"whole-{processes}", processes, []) for processes in KILLS]
    cases += [case(f"killed-{processes}", processes, rows) for processes, rows in KILLS.items()]
    plan = folder / "plan.pt"
    torch.save(cases, plan)
    worker.run_script("kill_worker.py", str(plan))
    return folder


def load_worker(worker: ModuleType) -> ModuleType:
    """kill_worker.py as a module, beside rank_worker.py, which it imports by that name."""
    import importlib.util

    assert sys.modules["rank_worker"] is worker
    spec = importlib.util.spec_from_file_location("kill_worker", Path(__file__).with_name("kill_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_worker"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", KILLS)
def test_every_start_goes_on_from_the_newest_checkpoint(outcomes: Path, processes: int) -> None:
    lines = (outcomes / f"killed-{processes}.starts").read_text().splitlines()
    begins, *codes = zip(*([int(word) for word in line.split()] for line in lines), strict=True)
    assert begins[0] == 1
    for (place, step, victim, allowed), begin, ends in zip(
        KILLS[processes], begins[1:], zip(*codes, strict=True), strict=False
    ):
        assert ends[victim] == -9, f"the kill at {place} of step {step} never came"
        assert begin in allowed, (place, step)
    assert len(lines) == len(KILLS[processes]) + 1
    assert [code[-1] for code in codes] == [0] * processes


@pytest.mark.parametrize("processes", KILLS)
def test_killed_training_ends_bitwise_the_same(outcomes: Path, processes: int) -> None:
    for rank in range(processes):
        found, whole = (
            torch.load(outcomes / f"{name}-{processes}-{rank}.pt", weights_only=False)
            for name in ("killed", "whole")
        )
        assert not found["error"]
        assert not whole["error"]
        assert [figures["step"] for figures in whole["steps"]] == list(range(1, STEPS + 1))
        for left, right in zip(found["steps"][::-1], whole["steps"][::-1], strict=False):
            for figure in ("step", "loss", "grad_norm", "learning_rate"):
                assert left[figure] == right[figure], (left["step"], figure)
        for weight, value in whole["weights"].items():
            assert torch.equal(found["weights"][weight], value), weight
    assert [path.name for path in (outcomes / f"killed-{processes}").iterdir()] == ["step-000012"]
