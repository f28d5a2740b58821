"""Which labelled responses the seed stage teaches."""

from __future__ import annotations

from collections import Counter

import pytest

from metareward.config import SeedSettings
from metareward.run.inputs import read_quality
from metareward.stages.seed import SeedJudgment, balanced, build


@pytest.fixture(scope="module")
def judgments() -> list[SeedJudgment]:
    """The packaged set with the best and worst classes doubled, so that balancing has something to do."""
    found = [build(item) for item in read_quality("starter:quality")]
    return found + [item for item in found if item.score in (0, 5)] * 3


def test_no_class_exceeds_its_share(judgments: list[SeedJudgment]) -> None:
    kept = balanced(judgments, SeedSettings(max_class_share=0.2), random_seed=3)
    counts = Counter(item.score for item in kept)
    assert max(counts.values()) <= 0.2 * len(kept)
    assert counts[2] == sum(item.score == 2 for item in judgments)


@pytest.mark.parametrize("most", [1, 7, 60])
def test_at_most_max_examples_and_still_balanced(judgments: list[SeedJudgment], most: int) -> None:
    kept = balanced(judgments, SeedSettings(max_examples=most), random_seed=3)
    assert len(kept) == most
    counts = Counter(item.score for item in kept)
    assert max(counts.values()) - min(counts.get(score, 0) for score in range(6)) <= 1
    assert kept == balanced(judgments, SeedSettings(max_examples=most), random_seed=3)
    if most == 60:
        assert kept != balanced(judgments, SeedSettings(max_examples=most), random_seed=4)


def test_zero_means_all(judgments: list[SeedJudgment]) -> None:
    kept = balanced(judgments, SeedSettings(max_class_share=1.0, max_examples=0), random_seed=3)
    assert kept == judgments


def test_a_rationale_of_the_file_is_used_and_the_score_is_the_nearest_fifth(
    judgments: list[SeedJudgment],
) -> None:
    for item in judgments:
        assert item.source.rationale is not None
        assert item.text == f"{item.source.rationale.strip()}\nScore: {round(5 * item.source.quality)}"
