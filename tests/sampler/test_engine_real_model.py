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
