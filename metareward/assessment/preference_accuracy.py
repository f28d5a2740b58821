"""How often a judge's scores prefer what people preferred, on pairs of responses. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metareward.assessment.interval import Estimate, Resampling, estimate_ratio


@dataclass(frozen=True)
class PreferenceAccuracy:
    """`accuracy`: share of the `scored` pairs whose chosen response has the higher mean score, a tie counting half; `tied`: share
    of ties; `accuracy_untied`: share among the others. `pairs` counts those without a score on either side too."""

    pairs: int
    scored: int
    accuracy: Estimate
    accuracy_untied: Estimate
    tied: Estimate


def preference_accuracy(
    prompt_ids: Sequence[str],
    chosen: Sequence[float | None],
    rejected: Sequence[float | None],
    resampling: Resampling,
) -> PreferenceAccuracy:
    """Accuracy of a judge that gave these mean scores to the chosen and the rejected response of each pair.

    A pair with an unscored side (None) is left out and counted.

    Raises:
        ValueError: the three differ in length.
    """
    known = [
        (prompt_id, one, two)
        for prompt_id, one, two in zip(prompt_ids, chosen, rejected, strict=True)
        if one is not None and two is not None
    ]
    ids = [row[0] for row in known]
    order = np.sign([row[1] - row[2] for row in known])
    tied, one = (order == 0) * 1.0, np.ones(len(known))
    return PreferenceAccuracy(
        pairs=len(prompt_ids),
        scored=len(known),
        accuracy=estimate_ratio((order + 1) / 2, one, ids, resampling),
        accuracy_untied=estimate_ratio((order > 0) * 1.0, 1 - tied, ids, resampling),
        tied=estimate_ratio(tied, one, ids, resampling),
    )
