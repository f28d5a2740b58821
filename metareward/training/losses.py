"""The pair loss that a recipe names, and what goes with it: its rewards, and whether it reads a reference.

The formulas are in metareward_kernels.pair_losses, each written once.
"""

from __future__ import annotations

from functools import partial

from metareward_kernels.pair_losses import (
    PairLogprobs,
    PairLoss,
    chosen_nll,
    dpo,
    dpo_norm,
    hinge,
    ipo,
    simpo,
    sppo,
)
from torch import Tensor

from metareward.config import TrainSettings

__all__ = ["PairLogprobs", "PairLoss", "pair_loss", "rewards", "uses_reference"]


def pair_loss(settings: TrainSettings) -> PairLoss:
    """The loss that the recipe names, with its numbers filled in and the NLL term added where one is asked for."""
    beta, smoothing = settings.beta, settings.label_smoothing
    losses: dict[str, PairLoss] = {
        "dpo": partial(dpo, beta=beta, label_smoothing=smoothing),
        "dpo_norm": partial(dpo_norm, beta=beta, label_smoothing=smoothing),
        "simpo": partial(simpo, beta=beta, gamma=settings.simpo_gamma, label_smoothing=smoothing),
        "ipo": partial(ipo, beta=beta),
        "hinge": partial(hinge, beta=beta),
        "sppo": partial(sppo, beta=beta),
    }
    chosen = losses[settings.loss]
    if not settings.nll_weight:
        return chosen
    return lambda pairs: chosen(pairs) + settings.nll_weight * chosen_nll(pairs)


def rewards(settings: TrainSettings, pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """[P] implicit rewards of chosen and rejected, as the loss compares them: beta times the log ratio to the reference,
    a token for dpo_norm; beta times the mean log-prob for simpo.
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    if settings.loss == "simpo":
        chosen, rejected = pairs.chosen, pairs.rejected
    if settings.loss in ("dpo_norm", "simpo"):
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return settings.beta * chosen, settings.beta * rejected


def uses_reference(settings: TrainSettings) -> bool:
    """Whether the loss reads the log-probs of a reference policy."""
    return settings.loss != "simpo"
