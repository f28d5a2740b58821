"""Agreement with people against scipy and against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr

from metareward.assessment.agreement import agreement
from metareward.assessment.interval import Resampling

LABEL = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), LABEL, st.none() | st.sampled_from([0.0, 1.5, 3.0, 4.75])), max_size=25
)


@given(rows=ROWS)
def test_against_scipy_and_brute_force(rows: list[tuple[str, float, float | None]]) -> None:
    found = agreement([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])
    known = [row for row in rows if row[2] is not None]
    labels, scores = [row[1] for row in known], [row[2] for row in known]
    assert found.scored == len(known)
    if len(known) < 3 or len(set(labels)) == 1 or len(set(scores)) == 1:
        assert found.spearman.value is None
        assert found.kendall.value is None
    else:
        assert found.spearman.value == pytest.approx(spearmanr(labels, scores).statistic)
        assert found.spearman.value == pytest.approx(pearsonr(rankdata(labels), rankdata(scores)).statistic)
        assert found.kendall.value == pytest.approx(kendalltau(labels, scores).statistic)
        assert found.kendall.value == pytest.approx(tau_b_by_hand(labels, scores))
    total, agreed, ties = 0, 0.0, 0
    for i, (prompt, label, score) in enumerate(known):
        for other_prompt, other_label, other_score in known[:i]:
            if prompt == other_prompt and label != other_label:
                total += 1
                product = (label - other_label) * (score - other_score)
                agreed += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
                ties += product == 0
    assert found.pairs == total
    assert found.pairwise.value == (pytest.approx(agreed / total) if total else None)
    assert found.tied.value == (pytest.approx(ties / total) if total else None)
    untied = total - ties
    assert found.pairwise_untied.value == (pytest.approx((agreed - ties / 2) / untied) if untied else None)


def tau_b_by_hand(one: list[float], two: list[float]) -> float:
    """(concordant - discordant) / sqrt((pairs not tied in one) (pairs not tied in two))."""
    signs = [
        ((a > b) - (a < b), (c > d) - (c < d))
        for i, (a, c) in enumerate(zip(one, two, strict=True))
        for b, d in list(zip(one, two, strict=True))[:i]
    ]
    return sum(x * y for x, y in signs) / (sum(x * x for x, _ in signs) * sum(y * y for _, y in signs)) ** 0.5


def test_by_hand() -> None:
    found = agreement(["p", "p", "p", "q"], [0.0, 0.5, 1.0, 0.9], [1.0, 1.0, 0.5, None])
    # (0, .5): a tie, (0, 1): wrong, (.5, 1): wrong; the label of q has no score.
    assert (found.scored, found.pairs, found.pairwise.value) == (3, 3, pytest.approx(0.5 / 3))
    assert (found.tied.value, found.pairwise_untied.value) == (pytest.approx(1 / 3), 0.0)
    assert found.spearman.value == pytest.approx(-0.8660254)
    # Classes of the labels: 0, 3 (2.5 halves up), 5; of the scores 1, 1, 1 (0.5 halves up).
    assert found.exact.value == 0.0
    assert agreement(["p"] * 3, [0.2, 0.5, 0.9], [1.4, 2.5, 5.0]).exact.value == 1.0
    perfect = agreement(["p", "p", "q"], [0.1, 0.2, 0.3], [1, 2, 3])
    assert (perfect.spearman.value, perfect.pairwise.value, perfect.pairs) == (pytest.approx(1.0), 1.0, 1)


def test_intervals_hold_the_value_and_shrink_with_prompts() -> None:
    def rows(prompts: int) -> tuple[list[str], list[float], list[float]]:
        ids = [f"p{index // 3}" for index in range(3 * prompts)]
        labels = [(index * 7 % 11) / 10 for index in range(3 * prompts)]
        scores = [5 * label if index % 4 else 2.5 for index, label in enumerate(labels)]
        return ids, labels, scores

    widths = []
    for prompts in (12, 110):
        found = agreement(*rows(prompts), Resampling(150))
        for name in ("spearman", "kendall", "pairwise", "pairwise_untied", "tied", "exact"):
            figure = getattr(found, name)
            assert figure.interval.low <= figure.value <= figure.interval.high, name
        widths.append(found.spearman.interval.high - found.spearman.interval.low)
    assert widths[1] < widths[0] / 2
    assert agreement(*rows(12), Resampling(150)) == agreement(*rows(12), Resampling(150))


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement(["p"], [0.0, 1.0], [1.0, 2.0])
