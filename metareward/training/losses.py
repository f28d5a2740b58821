"""Pair losses, each written once, on [pairs] vectors of log-prob ratios.

log ratio = log pi(completion) - log pi_ref(completion), summed over the completion's tokens; margin = chosen - rejected. Every loss
returns a [pairs] vector, in the dtype of its inputs, and knows nothing of batches, ranks or models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from metareward.config import TrainSettings

PairLoss = Callable[[Tensor, Tensor], Tensor]


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta margin) (arXiv 2305.18290, equation 7); with smoothing e, (1-e) of it plus e of the swapped pair's."""
    logits = beta * (chosen - rejected)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17)."""
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta margin) (SLiC-HF, arXiv 2305.10425)."""
    return F.relu(1.0 - beta * (chosen - rejected))


def pair_loss(settings: TrainSettings) -> PairLoss:
    """The loss that the recipe names, with its numbers filled in."""
    if settings.loss == "dpo":
        return lambda chosen, rejected: dpo(
            chosen, rejected, beta=settings.beta, label_smoothing=settings.label_smoothing
        )
    plain = {"ipo": ipo, "hinge": hinge}[settings.loss]
    return lambda chosen, rejected: plain(chosen, rejected, beta=settings.beta)
