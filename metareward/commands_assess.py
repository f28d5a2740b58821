"""The commands of `metareward assess`, one function a command; see `cli`."""

from __future__ import annotations

from pathlib import Path


def assess() -> None:
    """`assess judge`: hold a model against people's labels."""


def assess_judge(
    *,
    model: str,
    data: Path,
    samples: int = 4,
    limit: int = 0,
    max_new_tokens: int = 96,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Hold a model's judgments against people's quality labels.

    Reports the share of readable judgments, Spearman's correlation with the labels, pairwise agreement within a prompt, and the
    histogram of scores; by sampled judgments (their mean score) and by expected score (the score tokens' probabilities).

    Args:
        model: A model directory or hub id.
        data: JSONL of {prompt, response, quality in [0, 1]}.
        samples: Judgments a response.
        limit: Use only the first so many lines; 0 for all.
        max_new_tokens: Limit of a judgment.
        seed: Of the sampling.
        json: Also write the figures to this file.
    """
    from metareward.assessment.judge import assess
    from metareward.run.ranks import with_ranks

    def work() -> None:
        assess(model, data, samples, limit, max_new_tokens, seed, json)

    with_ranks(work)
