"""Whether a judge goes by more than length."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from metareward.assessment.agreement import length_dependence


def test_partial_equals_the_correlation_of_residuals() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, 200)
    labels = lengths / 5000 + rng.normal(0, 0.5, 200)
    scores = labels + 0.3 * lengths / 5000 + rng.normal(0, 0.5, 200)
    found = length_dependence(
        [str(i) for i in range(len(lengths))], lengths.tolist(), labels.tolist(), scores.tolist()
    )
    ranks = [stats.rankdata(column) for column in (lengths, labels, scores)]
    residuals = [column - np.polyval(np.polyfit(ranks[0], column, 1), ranks[0]) for column in ranks[1:]]
    assert found.partial.value == pytest.approx(np.corrcoef(*residuals)[0, 1], abs=1e-9)
    assert found.label.value == pytest.approx(stats.spearmanr(lengths, labels).statistic)
    assert found.score.value == pytest.approx(stats.spearmanr(lengths, scores).statistic)


def test_a_judge_that_only_measures_length_has_no_partial_correlation() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.permutation(400)
    labels = lengths + rng.normal(0, 120, 400)
    scores = lengths + rng.normal(0, 120, 400)
    found = length_dependence(
        [str(i) for i in range(len(lengths))], lengths.tolist(), labels.tolist(), scores.tolist()
    )
    assert found.score.value is not None
    assert found.score.value > 0.5
    assert found.partial.value == pytest.approx(0.0, abs=0.15)


def test_responses_without_a_score_are_left_out_and_constants_give_none() -> None:
    found = length_dependence(
        list("abcde"), [1, 2, 3, 4, 9], [0.1, 0.2, 0.4, 0.3, 0.9], [1.0, 2.0, 3.0, 5.0, None]
    )
    assert found.label.value == pytest.approx(0.8)
    assert (
        length_dependence(
            list("abcd"), [5, 5, 5, 5], [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
        ).partial.value
        is None
    )
    assert length_dependence(list("ab"), [1, 2], [0.1, 0.2], [1.0, 2.0]).label.value is None
