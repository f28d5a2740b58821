"""The expected score: the mean over the score token's probabilities, which breaks ties that few sampled scores leave.

For every sampled judgment the model is asked once more what stands at the place of the score. A judgment without a readable
score gets the cue that the judge's prompt asks for ("Score:") at its end, so that every judgment has an expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metareward.model.chat import Chat
from metareward.model.decoder import Decoder
from metareward.roles.judge import score_span
from metareward.training.examples import Example
from metareward.training.packing import pack, tree_attention

SCORES = range(6)


@dataclass(frozen=True)
class ScorePlace:
    """Completion tokens up to the score, and the token of each score at that place."""

    prefix: tuple[int, ...]
    digits: tuple[int, ...]


def score_cue(chat: Chat) -> ScorePlace:
    """The tokens of a new verdict line up to its number, and the number's token for every score."""
    lines = [chat.encode_completion(f"\nScore: {score}")[:-1] for score in SCORES]
    assert len({tuple(line[:-1]) for line in lines}) == 1, "the scores do not differ in their last token only"
    return ScorePlace(tuple(lines[0][:-1]), tuple(line[-1] for line in lines))


def score_place(chat: Chat, cue: ScorePlace, text: str, token_ids: Sequence[int]) -> ScorePlace:
    """Where a judgment says its score, in the tokens that were sampled; else the cue at its end."""
    span = score_span(text)
    ids = tuple(token for token in token_ids if token not in chat.stop_ids)
    if span is not None:
        # The first token whose decoding reaches into the number is the one that carries it.
        reach = next((end for end in range(1, len(ids) + 1) if len(chat.decode(ids[:end])) > span[0]), 0)
        if reach and ids[reach - 1] in cue.digits:
            return ScorePlace(ids[: reach - 1], cue.digits)
    return ScorePlace(ids + cue.prefix, cue.digits)


@torch.inference_mode()
def expected_scores(
    decoder: Decoder, prompt: tuple[int, ...], places: Sequence[ScorePlace], device: torch.device
) -> list[float]:
    """Expected score of every judgment of one prompt: sum over scores of score x probability, among the six score tokens.

    The prompt is computed once for all its judgments.
    """
    # The score tokens' places are read from the hidden state after the prefix; the filler token after it is never used.
    completions = tuple((*place.prefix, place.digits[0]) for place in places)
    batch = pack([Example("judge", "judge", prompt, completions)], device)
    ends = torch.tensor(batch.lengths, device=device).cumsum(0) - 1
    hidden = decoder(batch.token_ids, batch.positions, tree_attention(batch.segments), rows=batch.rows[ends])
    logits = decoder.logits(hidden).float()
    weights = torch.tensor(list(SCORES), dtype=torch.float32, device=device)
    digits = torch.tensor([place.digits for place in places], device=device)
    return (logits.gather(1, digits).softmax(1) @ weights).tolist()
