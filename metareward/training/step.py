"""One optimizer step over a global batch: micro-batches forward and backward, one check, one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.model.flops import Flops, Work, step_flops
from metareward.phases import UNRECORDED, Phases
from metareward.training.examples import Example
from metareward.training.head_weight import head_weight, hold_head
from metareward.training.lora import adapter_weights
from metareward.training.objectives import Objective, Sums
from metareward.training.packing import PackedBatch, pack, tree_attention, work_of
from metareward.training.peak_memory import give_back_freed


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite; nothing was updated."""


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step, over all ranks and the same on every rank.

    flops: of forward and backward, see `model.flops`; recomputed_flops: on top of them.
    """

    figures: dict[str, float]
    grad_norm: float
    tokens: int
    unshared_tokens: int
    flops: float
    recomputed_flops: float


def target_logprobs(decoder: Decoder, batch: PackedBatch) -> torch.Tensor:
    """[R] float32: the log-prob of every completion token of the micro-batch, in the order of `batch.targets`."""
    attend = tree_attention(batch.segments)
    return decoder(batch.token_ids, batch.positions, attend, rows=batch.rows, targets=batch.targets)


def hidden_states(decoder: Decoder, batch: PackedBatch) -> torch.Tensor:
    """[R,H] in the compute dtype: the normed hidden states from which the micro-batch's completion tokens are predicted."""
    return decoder(batch.token_ids, batch.positions, tree_attention(batch.segments), rows=batch.rows)


def train_step(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    micro: Sequence[Sequence[Example]],
    weight: float,
    filler: Example,
    max_grad_norm: float,
    device: torch.device,
    phases: Phases = UNRECORDED,
) -> StepResult:
    """Accumulate the gradient of this rank's micro-batches, check it, clip it, update.

    The decoder may be sharded by FSDP2 or not at all. Gradients of blocks are reduced after every micro-batch, in float32;
    that of the head (and of an embedding tied to it) once at the end.

    Args:
        micro: this rank's micro-batches; an empty one is computed on `filler` with weight 0, because every rank must take part
            in every collective.
        weight: the objective's weight of the whole global batch, over all ranks.
        phases: is told what time goes to.

    Raises:
        TrainingDiverged: before the update, with the identities of the batch.
    """
    world_size = dist.get_world_size()
    assert micro, "a step without a micro-batch: the gradient would never be reduced"
    optimizer.zero_grad(set_to_none=True)
    totals: Sums = {}
    totals["tokens"] = totals["unshared_tokens"] = totals["flops"] = totals["recomputed_flops"] = 0.0
    for number, examples in enumerate(micro, start=1):
        phases.mark("data")
        batch = pack(examples or [filler], device)
        phases.mark("forward", **work_of(batch, objective.fused_head))
        hold_head(decoder, last=number == len(micro))
        # FSDP averages gradients over ranks; the product undoes that, and the quotient makes the mean over the global batch.
        scale = world_size / weight if examples else 0.0
        loss, figures = objective.loss(batch, hidden_states(decoder, batch), head_weight(decoder), scale)
        phases.mark("backward")
        loss.backward()
        give_back_freed(device)
        phases.mark("data")
        if examples:
            totals["tokens"] += batch.tokens
            totals["unshared_tokens"] += batch.unshared_tokens
            work = flops_of(decoder, objective, batch)
            totals["flops"] += work.model
            totals["recomputed_flops"] += work.recomputed
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value
    phases.mark("communication")
    norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), max_grad_norm)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    totals = add_over_ranks(totals)
    figures = objective.report(totals, weight)
    if not (torch.isfinite(torch.tensor([figures["loss"], grad_norm]))).all():
        identities = gather_identities(micro)
        raise TrainingDiverged(
            f"the loss is {figures['loss']} and the gradient norm {grad_norm} on the batch {', '.join(identities)}: "
            f"nothing was updated and the last checkpoint is good; look at these examples, or start a new run with a lower "
            f"learning rate"
        )
    phases.mark("optimizer", passes=1)
    optimizer.step()
    phases.mark("data")
    return StepResult(
        figures,
        grad_norm,
        int(totals["tokens"]),
        int(totals["unshared_tokens"]),
        totals["flops"],
        totals["recomputed_flops"],
    )


def flops_of(decoder: Decoder, objective: Objective, batch: PackedBatch) -> Flops:
    """Forward and backward of one micro-batch."""
    return step_flops(
        decoder.config,
        Work.of(work_of(batch)),
        recompute_blocks=decoder.activation_checkpointing == "full",
        recomputed_head_rows=objective.recomputed_rows(batch),
        adapter_weights=adapter_weights(decoder),
    )


def add_over_ranks(totals: Sums) -> Sums:
    """Sums over all ranks, added in rank order."""
    if dist.get_world_size() == 1:
        return totals
    everyone: list[Sums] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, totals)
    added: Sums = {}
    for sums in everyone:
        for name, value in sums.items():
            added[name] = added.get(name, 0.0) + value
    return added


def gather_identities(micro: Sequence[Sequence[Example]]) -> list[str]:
    mine = [example.identity for examples in micro for example in examples]
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted(identity for identities in everyone for identity in identities)
