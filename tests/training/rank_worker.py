"""The trainer's full path on the ranks there are, as the train stage calls it: load, reference log-probs, train, gather.

Imported by conftest.py for one process; as a script it is one of several ranks, with torchrun's environment variables and the
path of a list of `Job`s saved by torch.save. Every rank writes what it saw to `<out>-<rank>.pt`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.run import ranks
from metareward.training.examples import DataOrder, Example
from metareward.training.objectives import Objective, Sums, pair_objective, sft_objective
from metareward.training.packing import PackedBatch
from metareward.training.sharded import load_sharded, whole_tensors
from metareward.training.trainer import TrainingSet, logprobs_of, train

CPU = torch.device("cpu")


class Interrupted(Exception):
    """Stands for a kill between two optimizer steps."""


@dataclass
class Job:
    """One training: the model, the examples, the settings, where checkpoints go, and what is to go wrong."""

    model: Path
    examples: Sequence[Example]
    settings: TrainSettings
    checkpoints: Path
    objective: str = "pair"
    stop_after: int | None = None
    poison: str = ""
    """Identity of an example whose loss becomes NaN."""
    on_step: Callable[[int], None] = field(default=lambda step: None)


@dataclass
class Outcome:
    steps: list[dict[str, float]]
    weights: dict[str, Tensor]
    reference: dict[str, tuple[float, ...]]
    error: str = ""


def run(job: Job) -> Outcome:
    """Do the job. An interruption or a UserError ends the training and is told in the outcome."""
    settings = job.settings
    decoder = load_sharded(job.model, settings, CPU, ranks.world_size())
    data = training_set(job)
    reference: dict[str, tuple[float, ...]] = {}
    objective = sft_objective()
    if job.objective == "pair":
        reference = logprobs_of(decoder, data, CPU, lambda count: None)
        objective = pair_objective(settings, reference)  # type: ignore[arg-type]
    if job.poison:
        objective = poisoned(objective, job.poison)
    steps: list[dict[str, float]] = []

    def on_step(step: int, total: int, figures: Mapping[str, float]) -> None:
        assert total == data.order.steps
        steps.append({"step": step, **figures})
        job.on_step(step)
        if step == job.stop_after:
            raise Interrupted(f"after step {step}")

    error = ""
    try:
        train(decoder, data, objective, settings, job.checkpoints, CPU, on_step)
    except (Interrupted, UserError) as stopped:
        error = f"{type(stopped).__name__}: {stopped}"
    return Outcome(steps, {name: value.clone() for name, value in whole_tensors(decoder)}, reference, error)


def training_set(job: Job) -> TrainingSet:
    order = DataOrder(len(job.examples), job.settings.batch_pairs, job.settings.epochs, seed=3, stream=1)
    return TrainingSet(job.examples, order, job.settings.micro_batch_tokens)


def poisoned(objective: Objective, identity: str) -> Objective:
    def loss(batch: PackedBatch, hidden: Tensor, head: Tensor, scale: float) -> tuple[Tensor, Sums]:
        value, figures = objective.loss(batch, hidden, head, scale)
        if any(example.identity == identity for example in batch.examples):
            return value * math.nan, {**figures, "loss": math.nan}
        return value, figures

    return replace(objective, loss=loss)


def main(plan: Path) -> None:
    jobs: dict[str, dict[str, Any]] = torch.load(plan, weights_only=False)
    ranks.start_ranks()
    for name, fields in jobs.items():
        outcome = run(Job(**fields))
        torch.save(vars(outcome), plan.with_name(f"{name}-{ranks.rank()}.pt"))
    ranks.stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
