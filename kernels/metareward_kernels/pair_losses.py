"""Losses of preference pairs, each written once, in plain PyTorch, on [P] vectors.

Every loss takes `PairLogprobs` and returns a [P] vector in its dtype, pair by pair: element p depends on pair p alone.
That is what lets `linear_preference` differentiate a loss chunk by chunk. A loss knows nothing of batches, ranks or
models; averaging is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLogprobs(NamedTuple):
    """What a pair loss may read; P pairs. Log-probs are summed over the completion's tokens, in nats."""

    chosen: Tensor  # [P] log pi(chosen | prompt)
    rejected: Tensor  # [P]
    chosen_reference: Tensor  # [P] the same under the reference policy; zeros where a loss has none
    rejected_reference: Tensor  # [P]
    chosen_tokens: Tensor  # [P] the completion's length in tokens, at least 1 for length-normalised losses
    rejected_tokens: Tensor  # [P]

    @property
    def chosen_ratio(self) -> Tensor:
        """[P] log pi / pi_ref of the chosen completion."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        """[P] log pi / pi_ref of the rejected completion."""
        return self.rejected - self.rejected_reference

    @property
    def margin(self) -> Tensor:
        """[P] log ratio of chosen minus that of rejected."""
        return self.chosen_ratio - self.rejected_ratio


PairLoss = Callable[[PairLogprobs], Tensor]


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(logits); with smoothing e, (1-e) of it plus e of -log sigmoid(-logits)."""
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def dpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta margin) (arXiv 2305.18290, equation 7); with smoothing e, (1-e) of it plus e of the swapped pair's."""
    return logistic(beta * pairs.margin, label_smoothing)


def dpo_norm(pairs: PairLogprobs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): each log ratio is divided by its completion's tokens."""
    chosen = pairs.chosen_ratio / pairs.chosen_tokens
    rejected = pairs.rejected_ratio / pairs.rejected_tokens
    return logistic(beta * (chosen - rejected), label_smoothing)


def simpo(pairs: PairLogprobs, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (mean log-prob of chosen - of rejected) - gamma) (SimPO, arXiv 2405.14734, equation 6).

    Reads no reference. The mean is over the completion's tokens; gamma is the reward margin that is asked for.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def ipo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(margin - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17)."""
    return (pairs.margin - 1.0 / (2.0 * beta)) ** 2


def hinge(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """max(0, 1 - beta margin) (SLiC-HF, arXiv 2305.10425)."""
    return F.relu(1.0 - beta * pairs.margin)


def sppo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(log ratio of chosen - 1/(2 beta))^2 + (that of rejected + 1/(2 beta))^2 (SPPO, arXiv 2405.00675).

    1/beta is the paper's eta. The probabilities of winning are taken as 1 and 0, the paper's hard labels. Unlike the
    other losses it tells each completion where its log ratio should be, not only how far apart they should be.
    """
    target = 1.0 / (2.0 * beta)
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def chosen_nll(pairs: PairLogprobs) -> Tensor:
    """Mean negative log-prob of the chosen completion's tokens, a term to add to a loss (as in arXiv 2404.19733)."""
    return -pairs.chosen / pairs.chosen_tokens
