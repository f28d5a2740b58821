"""The samples follow the model's truncated softmax: chi-square over thousands of draws, and membership."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from metareward.sampler import SamplingParams

SAMPLES = 4000


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """Probabilities [V] after temperature, then top-k, then top-p; written as plainly as can be."""
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or None]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        mass += weights[token]
        if mass >= top_p * total:
            break
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / mass
    return probabilities


def p_value(tokens: list[int], probabilities: NDArray[np.float64]) -> float:
    """Chi-square of the tokens against the probabilities; cells expected under five times are one cell."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any(), "a token outside the kept set was drawn"
    expected = probabilities * len(tokens)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    return float(chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.5, 0, 0.9), (3.0, 12, 1.0), (4.0, 40, 0.8)]
)
def test_first_and_second_token_follow_the_truncated_softmax(
    tiny: Any, temperature: float, top_k: int, top_p: float
) -> None:
    prompt = tiny.prompt(17)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=2)
    engine = tiny.engine(max_running=256, seed=11)
    drawn = [c.token_ids for c in tiny.run(engine, tiny.samples(prompt, SAMPLES), params).values()]
    first = truncated(tiny.logits(prompt)[-1], temperature, top_k, top_p)
    assert (first > 0).sum() > 3, "too few tokens kept to test anything"
    assert p_value([tokens[0] for tokens in drawn], first) > 1e-3
    # The second token comes from decode; it must not depend on the first but through the model.
    common = int(first.argmax())
    second = truncated(tiny.logits([*prompt, common])[-1], temperature, top_k, top_p)
    assert p_value([tokens[1] for tokens in drawn if tokens[0] == common], second) > 1e-3
