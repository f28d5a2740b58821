"""From hidden states to a loss and the figures of a step: SFT and preference pairs on the same step.

An objective computes the head itself, so that it can take the op that fits: `linear_preference` for pairs, which needs three
matrix products in all, `linear_logprob` for SFT. It sums over a micro-batch, scaled by what the step gives it; the step gives one
over the weight of the global batch, so the loss does not depend on how a batch is split over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from metareward_kernels import Preference, linear_logprob, linear_preference
from metareward_kernels.linear_preference import chunk_size
from metareward_kernels.pair_losses import PairLogprobs, PairLoss, chosen_nll
from torch import Tensor

from metareward.config import TrainSettings
from metareward.training.examples import Example
from metareward.training.losses import pair_loss, rewards, uses_reference
from metareward.training.packing import PackedBatch

Sums = dict[str, float]


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what is told about it.

    weight(example): its share of the denominator.
    loss(batch, hidden, head, scale): hidden [R,H] at the micro-batch's rows and head [V,H], both differentiable, to
        (scale * the loss summed over the micro-batch, a [] tensor; figures summed likewise, without the scale).
    report(sums, weight): the figures of a whole step.
    recomputed_rows(batch): rows whose logits `loss` computes twice.
    fused_head: whether `loss` computes the head's gradients too, so that the backward pass has none of its products left.
    """

    weight: Callable[[Example], float]
    loss: Callable[[PackedBatch, Tensor, Tensor, float], tuple[Tensor, Sums]]
    report: Callable[[Sums, float], dict[str, float]]
    recomputed_rows: Callable[[PackedBatch], int]
    fused_head: bool


def sft_objective() -> Objective:
    """Mean negative log-prob of the target tokens."""

    def loss(batch: PackedBatch, hidden: Tensor, head: Tensor, scale: float) -> tuple[Tensor, Sums]:
        logprobs, entropy = linear_logprob(hidden, head, batch.targets, return_entropy=True)
        total = -batch.sum_completions(logprobs).sum()
        figures = torch.stack([total.detach(), entropy.double().sum()]).tolist()
        return scale * total, {"loss": figures[0], "entropy": figures[1]}

    # A token is an example's unit of weight here, so the denominators of loss and entropy are one.
    return Objective(
        lambda example: float(example.target_tokens),
        loss,
        lambda sums, weight: {"loss": sums["loss"] / weight, "entropy": sums["entropy"] / weight},
        lambda batch: sum(batch.lengths),
        fused_head=False,
    )


def pair_logprobs(batch: PackedBatch, hidden: Tensor, head: Tensor) -> Tensor:
    """[completions] float64: log-probs of pairs by the op that trains on them, for the reference."""
    reference = torch.zeros(len(batch.lengths), dtype=torch.float64)
    return preference(batch, hidden, head, reference, lambda pairs: pairs.margin, 1.0).logprobs


def preference(
    batch: PackedBatch, hidden: Tensor, head: Tensor, reference: Tensor, loss: PairLoss, scale: float
) -> Preference:
    """`linear_preference` of a micro-batch whose completions come as chosen, rejected, chosen, ..."""
    # On the CPU, where the op reads them.
    boundaries = torch.tensor([0, *accumulate(batch.lengths)])
    pairs = torch.arange(len(batch.lengths)).view(-1, 2)
    weights = torch.full((len(pairs),), scale, dtype=torch.float64)
    return linear_preference(
        hidden,
        head,
        batch.targets,
        boundaries,
        pairs,
        reference,
        loss,
        pair_weights=weights,
        return_entropy=True,
    )


def pair_objective(settings: TrainSettings, reference: Mapping[str, tuple[float, float]]) -> Objective:
    """Mean pair loss. `reference`: identity -> log-probs of chosen and rejected under M_t; not looked at by a loss that
    reads none.
    """
    compute = pair_loss(settings)
    referenced = uses_reference(settings)

    def loss(batch: PackedBatch, hidden: Tensor, head: Tensor, scale: float) -> tuple[Tensor, Sums]:
        fixed = torch.tensor(
            [reference[example.identity] if referenced else (0.0, 0.0) for example in batch.examples],
            dtype=torch.float64,
        ).flatten()
        found = preference(batch, hidden, head, fixed, compute, scale)
        return found.loss, pair_figures(settings, batch, found, fixed)

    # A frozen head has no gradient that would need the loss first.
    recomputed = (lambda batch: 0) if settings.lora_rank else rows_of_long_pairs
    return Objective(lambda example: 1.0, loss, report_pairs, recomputed, fused_head=True)


def rows_of_long_pairs(batch: PackedBatch) -> int:
    """Rows of pairs that `linear_preference` cannot take in one chunk: their loss is known after all their logits are gone."""
    chunk = chunk_size(batch.targets.device)
    pairs = zip(batch.lengths[::2], batch.lengths[1::2], strict=True)
    return sum(chosen + rejected for chosen, rejected in pairs if chosen + rejected > chunk)


@torch.no_grad()
def pair_figures(settings: TrainSettings, batch: PackedBatch, found: Preference, reference: Tensor) -> Sums:
    """Sums over the pairs of a micro-batch, all and by kind."""
    assert found.entropy is not None
    tokens = torch.tensor(batch.lengths, dtype=torch.float64, device=found.logprobs.device)
    sides = (values.view(-1, 2).unbind(1) for values in (found.logprobs, reference.to(tokens.device), tokens))
    pairs = PairLogprobs(*(side for both in sides for side in both))
    chosen, rejected = rewards(settings, pairs)
    table = {
        "loss": found.losses,
        "chosen_logprob": pairs.chosen,
        "rejected_logprob": pairs.rejected,
        "entropy": (found.entropy * tokens).view(-1, 2).sum(1),
        "completion_tokens": tokens.view(-1, 2).sum(1),
    }
    if settings.nll_weight:
        table["chosen_nll"] = chosen_nll(pairs)
    # One transfer from the device for all figures; the margins come last.
    *columns, margins = torch.stack([*table.values(), chosen - rejected]).tolist()
    figures: Sums = {name: sum(column) for name, column in zip(table, columns, strict=True)}
    for example, margin in zip(batch.examples, margins, strict=True):
        # The implicit reward margin; right where it is positive.
        for name, value in (("pairs", 1.0), ("margin", margin), ("right", float(margin > 0))):
            figures[f"{name}.{example.kind}"] = figures.get(f"{name}.{example.kind}", 0.0) + value
    return figures


def report_pairs(sums: Sums, weight: float) -> dict[str, float]:
    """Figures of a step: means over pairs; accuracy and margin by kind too. entropy is a mean over completion tokens, in nats."""
    means = ("loss", "chosen_logprob", "rejected_logprob", "chosen_nll")
    report = {name: sums[name] / weight for name in means if name in sums}
    report["entropy"] = sums["entropy"] / sums["completion_tokens"]
    kinds = sorted(name.split(".")[1] for name in sums if name.startswith("pairs."))
    report["accuracy"] = sum(sums[f"right.{kind}"] for kind in kinds) / weight
    report["margin"] = sum(sums[f"margin.{kind}"] for kind in kinds) / weight
    for kind in kinds:
        count = sums[f"pairs.{kind}"]
        report[f"accuracy_{kind}"] = sums[f"right.{kind}"] / count
        report[f"margin_{kind}"] = sums[f"margin.{kind}"] / count
    return report
