"""The trainer's full path on the ranks there are, as the train stage calls it: load, reference log-probs, train, gather.

Imported by conftest.py for one process, and for `run_ranks`, which starts it as a script for several: one process imports
everything and forks the ranks. Its arguments are the path of a list of `Job`s saved by torch.save and the number of ranks. Every
rank writes what it saw to `<job>-<rank>.pt`.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.run import ranks
from metareward.training.examples import DataOrder, Example
from metareward.training.objectives import Objective, Sums, pair_objective, sft_objective
from metareward.training.packing import PackedBatch
from metareward.training.sharded import load_sharded, whole_tensors
from metareward.training.trainer import TrainingSet, logprobs_of, train

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


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
    held: int = 0
    """Elements of the weights on this rank."""


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
    held = sum(
        (part.to_local() if isinstance(part, DTensor) else part).numel() for part in decoder.parameters()
    )
    weights = {name: value.clone() for name, value in whole_tensors(decoder)}
    return Outcome(steps, weights, reference, error, held)


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


def fork_ranks(processes: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in that many processes with torchrun's environment variables.

    Returns every rank's exit code, 1 after an exception and negative after a signal. One that dies of a signal takes the
    others along, as it would under torchrun.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = {}
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children[pid] = rank
    codes = [0] * processes
    while children:
        pid, status = os.wait()
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):
            for other in children:
                os.kill(other, signal.SIGKILL)
    return codes


def run_script(name: str, *arguments: str) -> None:
    """Run a script of this folder in a process of its own; an error there is one here, with what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


def run_ranks(
    jobs: dict[str, dict[str, Any]], folder: Path, processes: int
) -> dict[str, list[dict[str, Any]]]:
    """Name -> the outcome of each rank, as a dictionary."""
    plan = folder / "plan.pt"
    torch.save(jobs, plan)
    run_script("rank_worker.py", str(plan), str(processes))
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]
        for name in jobs
    }


def check_equal(found: dict[str, Any], wanted: Outcome) -> None:
    """A rank's outcome is that of one process, to 1e-5: every figure of every step that both made, and the final weights."""
    assert found["steps"]
    timing = {"seconds", "tokens", "tokens_per_s", "tflops", "recomputed_tflops"}
    for left, right in zip(found["steps"][::-1], wanted.steps[::-1], strict=False):
        for figure in right.keys() - timing:
            if not figure.startswith("peak_bytes"):
                assert math.isclose(left[figure], right[figure], rel_tol=1e-5, abs_tol=1e-6), (
                    figure,
                    left,
                    right,
                )
    assert found["weights"].keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()), msg=name
        )


def main(plan: Path, processes: int) -> None:
    # Else every rank would import it anew, which takes it longer than all else.
    import torch._dynamo

    jobs: dict[str, dict[str, Any]] = torch.load(plan, weights_only=False)

    def work(rank: int) -> None:
        ranks.start_ranks()
        for name, fields in jobs.items():
            torch.save(vars(run(Job(**fields))), plan.with_name(f"{name}-{rank}.pt"))
        ranks.stop_ranks()

    codes = fork_ranks(processes, work)
    if any(codes):
        sys.exit(f"the ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
