"""A whole engine on the Triton kernels gives the tokens that it gives on a CPU's: every step, and as graphs.

Without a GPU a graph's replay is an ordinary run over the graph's buffers: all but the capture is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder
from metareward.sampler import Engine, Request, SamplingParams
from metareward.sampler.graphs import DecodeGraphs
from metareward.sampler.inputs import Inputs
from tests.interpreter.conftest import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
PARAMS = SamplingParams(temperature=0.9, top_p=0.9, top_k=20, max_new_tokens=5)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    torch.manual_seed(0)
    decoder = Decoder(config).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    return decoder


def requests() -> list[Request]:
    """Three that share 9 tokens, two of one prompt among them; one of its own; one longer below the first."""
    shared = tuple(range(1, 10))
    prompts = [(*shared, 20, 21), (*shared, 20, 21), (*shared, 30), (40, 41), (*shared, 20, 21, 22, 23, 24)]
    return [Request(f"r{index}", prompt) for index, prompt in enumerate(prompts)]


def tokens_of(engine: Engine) -> dict[str, list[int]]:
    return {one.identity: one.token_ids for one in engine.generate(requests(), PARAMS)}


def engine_for(decoder: Decoder, device: str, **settings: int | bool) -> Engine:
    on_device = copy.deepcopy(decoder).to(device)
    return Engine(on_device, stop_ids=(), seed=3, max_running=5, page_size=4, max_step_tokens=16, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[str, list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAREWARD_KERNELS", "torch")
        return tokens_of(engine_for(decoder, "cpu"))


def test_every_step_launched(decoder: Decoder, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")
    engine = engine_for(decoder, DEVICE, lookahead=1)
    assert tokens_of(engine) == expected
    ran = engine.implementations()
    assert {ran[op] for op in ran if op not in ("linear", "decode_steps")} == {"triton"}
    assert engine.stats.reused_tokens > 0


class Eager(DecodeGraphs):
    """A graph that is computed anew at each replay, from the same buffers."""

    captures = 0

    def _record(self, inputs: Inputs) -> tuple[Callable[[], None], Tensor]:
        Eager.captures += 1
        logits = self._forward(inputs)
        return lambda: logits.copy_(self._forward(inputs)), logits  # type: ignore[return-value]


def test_decode_steps_as_graphs(decoder: Decoder, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAREWARD_KERNELS", "triton")
    engine = engine_for(decoder, DEVICE, cuda_graphs=not INTERPRETED)
    if INTERPRETED:
        runner = engine.runner
        engine.runner.prepare()
        assert runner.graphs is None
        assert runner._tiling is not None
        runner.graphs = Eager(
            runner._compute, runner._tiling, runner.device, max_running=5, page_size=runner.page_size
        )
    assert tokens_of(engine) == expected
    graphs = engine.runner.graphs
    assert graphs is not None
    assert graphs._graphs
    assert max(graphs._graphs) <= 5
    if INTERPRETED:
        # Steps of 5 rows and fewer: some graph ran for steps that it was not captured for.
        assert 0 < Eager.captures < engine.stats.steps
    engine.runner.grow(engine.runner.pages + 1, keep=False)
    assert not graphs._graphs
