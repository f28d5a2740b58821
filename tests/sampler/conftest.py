"""A tiny random Llama, in transformers and in our decoder, and a cache that starts full of NaN."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from metareward.model.decoder import Decoder
from metareward.model.hf_files import load_decoder
from metareward.model.packed_attention import packed_attention
from metareward.sampler import Completion, Engine, Request, SamplingParams
from metareward.sampler.runner import Runner

VOCAB_SIZE = 97
MAX_CONTEXT = 160


@dataclass
class Tiny:
    """One set of weights as transformers' model and as ours; engines run on `device`, all else on the CPU."""

    reference: Any
    decoder: Decoder
    device: str = "cpu"

    def greedy(self, prompt: tuple[int, ...], count: int) -> list[int]:
        """Greedy tokens of transformers' own generate, without stop ids."""
        ids = torch.tensor([prompt])
        out = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
        return out[0, len(prompt) :].tolist()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, V] float32 of one sequence in a plain packed forward, without pages."""
        with torch.inference_mode():
            attend = packed_attention([0, len(token_ids)])
            hidden = self.decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
            return self.decoder.logits(hidden)

    def engine(self, **settings: Any) -> Engine:
        """An engine with no stop ids and seed 0 unless told otherwise."""
        decoder = self.decoder if self.device == "cpu" else copy.deepcopy(self.decoder).to(self.device)
        return Engine(decoder, **{"stop_ids": (), "seed": 0, **settings})

    def prompt(self, length: int, salt: int = 0) -> tuple[int, ...]:
        """A prompt of this length; different lengths and salts share no prefix to speak of."""
        generator = torch.Generator().manual_seed(1000 * salt + length)
        return tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())

    def samples(self, prompt: tuple[int, ...], count: int, name: str = "p") -> list[Request]:
        """``count`` requests with one prompt."""
        return [Request(f"{name}/{index}", prompt) for index in range(count)]

    def run(
        self, engine: Engine, requests: Iterable[Request], params: SamplingParams
    ) -> dict[str, Completion]:
        """Every completion by identity; the pages must all be back."""
        completions = list(engine.generate(requests, params))
        by_identity = {completion.identity: completion for completion in completions}
        assert len(by_identity) == len(completions)
        assert engine.pool.free + engine.tree.evictable == engine.pool.capacity
        return by_identity


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_CONTEXT,
        # Far from flat, so that greedy choices have no near ties and attention matters.
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    reference = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny-llama")
    reference.save_pretrained(folder)
    return Tiny(reference, load_decoder(folder, dtype=torch.float32))


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[str]:
    """Where the engines of a test run: what they give on a GPU is held against what the CPU gives."""
    tiny.device = request.param
    yield request.param
    tiny.device = "cpu"


@pytest.fixture(autouse=True)
def _poisoned_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a place never written shows as NaN, which the engine reports."""
    empty = Runner._empty
    monkeypatch.setattr(Runner, "_empty", lambda self, shape: empty(self, shape).fill_(float("nan")))
