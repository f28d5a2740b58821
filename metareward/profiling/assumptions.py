"""What a plan has to assume, each with its default and its reason; measured runs and machines replace what they can."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

import tyro

Share = Annotated[float, tyro.conf.arg(metavar="SHARE")]


@dataclass(frozen=True)
class Assumptions:
    """Shares are of 1. Lengths are shares of the recipe's max_new_tokens, because that is what bounds them."""

    response_share: Share = 0.5
    """Mean response, of respond.max_new_tokens."""
    judgment_share: Share = 0.35
    """Mean judgment, of judge.max_new_tokens; the prompt asks for at most 100 words."""
    comparison_share: Share = 0.45
    """Mean comparison, of meta_judge.max_new_tokens."""
    judged_share: Share = 0.85
    """Responses that are judged: finished, and not equal to another."""
    parsed_share: Share = 0.95
    """Judgments with a readable score, as a seeded judge writes them."""
    actor_pair_share: Share = 0.85
    """Prompts that give a pair of responses."""
    judge_pair_share: Share = 0.85
    """Prompts that give a pair of judgments."""
    prefill_reached: Share = 0.5
    """Share of the limit that computing prompts reaches."""
    decode_reached: Share = 0.5
    """Share of the limit that decoding reaches."""
    sample_reached: Share = 0.3
    """Share of the bandwidth that drawing tokens reaches."""
    train_reached: Share = 0.5
    """Share of the matrix rate that forward and backward reach, what checkpointing computes again counted as reached: with full
    checkpointing that is an MFU of about 0.38, which leaves it out."""
    optimizer_reached: Share = 0.5
    """Share of the bandwidth that the optimizer reaches."""
    host_step: float = 0.002
    """Seconds of scheduling and book-keeping a sampling step."""
    load_rate: float = 1e9
    """Bytes a second at which weights are read, laid out and written."""


REACHED = {
    "prefill": "prefill_reached",
    "decode": "decode_reached",
    "sample": "sample_reached",
    "train": "train_reached",
    "optimizer": "optimizer_reached",
    "host_step": "host_step",
    "load_rate": "load_rate",
}
"""Names in a machine's `reached` and the assumptions that they replace."""

UPPER = {item.name: 1.0 for item in fields(Assumptions) if item.type == "Share"}


def with_values(assumed: Assumptions, values: dict[str, float]) -> Assumptions:
    """The assumptions with measured values in place; a share of a limit is at most 1."""
    return replace(assumed, **{name: min(value, UPPER.get(name, value)) for name, value in values.items()})
