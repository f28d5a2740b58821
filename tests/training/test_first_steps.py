"""The first training steps against a loop in plain transformers and PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metareward.config import TrainSettings
from metareward.training.examples import Example
from tests.training.plain_loop import plain_loop

Models = dict[str, tuple[Any, Path]]
MakeSettings = Callable[..., TrainSettings]
MakeExamples = Callable[..., list[Example]]


@pytest.mark.parametrize(
    ("family", "objective"), [("llama-tied", "pair"), ("qwen3", "pair"), ("qwen3", "sft")]
)
def test_first_steps_equal_a_plain_loop(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
    family: str,
    objective: str,
) -> None:
    model, folder = models[family]
    settings = make_settings(epochs=10, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, beta=0.3)
    examples = make_examples(8, completions=2 if objective == "pair" else 1)
    job = worker.Job(folder, examples, settings, tmp_path, objective, stop_after=4)
    order = worker.training_set(job).order
    assert order.steps == 20
    batches = [[examples[index] for index in order.indices(step)] for step in range(4)]
    wanted = plain_loop(copy.deepcopy(model), batches, settings, order.steps, objective)
    outcome = worker.run(job)
    found = [(figures["loss"], figures["grad_norm"]) for figures in outcome.steps]
    for left, right in zip(found, wanted, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    assert wanted[0][1] > settings.max_grad_norm, "clipping has something to do"
    assert abs(wanted[3][0] - wanted[0][0]) > 1e-2, "the steps moved the loss"
