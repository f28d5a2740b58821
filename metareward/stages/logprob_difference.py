"""How far the sampler's log-probs of its own tokens are from the trainer's, in nats.

The same weights on two paths, paged attention and packed attention, each with roundings of its own. The trainer never uses the
sampler's values; a large difference means that one of the two paths is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metareward.model.decoder import Decoder
from metareward.sampler.request import Completion
from metareward.training.examples import Example
from metareward.training.packing import pack
from metareward.training.step import target_logprobs

# Enough to tell a defect from rounding, little enough not to be felt.
COMPLETIONS = 8
TOKENS = 2048

Scored = tuple[tuple[int, ...], Completion]
"""A prompt and what was sampled after it."""


class FirstFew:
    """Keeps the first finished completions, as many as are cheap to score again."""

    def __init__(self) -> None:
        self.kept: list[Scored] = []
        self.tokens = 0

    def offer(self, prompt: tuple[int, ...], completion: Completion) -> None:
        if not completion.finished or len(self.kept) == COMPLETIONS:
            return
        # The prompt counts once, because packing computes a prompt's completions together.
        known = any(prompt == other for other, _ in self.kept)
        tokens = len(completion.token_ids) + (0 if known else len(prompt))
        if self.tokens + tokens <= TOKENS:
            self.kept.append((prompt, completion))
            self.tokens += tokens


@torch.no_grad()
def logprob_difference(decoder: Decoder, scored: Sequence[Scored]) -> dict[str, float]:
    """Mean and largest absolute difference a token, and the number of tokens; empty where nothing was scored.

    `decoder` holds the sampler's weights, whole or this rank's part of them (then a collective of its tensor group); it is run as
    the trainer runs it: packed, prompts shared, the head fused with the log-prob.
    """
    if not scored:
        return {}
    by_prompt: dict[tuple[int, ...], list[Completion]] = {}
    for prompt, completion in scored:
        by_prompt.setdefault(prompt, []).append(completion)
    examples = [
        Example(found[0].identity, "difference", prompt, tuple(tuple(item.token_ids) for item in found))
        for prompt, found in by_prompt.items()
    ]
    device = next(decoder.parameters()).device
    trainer = target_logprobs(decoder, pack(examples, device)).double().cpu()
    sampler = torch.tensor(
        [value for found in by_prompt.values() for item in found for value in item.logprobs],
        dtype=torch.float64,
    )
    difference = (trainer - sampler).abs()
    return {
        "logprob_difference_mean": difference.mean().item(),
        "logprob_difference_max": difference.max().item(),
        "logprob_difference_tokens": difference.numel(),
    }
