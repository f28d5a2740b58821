"""Refuse a training that will not fit, in one sentence that says what to set instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.training.examples import Example
from metareward.training.memory import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class Workload:
    """What is trained on what: the estimate's arguments apart from the settings. batch: examples a step over all ranks."""

    config: ModelConfig
    examples: Sequence[Example]
    batch: int
    world_size: int
    device_type: str

    def estimate(self, settings: TrainSettings) -> MemoryEstimate:
        return estimate_memory(
            self.config, settings, self.examples, self.batch, self.world_size, self.device_type
        )


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory, in words, and what it changes."""

    words: str
    changes: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None


def check_memory(work: Workload, settings: TrainSettings, free: int) -> MemoryEstimate:
    """The estimate, where it is within `free` bytes or the recipe does not want the check.

    Raises:
        UserError: it is not; with the first change, or the first few together, that would bring it within.
    """
    estimate = work.estimate(settings)
    if estimate.peak <= free or not settings.check_memory:
        return estimate
    raise UserError(
        f"{estimate.sentence()}, and {free / 1e9:.2f} GB are free: {advice(work, settings, free)}; "
        f"train.check_memory = false tries it all the same"
    )


def advice(work: Workload, settings: TrainSettings, free: int) -> str:
    """What to change: one thing where one is enough, else as many as it takes, cheapest first."""
    found = remedies(work, settings)
    for remedy in found:
        if fits([remedy], work, settings, free):
            return told([remedy])
    for count in range(2, len(found) + 1):
        if fits(found[:count], work, settings, free):
            return told(found[:count])
    return "no setting saves enough; take a smaller model, or " + (
        "a machine with more memory" if work.device_type == "cpu" else "more or larger GPUs"
    )


def fits(chosen: Sequence[Remedy], work: Workload, settings: TrainSettings, free: int) -> bool:
    for remedy in chosen:
        settings = replace(settings, **remedy.changes)
        work = work if remedy.world_size is None else replace(work, world_size=remedy.world_size)
    return work.estimate(settings).peak <= free


def told(chosen: Sequence[Remedy]) -> str:
    """The changes as a part of a sentence; of two to the same setting the later one counts."""
    last = {tuple(remedy.changes) or ("processes",): remedy.words for remedy in chosen}
    return " and ".join(last.values())


def remedies(work: Workload, settings: TrainSettings) -> list[Remedy]:
    """Changes that save memory, those that cost least time first; micro-batches never become smaller than the longest example."""
    found: list[Remedy] = []
    if work.estimate(settings).copy:
        found.append(Remedy("set train.async_checkpoints = false", {"async_checkpoints": False}))
    longest = max(example.tokens for example in work.examples)
    for tokens in (settings.micro_batch_tokens // 2, settings.micro_batch_tokens // 4):
        if tokens >= longest:
            found.append(Remedy(f"set train.micro_batch_tokens = {tokens}", {"micro_batch_tokens": tokens}))
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(settings.activation_checkpointing) + 1 :]:
        words = f'set train.activation_checkpointing = "{mode}"'
        found.append(Remedy(words, {"activation_checkpointing": mode}))
    if longest < settings.micro_batch_tokens:
        found.append(Remedy(f"set train.micro_batch_tokens = {longest}", {"micro_batch_tokens": longest}))
    if settings.compute_dtype == "float32":
        found.append(Remedy('set train.compute_dtype = "bfloat16"', {"compute_dtype": "bfloat16"}))
    if settings.shard_within not in (0, work.world_size):
        found.append(Remedy("set train.shard_within = 0", {"shard_within": 0}))
    ranks = work.world_size * 2
    # Processes on a CPU share its memory.
    while work.device_type != "cpu" and ranks <= work.batch and work.batch % ranks == 0:
        found.append(Remedy(f"start {ranks} processes on as many GPUs", {}, ranks))
        ranks *= 2
    return found
