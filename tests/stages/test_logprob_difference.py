"""The sampler's log-probs against the trainer's, on the real model too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder
from metareward.sampler import Completion, Engine, Request, SamplingParams
from metareward.stages.logprob_difference import COMPLETIONS, TOKENS, FirstFew, logprob_difference


def completion(name: str, tokens: int, finished: bool = True) -> Completion:
    return Completion(name, [1] * tokens, finished, [-1.0] * tokens)


def test_the_first_finished_ones_are_kept_within_the_budget() -> None:
    few = FirstFew()
    few.offer((1, 2), completion("unfinished", 3, finished=False))
    few.offer((1,) * TOKENS, completion("too long", 3))
    for index in range(COMPLETIONS + 3):
        few.offer((1, 2), completion(f"{index}", 4))
    assert [item.identity for _, item in few.kept] == [f"{index}" for index in range(COMPLETIONS)]
    # Their prompt is counted, and computed, once.
    assert few.tokens == 2 + 4 * COMPLETIONS


def test_nothing_scored_gives_no_figures(tiny_world: Path) -> None:
    assert logprob_difference(load_decoder(tiny_world / "model", dtype=torch.float32), []) == {}


def scored(folder: Path, dtype: torch.dtype, prompts: list[tuple[int, ...]], new_tokens: int) -> tuple:
    """An engine's decoder and two completions of each prompt."""
    engine = Engine(load_decoder(folder, dtype=dtype), stop_ids=(), seed=3)
    requests = [Request(f"{index}/{sample}", p) for sample in range(2) for index, p in enumerate(prompts)]
    found = {
        item.identity: item for item in engine.generate(requests, SamplingParams(max_new_tokens=new_tokens))
    }
    return engine.decoder, [(request.prompt, found[request.identity]) for request in requests]


def test_fp32_on_a_tiny_model(tiny_world: Path) -> None:
    prompts = [(0, *range(40 + index)) for index in range(1, 4)]
    decoder, pairs = scored(tiny_world / "model", torch.float32, prompts, 30)
    figures = logprob_difference(decoder, pairs)
    assert figures["logprob_difference_tokens"] == 2 * 3 * 30
    assert figures["logprob_difference_mean"] <= 1e-4
    # It is the difference that is measured: a sampler that is off by 0.01 nat shows.
    wrong = [
        (prompt, replace(item, logprobs=[value + 0.01 for value in item.logprobs])) for prompt, item in pairs
    ]
    assert logprob_difference(decoder, wrong)["logprob_difference_mean"] == pytest.approx(0.01, rel=0.05)


def test_other_weights_show(tiny_world: Path) -> None:
    decoder, pairs = scored(tiny_world / "model", torch.float32, [(0, 5, 6, 7)], 20)
    with torch.no_grad():
        for block in decoder.blocks:
            block.mlp.down_proj.weight.mul_(3.0)
    assert logprob_difference(decoder, pairs)["logprob_difference_mean"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.02),
    ],
)
def test_on_the_real_model(smollm2: Path, dtype: torch.dtype, limit: float) -> None:
    chat = Chat.load(smollm2)
    questions = ("What is tea?", "Tell me about rain in one sentence.", "Name three birds.")
    prompts = [tuple(chat.render([{"role": "user", "content": text}])) for text in questions]
    decoder, pairs = scored(smollm2, dtype, prompts, 48)
    assert logprob_difference(decoder, pairs)["logprob_difference_mean"] <= limit
