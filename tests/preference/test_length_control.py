"""Actor pairs: the rule by example, against a reading of it in exact fractions, and under rounding."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.preference.drops import DropReason
from metareward.preference.length_control import ActorPair, Scored, select_actor_pair


def test_rho_zero_is_best_against_worst_whatever_the_lengths() -> None:
    candidates = [Scored(0, 4.0, 900), Scored(1, 3.99, 1), Scored(2, 1.01, 9999), Scored(3, 1.0, 10)]
    assert select_actor_pair(candidates, 0.0) == ActorPair(0, 3, 4.0, 1.0)


def test_shortest_near_the_best_and_longest_near_the_worst() -> None:
    # S_max 5, S_min 1, rho 0.25: [4, 5] and [1, 2]
    candidates = [
        Scored(0, 5.0, 800),
        Scored(1, 4.0, 300),  # on the edge: inside
        Scored(2, 3.99, 10),
        Scored(3, 2.01, 9999),
        Scored(4, 2.0, 700),  # on the edge: inside
        Scored(5, 1.0, 200),
    ]
    assert select_actor_pair(candidates, 0.25) == ActorPair(1, 4, 4.0, 2.0)


def test_equal_lengths_go_to_score_then_number() -> None:
    candidates = [
        Scored(5, 4.5, 10),
        Scored(4, 5.0, 10),
        Scored(3, 5.0, 10),
        Scored(2, 1.5, 90),
        Scored(1, 1.0, 90),
        Scored(0, 1.0, 90),
    ]
    for order in permutations(candidates):
        assert select_actor_pair(order, 0.25) == ActorPair(3, 0, 5.0, 1.0)


@pytest.mark.parametrize(
    ("candidates", "rho", "reason"),
    [
        ([], 0.0, DropReason.TOO_FEW_SCORED),
        ([Scored(0, 3.0, 5)], 0.0, DropReason.TOO_FEW_SCORED),
        ([Scored(0, 3.0, 5), Scored(1, 3.0, 9)], 0.4, DropReason.EQUAL_SCORES),
        ([Scored(0, 0.1 + 0.2, 5), Scored(1, 0.3, 9)], 0.0, DropReason.EQUAL_SCORES),
        # one response in the middle of both intervals is the shortest and the longest of its kind
        (
            [Scored(0, 4.0, 50), Scored(1, 3.0, 40), Scored(2, 2.0, 30)],
            0.5,
            DropReason.SAME_RESPONSE,
        ),
        # chosen scores 2, rejected 4: the intervals overlap
        (
            [Scored(0, 4.0, 50), Scored(1, 2.0, 10), Scored(2, 1.0, 20), Scored(3, 5.0, 40)],
            0.8,
            DropReason.NOT_BETTER,
        ),
        # both score 3
        (
            [Scored(0, 5.0, 50), Scored(1, 3.0, 10), Scored(2, 3.0, 90), Scored(3, 1.0, 40)],
            0.5,
            DropReason.NOT_BETTER,
        ),
    ],
)
def test_drops(candidates: list[Scored], rho: float, reason: DropReason) -> None:
    assert select_actor_pair(candidates, rho) is reason


def test_only_a_chosen_response_over_the_limit_is_dropped() -> None:
    candidates = [Scored(0, 5.0, 2500), Scored(1, 1.0, 9000)]
    assert select_actor_pair(candidates, 0.0, max_chosen_length=2500) == ActorPair(0, 1, 5.0, 1.0)
    assert select_actor_pair(candidates, 0.0, max_chosen_length=2499) is DropReason.CHOSEN_TOO_LONG
    assert select_actor_pair(candidates, 0.0, max_chosen_length=0) is DropReason.CHOSEN_TOO_LONG


@pytest.mark.parametrize("rho", [-0.1, 1.0, math.nan])
def test_rho_out_of_range(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        select_actor_pair([], rho)


def test_bad_candidates() -> None:
    good = Scored(0, 1.0, 1)
    for bad, said in [
        (Scored(0, 2.0, 1), "twice"),
        (Scored(1, math.nan, 1), "finite"),
        (Scored(1, math.inf, 1), "finite"),
        (Scored(1, 2.0, -1), "length"),
    ]:
        with pytest.raises(ValueError, match=said):
            select_actor_pair([good, bad], 0.0)
    with pytest.raises(ValueError, match="max_chosen_length"):
        select_actor_pair([good], 0.0, max_chosen_length=-1)


# Each response: the scores of its judgments (quarter points) and its length; few lengths, so that ties occur.
JUDGED = st.lists(
    st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=11), st.integers(0, 4)), max_size=7
)
RHO = st.sampled_from(["0", "0.1", "0.25", "0.32", "0.4", "0.5", "0.75", "0.99"])


def exact(
    means: list[Fraction], lengths: list[int], rho: Fraction, limit: int | None
) -> tuple[int, int] | str:
    """The rule of the paper in exact arithmetic, by elimination in place of sorting."""
    if len(means) < 2:
        return "too_few_scored"
    top, low = max(means), min(means)
    if top == low:
        return "equal_scores"
    upper = [i for i, mean in enumerate(means) if (1 - rho) * top + rho * low <= mean <= top]
    lower = [i for i, mean in enumerate(means) if low <= mean <= (1 - rho) * low + rho * top]
    upper = [i for i in upper if lengths[i] == min(lengths[j] for j in upper)]
    upper = [i for i in upper if means[i] == max(means[j] for j in upper)]
    lower = [i for i in lower if lengths[i] == max(lengths[j] for j in lower)]
    lower = [i for i in lower if means[i] == min(means[j] for j in lower)]
    chosen, rejected = min(upper), min(lower)
    if chosen == rejected:
        return "same_response"
    if means[chosen] <= means[rejected]:
        return "not_better"
    if limit is not None and lengths[chosen] > limit:
        return "chosen_too_long"
    return chosen, rejected


@given(judged=JUDGED, rho=RHO, limit=st.none() | st.integers(0, 4), order=st.randoms())
def test_agrees_with_exact_arithmetic_however_the_means_were_rounded(
    judged: list[tuple[list[int], int]], rho: str, limit: int | None, order: object
) -> None:
    means = [Fraction(sum(scores), 4 * len(scores)) for scores, _ in judged]
    lengths = [length for _, length in judged]
    candidates = []
    for number, (scores, length) in enumerate(judged):
        order.shuffle(scores)  # type: ignore[attr-defined]
        # summed in shares, so that equal means come out a few bits apart
        candidates.append(Scored(number, sum(score / 4 / len(scores) for score in scores), length))
    order.shuffle(candidates)  # type: ignore[attr-defined]
    got = select_actor_pair(candidates, float(rho), limit)
    want = exact(means, lengths, Fraction(rho), limit)
    assert (str(got) if isinstance(got, DropReason) else (got.chosen, got.rejected)) == want
    if isinstance(got, ActorPair):
        assert got.chosen != got.rejected
        assert got.chosen_score > got.rejected_score
        assert got.chosen_score == pytest.approx(float(means[got.chosen]))
        assert got.rejected_score == pytest.approx(float(means[got.rejected]))


@given(judged=JUDGED)
def test_below_one_half_the_only_reasons_are_the_papers(judged: list[tuple[list[int], int]]) -> None:
    candidates = [Scored(i, sum(s) / 4 / len(s), length) for i, (s, length) in enumerate(judged)]
    got = select_actor_pair(candidates, 0.4)
    assert not isinstance(got, DropReason) or got in (DropReason.TOO_FEW_SCORED, DropReason.EQUAL_SCORES)
