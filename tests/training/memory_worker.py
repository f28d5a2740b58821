"""The memory that one optimizer step takes, each in a process of its own: a script, forked per job from one that has imported all.

Its argument is a list of `Job`s' fields by name, saved by torch.save; each leaves `<name>.json`: bytes resident before the
weights are loaded, the peak up to the end of the first step, and the step's figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed.checkpoint
from rank_worker import CPU, Job, fork_ranks, training_set

from metareward.run import ranks
from metareward.training.objectives import pair_objective
from metareward.training.peak_memory import process_memory
from metareward.training.sharded import load_sharded
from metareward.training.trainer import logprobs_of, train


class Measured(Exception):
    """The first step is done."""


def measure(fields: dict[str, Any], target: Path) -> None:
    ranks.start_ranks()
    job = Job(**fields)
    before = process_memory("VmRSS")
    decoder = load_sharded(job.model, job.settings, CPU, 1)
    data = training_set(job)
    reference = logprobs_of(decoder, data, CPU, lambda count: None)

    def on_step(step: int, steps: int, figures: Mapping[str, float]) -> None:
        found = {"before": before, "peak": process_memory("VmHWM"), **figures}
        target.write_text(json.dumps(found))
        raise Measured

    objective = pair_objective(job.settings, reference)  # type: ignore[arg-type]
    try:
        train(decoder, data, objective, job.settings, job.checkpoints, CPU, on_step)
    except Measured:
        return
    raise AssertionError("there was no step")


def main(plan: Path) -> None:
    jobs: dict[str, dict[str, Any]] = torch.load(plan, weights_only=False)
    for name, fields in jobs.items():
        codes = fork_ranks(
            1, lambda rank, name=name, fields=fields: measure(fields, plan.with_name(f"{name}.json"))
        )  # type: ignore[misc]
        if any(codes):
            sys.exit(f"{name} ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
