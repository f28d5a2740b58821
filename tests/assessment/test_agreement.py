"""Agreement with people against scipy and against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from metareward.assessment.agreement import agreement

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
        assert found.spearman is None
    else:
        assert found.spearman == pytest.approx(spearmanr(labels, scores).statistic)
        assert found.spearman == pytest.approx(pearsonr(rankdata(labels), rankdata(scores)).statistic)
    total, agreed = 0, 0.0
    for i, (prompt, label, score) in enumerate(known):
        for other_prompt, other_label, other_score in known[:i]:
            if prompt == other_prompt and label != other_label:
                total += 1
                product = (label - other_label) * (score - other_score)
                agreed += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    assert found.pairs == total
    assert found.pairwise == (pytest.approx(agreed / total) if total else None)


def test_by_hand() -> None:
    found = agreement(["p", "p", "p", "q"], [0.0, 0.5, 1.0, 0.9], [1.0, 1.0, 0.5, None])
    # (0, .5): a tie, (0, 1): wrong, (.5, 1): wrong; the label of q has no score.
    assert (found.scored, found.pairs, found.pairwise) == (3, 3, pytest.approx(0.5 / 3))
    assert found.spearman == pytest.approx(-0.8660254)
    perfect = agreement(["p", "p", "q"], [0.1, 0.2, 0.3], [1, 2, 3])
    assert (perfect.spearman, perfect.pairwise, perfect.pairs) == (pytest.approx(1.0), 1.0, 1)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement(["p"], [0.0, 1.0], [1.0, 2.0])
