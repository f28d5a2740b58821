"""From the log-probs of completions to a loss and the figures of a step: SFT and preference pairs on the same step.

An objective returns sums; the step divides by the weight of the global batch, so the loss does not depend on how a batch is split
over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from metareward_kernels.pair_losses import PairLogprobs
from torch import Tensor

from metareward.config import TrainSettings
from metareward.training.examples import Example
from metareward.training.losses import pair_loss
from metareward.training.packing import PackedBatch

Sums = dict[str, float]


@dataclass(frozen=True)
class Objective:
    """`weight(example)`: its share of the denominator. `loss(batch, sums)`: the loss summed over the micro-batch, and figures
    of it summed likewise; `sums` is [completions] float64. `report(sums, weight)`: the figures of a whole step."""

    weight: Callable[[Example], float]
    loss: Callable[[PackedBatch, Tensor], tuple[Tensor, Sums]]
    report: Callable[[Sums, float], dict[str, float]]


def sft_objective() -> Objective:
    """Mean negative log-prob of the target tokens."""

    def loss(batch: PackedBatch, sums: Tensor) -> tuple[Tensor, Sums]:
        total = -sums.sum()
        return total, {"loss": float(total.detach())}

    return Objective(
        lambda example: float(example.target_tokens),
        loss,
        lambda sums, weight: {"loss": sums["loss"] / weight},
    )


def pair_objective(settings: TrainSettings, reference: Mapping[str, tuple[float, float]]) -> Objective:
    """Mean pair loss. `reference`: identity -> log-probs of chosen and rejected under M_t."""
    compute = pair_loss(settings)

    def loss(batch: PackedBatch, sums: Tensor) -> tuple[Tensor, Sums]:
        policy = sums.view(-1, 2)
        fixed = torch.tensor(
            [reference[example.identity] for example in batch.examples],
            dtype=policy.dtype,
            device=policy.device,
        )
        tokens = torch.tensor(batch.lengths, dtype=policy.dtype, device=policy.device).view(-1, 2)
        pairs = PairLogprobs(*policy.unbind(1), *fixed.unbind(1), *tokens.unbind(1))
        losses = compute(pairs)
        with torch.no_grad():
            # margin = beta (log ratio of chosen - of rejected), the implicit reward margin; right where it is positive.
            margins = settings.beta * pairs.margin
            figures: Sums = {
                "loss": float(losses.sum()),
                "chosen_logprob": float(policy[:, 0].sum()),
                "rejected_logprob": float(policy[:, 1].sum()),
            }
            for example, margin in zip(batch.examples, margins.tolist(), strict=True):
                for name, value in (("pairs", 1.0), ("margin", margin), ("right", float(margin > 0))):
                    figures[f"{name}.{example.kind}"] = figures.get(f"{name}.{example.kind}", 0.0) + value
        return losses.sum(), figures

    return Objective(lambda example: 1.0, loss, report_pairs)


def report_pairs(sums: Sums, weight: float) -> dict[str, float]:
    """Loss, accuracy and margin of a step over all pairs, and accuracy and margin by kind."""
    report = {name: sums[name] / weight for name in ("loss", "chosen_logprob", "rejected_logprob")}
    kinds = sorted(name.split(".")[1] for name in sums if name.startswith("pairs."))
    report["accuracy"] = sum(sums[f"right.{kind}"] for kind in kinds) / weight
    report["margin"] = sum(sums[f"margin.{kind}"] for kind in kinds) / weight
    for kind in kinds:
        count = sums[f"pairs.{kind}"]
        report[f"accuracy_{kind}"] = sums[f"right.{kind}"] / count
        report[f"margin_{kind}"] = sums[f"margin.{kind}"] / count
    return report
