"""The pair loss that a recipe names. The losses themselves are in metareward_kernels.pair_losses, each written once."""

from __future__ import annotations

from metareward_kernels.pair_losses import PairLogprobs, PairLoss, dpo, hinge, ipo

from metareward.config import TrainSettings

__all__ = ["PairLogprobs", "PairLoss", "pair_loss"]


def pair_loss(settings: TrainSettings) -> PairLoss:
    """The loss that the recipe names, with its numbers filled in."""
    if settings.loss == "dpo":
        return lambda pairs: dpo(pairs, beta=settings.beta, label_smoothing=settings.label_smoothing)
    plain = {"ipo": ipo, "hinge": hinge}[settings.loss]
    return lambda pairs: plain(pairs, beta=settings.beta)
