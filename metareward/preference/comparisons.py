"""Which judgments the meta-judge compares, and in which order (arXiv 2407.19594, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def comparison_orders(
    judgment_ids: Sequence[int], *, skip_equal_scores: Mapping[int, float] | None = None
) -> list[tuple[int, int]]:
    """Both orders of every unordered pair of judgments: n (n - 1) comparisons, 110 for the paper's 11.

    The list is sorted by the judgment shown first, because comparisons that share it share a longer prefix of
    the prompt.

    Args:
        judgment_ids: the readable judgments of one response.
        skip_equal_scores: the judgments' scores; pairs with equal scores are then left out. None, as in the
            paper, compares every pair.

    Returns:
        (judgment shown first, judgment shown second), ascending.

    Raises:
        ValueError: a repeated judgment, or one without a score where scores are given.
    """
    ids = sorted(judgment_ids)
    if len(set(ids)) != len(ids):
        raise ValueError("a judgment id occurs twice")
    pairs = [(first, second) for first in ids for second in ids if first != second]
    if skip_equal_scores is None:
        return pairs
    missing = [judgment for judgment in ids if judgment not in skip_equal_scores]
    if missing:
        raise ValueError(f"no score is given for the judgments {missing}")
    return [pair for pair in pairs if skip_equal_scores[pair[0]] != skip_equal_scores[pair[1]]]
