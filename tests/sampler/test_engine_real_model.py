"""The engine on a real model: SmolLM2-135M-Instruct against transformers, and bf16 against a plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder
from metareward.model.packed_attention import packed_attention
from metareward.sampler import Engine, Request, SamplingParams

QUESTIONS = ("What is the capital of France?", "Say hello.", "Name three colours, and nothing else, please.")


@pytest.fixture(scope="module")
def chat(smollm2: Path) -> Chat:
    return Chat.load(smollm2)


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> dict[str, tuple[int, ...]]:
    return {text: tuple(chat.render([{"role": "user", "content": text}])) for text in QUESTIONS}


def test_greedy_fp32_is_token_identical_to_transformers(
    tiny: Any, smollm2: Path, chat: Chat, prompts: dict[str, tuple[int, ...]]
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    engine = Engine(load_decoder(smollm2, dtype=torch.float32), stop_ids=chat.stop_ids, seed=0, max_running=2)
    requests = [Request(text, prompt) for text, prompt in prompts.items()]
    got = tiny.run(engine, requests, SamplingParams(temperature=0.0, max_new_tokens=16))
    for text, prompt in prompts.items():
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=sorted(chat.stop_ids),
        )
        assert got[text].token_ids == out[0, len(prompt) :].tolist()
    assert "Paris" in chat.decode(got[QUESTIONS[0]].token_ids)
    assert any(completion.finished for completion in got.values())


THINGS = ("a river", "bread", "the number seven", "winter", "a violin", "glass", "the sea", "a good friend")
TASKS = (
    "Describe {} in two sentences.",
    "Write a riddle about {}.",
    "What would a child ask about {}?",
    "Name three facts about {} and say why each one matters.",
    "Why do people write poems about {}?",
    "Translate into French: I like {}.",
    "Explain {} to somebody who has never heard of it, without any difficult words.",
    "Is {} old or new? Answer briefly.",
)


@pytest.fixture(scope="module")
def greedy64(smollm2: Path, chat: Chat) -> dict[str, tuple[tuple[int, ...], list[int]]]:
    """64 prompts and transformers' own 64 greedy tokens after each, in fp32 and without stop ids."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    texts = [task.format(thing) for task in TASKS for thing in THINGS]
    rendered = {text: tuple(chat.render([{"role": "user", "content": text}])) for text in texts}
    found = {}
    # By equal lengths, so that no padding stands between the two sides.
    for length in {len(prompt) for prompt in rendered.values()}:
        group = {text: prompt for text, prompt in rendered.items() if len(prompt) == length}
        ids = torch.tensor(list(group.values()))
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=64,
            max_new_tokens=64,
        )
        for (text, prompt), row in zip(group.items(), out[:, length:].tolist(), strict=True):
            found[text] = (prompt, row)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        # Odd pages, prompts in pieces of a few tokens, and a cache that makes sequences give way.
        {"page_size": 7, "max_running": 24, "max_step_tokens": 40, "kv_tokens": 7 * 160, "margin": 0.0},
    ],
    ids=["plain", "hard"],
)
def test_64_prompts_of_64_greedy_tokens_are_identical(
    tiny: Any, smollm2: Path, greedy64: dict[str, tuple[tuple[int, ...], list[int]]], settings: dict[str, Any]
) -> None:
    assert len(greedy64) == 64
    # min_new_tokens keeps transformers from the end of the turn; the same tokens are banned here by their logits.
    decoder = load_decoder(smollm2, dtype=torch.float32)
    engine = Engine(decoder, stop_ids=(), seed=0, **settings)
    banned = Chat.load(smollm2).stop_ids
    forward = engine.runner.forward
    engine.runner.forward = lambda step: forward(step).index_fill(  # type: ignore[method-assign]
        1, torch.tensor(sorted(banned)), float("-inf")
    )
    requests = [Request(text, prompt) for text, (prompt, _) in greedy64.items()]
    got = tiny.run(engine, requests, SamplingParams(temperature=0.0, max_new_tokens=64))
    assert {text: c.token_ids for text, c in got.items()} == {t: row for t, (_, row) in greedy64.items()}
    if settings:
        assert engine.stats.preemptions > 0
    else:
        assert engine.stats.reused_tokens > 0, "the prompts share how every chat begins"


def test_bf16_logprobs_agree_with_a_plain_forward(
    tiny: Any, smollm2: Path, chat: Chat, prompts: dict[str, tuple[int, ...]]
) -> None:
    """Stated tolerance: 0.05 nat a token on average. bf16 rounds differently over pages and in a row."""
    decoder = load_decoder(smollm2, dtype=torch.bfloat16)
    engine = Engine(decoder, stop_ids=chat.stop_ids, seed=0, max_running=4)
    requests = [r for text, prompt in prompts.items() for r in tiny.samples(prompt, 2, text)]
    by_identity = {request.identity: request.prompt for request in requests}
    got = tiny.run(engine, requests, SamplingParams(max_new_tokens=24))
    differences = []
    for name, completion in got.items():
        ids = [*by_identity[name], *completion.token_ids]
        with torch.inference_mode():
            hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), packed_attention([0, len(ids)]))
            rows = decoder.logits(hidden[len(by_identity[name]) - 1 : -1]).float().log_softmax(dim=-1)
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        differences.append((torch.tensor(completion.logprobs) - expected).abs())
    every = torch.cat(differences)
    assert every.mean() < 0.05
    assert every.max() < 0.5
