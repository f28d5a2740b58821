"""Win rate of one model over another from pairwise verdicts in both orders. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from metareward.assessment.interval import Estimate, Resampling, estimate_ratio

Winner = Literal["first", "second"] | None


def preference_of_orders(shown_first: Winner, shown_second: Winner) -> float | None:
    """How far a judge prefers the model over the baseline, from its verdicts in both orders.

    Args:
        shown_first: who won where the model's response came first.
        shown_second: who won where it came second.

    Returns:
        1 where the model won in both orders, 0 where it lost in both, 1/2 where the judge changed its mind with the order. None
        where either verdict cannot be read: half a comparison would carry the judge's position preference into the win rate.
    """
    if shown_first is None or shown_second is None:
        return None
    return ((shown_first == "first") + (shown_second == "second")) / 2


@dataclass(frozen=True)
class WinRate:
    """`win_rate`: mean preference for the model. `wins`, `ties` and `losses` count preferences above, at and below 1/2; `left_out`
    those that are None. Lengths are mean characters of the responses that were compared."""

    prompts: int
    left_out: int
    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    length: float | None
    baseline_length: float | None


def win_rate(
    prompt_ids: Sequence[str],
    preferences: Sequence[float | None],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    resampling: Resampling,
) -> WinRate:
    """Win rate over prompts, with its interval; `preferences` in [0, 1], 1 for the model.

    Raises:
        ValueError: a preference outside of [0, 1], or lists that differ in length.
    """
    rows = [
        row
        for row in zip(prompt_ids, preferences, lengths, baseline_lengths, strict=True)
        if row[1] is not None
    ]
    known = np.array([row[1] for row in rows], dtype=np.float64)
    if not ((known >= 0) & (known <= 1)).all():
        raise ValueError("a preference is outside of [0, 1]")
    return WinRate(
        prompts=len(rows),
        left_out=len(preferences) - len(rows),
        win_rate=estimate_ratio(known, np.ones(len(rows)), [row[0] for row in rows], resampling),
        wins=int((known > 0.5).sum()),
        ties=int((known == 0.5).sum()),
        losses=int((known < 0.5).sum()),
        length=float(np.mean([row[2] for row in rows])) if rows else None,
        baseline_length=float(np.mean([row[3] for row in rows])) if rows else None,
    )
