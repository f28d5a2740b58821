"""Which response of a prompt the meta-judge looks at (arXiv 2407.19594, section 2.2).

Judgments that disagree most have the most to teach, so it is the response whose scores vary most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Variances of scores with two decimals differ by more than this, or only by rounding.
TOLERANCE = 1e-9


def most_varied(scores_by_response: Mapping[int, Sequence[float]], draw: float) -> int | None:
    """The response whose judgments' scores have the largest population variance.

    Args:
        scores_by_response: for each response number, the scores of its readable judgments.
        draw: a uniform number in [0, 1), made by the caller; decides among tied responses, in number order.

    Returns:
        The response number; None where no response has two judgments. A variance of 0 is no bar: judgments
        with one score can still differ in their reasoning.

    Raises:
        ValueError: `draw` out of range, or a score that is not finite.
    """
    if not 0.0 <= draw < 1.0:
        raise ValueError(f"draw must be in [0, 1), not {draw}")
    variances: dict[int, float] = {}
    for response_id in sorted(scores_by_response):
        scores = np.asarray(scores_by_response[response_id], dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"response {response_id} has a score that is not finite")
        if scores.size >= 2:
            variances[response_id] = float(scores.var())
    if not variances:
        return None
    largest = max(variances.values())
    tied = [response_id for response_id, value in variances.items() if value >= largest - TOLERANCE]
    return tied[int(draw * len(tied))]
