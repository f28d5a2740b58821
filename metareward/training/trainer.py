"""Training from a model directory and examples to a new model directory, resumable at every checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from metareward.config import TrainSettings
from metareward.model.data_sheets import no_mfu, peak_flops
from metareward.model.decoder import Decoder
from metareward.phases import UNRECORDED, Phases
from metareward.training.checkpoint import load_checkpoint
from metareward.training.checkpoint_writer import CheckpointWriter
from metareward.training.examples import DataOrder, Example, micro_batches
from metareward.training.head_weight import head_weight
from metareward.training.objectives import Objective, pair_logprobs
from metareward.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from metareward.training.packing import pack, work_of
from metareward.training.peak_memory import measured_phases
from metareward.training.sharded import reshard
from metareward.training.step import StepResult, hidden_states, train_step

logger = logging.getLogger("metareward")

OnStep = Callable[[int, int, Mapping[str, float]], None]
"""(step from 1, steps in all, figures)"""


@dataclass(frozen=True)
class TrainingSet:
    """Examples in their order. `filler` is what a rank with nothing to do computes, with weight 0."""

    examples: Sequence[Example]
    order: DataOrder
    micro_batch_tokens: int

    def micro(self, step: int) -> list[list[Example]]:
        """This rank's micro-batches of optimizer step `step`."""
        tokens = [example.tokens for example in self.examples]
        indices = self.order.indices(step)
        kinds = [example.kind for example in self.examples]
        plan = micro_batches(indices, kinds, tokens, self.micro_batch_tokens, dist.get_world_size())[
            dist.get_rank()
        ]
        return [[self.examples[index] for index in batch] for batch in plan]

    @property
    def filler(self) -> Example:
        return min(self.examples, key=lambda example: (example.tokens, example.identity))


@torch.no_grad()
def logprobs_of(
    decoder: Decoder,
    data: TrainingSet,
    device: torch.device,
    on_examples: Callable[[int], None],
    phases: Phases = UNRECORDED,
) -> dict[str, tuple[float, ...]]:
    """Log-probs of every pair under the decoder as it is: identity -> (chosen, rejected).

    Goes through the first epoch's own micro-batches and the step's own op, so that with equal weights the first epoch computes
    the very same numbers and the first DPO loss is ln 2. A collective; the result is the same on every rank.
    """
    mine: dict[str, tuple[float, ...]] = {}
    for step in range(data.order.steps_per_epoch):
        for examples in data.micro(step):
            phases.mark("data")
            batch = pack(examples or [data.filler], device)
            phases.mark("forward", **work_of(batch))
            sums = pair_logprobs(batch, hidden_states(decoder, batch), head_weight(decoder)).tolist()
            place = 0
            for example in examples:
                mine[example.identity] = tuple(sums[place : place + len(example.completions)])
                place += len(example.completions)
        phases.mark("data")
        on_examples(len(data.order.indices(step)))
        phases.step()
    phases.mark("wait")
    reshard(decoder)
    everyone: list[dict[str, tuple[float, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {identity: values for part in everyone for identity, values in part.items()}
    assert len(found) == len(data.examples), "two examples have one identity"
    phases.mark("other")
    return found


def train(
    decoder: Decoder,
    data: TrainingSet,
    objective: Objective,
    settings: TrainSettings,
    checkpoints: Path,
    device: torch.device,
    on_step: OnStep,
    phases: Phases = UNRECORDED,
) -> None:
    """Train `decoder` in place, from the newest checkpoint in `checkpoints` to the last step. A collective."""
    optimizer = build_optimizer(decoder, settings)
    phases.mark("load")
    start = load_checkpoint(checkpoints, decoder, optimizer)
    with CheckpointWriter(checkpoints, settings.keep_checkpoints, settings.async_checkpoints) as writer:
        train_from(start, decoder, optimizer, data, objective, settings, writer, device, on_step, phases)
        phases.mark("checkpoint")


def train_from(
    start: int,
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    data: TrainingSet,
    objective: Objective,
    settings: TrainSettings,
    writer: CheckpointWriter,
    device: torch.device,
    on_step: OnStep,
    phases: Phases,
) -> None:
    """Optimizer steps `start` (from 0) to the last."""
    steps = data.order.steps
    peak = peak_flops(device, settings.compute_dtype)
    if peak is None and dist.get_rank() == 0:
        logger.info("%s", no_mfu(device, settings.compute_dtype))
    for step in range(start, steps):
        began = time.perf_counter()
        phases.mark("data")
        rate = learning_rate(step, steps, settings)
        set_learning_rate(optimizer, rate)
        weight = sum(objective.weight(data.examples[index]) for index in data.order.indices(step))
        # Of the first step alone: the others are like it.
        watch: AbstractContextManager[dict[str, float]] = (
            measured_phases(decoder, optimizer, device) if step == start else nullcontext({})
        )
        with watch as peaks:
            result = train_step(
                decoder,
                optimizer,
                objective,
                data.micro(step),
                weight,
                data.filler,
                settings.max_grad_norm,
                device,
                phases,
            )
        done = step + 1
        seconds = time.perf_counter() - began
        figures = {
            **result.figures,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens": float(result.tokens),
            "unshared_tokens": float(result.unshared_tokens),
            "seconds": seconds,
            "tokens_per_s": result.tokens / seconds,
            **device_rates(result, seconds, peak),
            **largest_over_ranks(peaks),
        }
        # The last step needs no checkpoint: the finished model follows at once.
        if done % settings.checkpoint_steps == 0 and done < steps:
            phases.mark("checkpoint")
            writer.save(done, decoder, optimizer)
        phases.mark("write")
        on_step(done, steps, figures)
        phases.step()


def largest_over_ranks(peaks: dict[str, float]) -> dict[str, float]:
    """Every figure's largest value over all ranks; a collective where there are figures, which all ranks have or none."""
    if not peaks or dist.get_world_size() == 1:
        return peaks
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, peaks)
    return {name: max(found[name] for found in everyone) for name in peaks}


def device_rates(result: StepResult, seconds: float, peak: float | None) -> dict[str, float]:
    """TFLOP/s of one device, and where its peak rate (FLOP/s) is known the share of it that the step's own FLOPs are."""
    device_seconds = seconds * dist.get_world_size()
    rates = {
        "tflops": result.flops / device_seconds / 1e12,
        "recomputed_tflops": result.recomputed_flops / device_seconds / 1e12,
    }
    if peak is not None:
        rates["mfu"] = result.flops / device_seconds / peak
    return rates
