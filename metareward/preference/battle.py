"""From verdicts to the battle matrix, with the correction for position bias (arXiv 2407.19594, section 2.2).

A verdict is keyed by the two judgments it compares and their order, never by its place in a list: a
comparison that is missing cannot shift the credit of the others. Judgment ids belong to one response; only
`position_weights` is meant for verdicts of many responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Verdict:
    """One comparison: the judgments shown first and second, and which of them won (None: unreadable)."""

    first: int
    second: int
    winner: Literal["first", "second"] | None

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"judgment {self.first} is compared with itself")
        if self.winner not in ("first", "second", None):
            raise ValueError(f'winner must be "first", "second" or None, not {self.winner!r}')

    @property
    def winning(self) -> int | None:
        """The id of the judgment that won."""
        return {"first": self.first, "second": self.second, None: None}[self.winner]


def position_weights(verdicts: Iterable[Verdict]) -> tuple[float, float]:
    """Weights of a win in first and in second position, from all comparisons of an iteration.

    w1 = win_2nd / (win_1st + win_2nd) and w2 = win_1st / (win_1st + win_2nd): the position that wins more
    often counts less, so that over the iteration both positions hand out the same credit. With no win at all,
    1/2 each.
    """
    winners = [verdict.winner for verdict in verdicts]
    first, second = winners.count("first"), winners.count("second")
    if first + second == 0:
        return 0.5, 0.5
    return second / (first + second), first / (first + second)


def battle_matrix(ids: Sequence[int], verdicts: Iterable[Verdict], w1: float, w2: float) -> np.ndarray:
    """Weighted wins of every judgment of a response over every other.

    B_mn = w1 [r_mn = 1] + w2 [r_nm = -1], where r_mn = 1 says that m, shown first, beat n, and r_nm = -1 that
    m, shown second, beat n.

    Args:
        ids: the n judgments, in the order of the matrix.
        verdicts: at most one for each ordered pair of them; unreadable ones count for nobody.
        w1: weight of a win in first position.
        w2: weight of a win in second position.

    Returns:
        [n, n] float64, row beats column, diagonal 0.

    Raises:
        ValueError: a repeated judgment or comparison, or a comparison with a judgment that is not in `ids`.
    """
    place = {judgment: index for index, judgment in enumerate(ids)}
    if len(place) != len(ids):
        raise ValueError("a judgment id occurs twice")
    battles = np.zeros((len(ids), len(ids)))
    for (first, second), verdict in _by_order(verdicts).items():
        if first not in place or second not in place:
            raise ValueError(f"the comparison of {first} with {second} names a judgment that is not in ids")
        if verdict.winner == "first":
            battles[place[first], place[second]] += w1
        elif verdict.winner == "second":
            battles[place[second], place[first]] += w2
    return battles


def consistent_only(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts of one response that name the same judgment in both orders: an option beyond the paper.

    A pair that was compared in one order only, or has an unreadable verdict, is left out. What remains has as
    many wins in either position.

    Raises:
        ValueError: a repeated comparison.
    """
    by_order = _by_order(verdicts)
    kept = []
    for (first, second), verdict in by_order.items():
        other = by_order.get((second, first))
        if other is not None and verdict.winning is not None and verdict.winning == other.winning:
            kept.append(verdict)
    return kept


def _by_order(verdicts: Iterable[Verdict]) -> dict[tuple[int, int], Verdict]:
    by_order: dict[tuple[int, int], Verdict] = {}
    for verdict in verdicts:
        key = (verdict.first, verdict.second)
        if key in by_order:
            raise ValueError(f"the comparison of {verdict.first} with {verdict.second} occurs twice")
        by_order[key] = verdict
    return by_order
