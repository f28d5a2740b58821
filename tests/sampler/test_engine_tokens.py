"""What the engine samples: equal to transformers when greedy, and the same whatever runs beside it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from metareward.sampler import Request, SamplingParams

PAGE_EDGES = (1, 15, 16, 17, 31, 32, 33)
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=20)
DRAWN = SamplingParams(temperature=1.0, top_p=0.98, max_new_tokens=20)

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def greedy_tokens(tiny: Any) -> dict[int, list[int]]:
    return {length: tiny.greedy(tiny.prompt(length), GREEDY.max_new_tokens) for length in PAGE_EDGES}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_running": 1},
        {"max_running": 3, "max_step_tokens": 1},
        {"page_size": 1, "max_running": 5},
        {"page_size": 7, "max_step_tokens": 40},
        {"page_size": 64, "max_running": 2},
        {"kv_tokens": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["given", "reversed", "shuffled"])
def test_greedy_is_token_identical_to_transformers(
    tiny: Any, greedy_tokens: dict[int, list[int]], settings: dict[str, int], order: str
) -> None:
    requests = [Request(str(length), tiny.prompt(length)) for length in PAGE_EDGES]
    if order == "reversed":
        requests.reverse()
    elif order == "shuffled":
        random.Random(3).shuffle(requests)
    got = tiny.run(tiny.engine(**settings), requests, GREEDY)
    assert {int(name): completion.token_ids for name, completion in got.items()} == greedy_tokens


@pytest.fixture(scope="module")
def requests(tiny: Any) -> list[Request]:
    """Groups of one to five members at every page edge."""
    groups = [(length, 1 + index % 5) for index, length in enumerate(PAGE_EDGES)]
    return [
        request
        for length, count in groups
        for request in tiny.samples(tiny.prompt(length), count, str(length))
    ]


@pytest.fixture(scope="module")
def alone(tiny: Any, requests: list[Request]) -> dict[str, list[int]]:
    """Each request on an engine of its own, where nothing is shared or copied."""
    return {
        request.identity: next(iter(tiny.engine().generate([request], DRAWN))).token_ids
        for request in requests
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_running": 2},  # every group of three or more is split over several admissions
        {"max_running": 3, "page_size": 5, "max_step_tokens": 20},
        {"page_size": 16, "kv_tokens": 64},  # just one sequence of the longest at a time
        {"page_size": 4, "kv_tokens": 120},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["grouped", "reversed", "interleaved"])
def test_company_changes_no_sample(
    tiny: Any, requests: list[Request], alone: dict[str, list[int]], settings: dict[str, int], order: str
) -> None:
    requests = list(requests)
    if order == "reversed":
        requests.reverse()
    elif order == "interleaved":
        random.Random(5).shuffle(requests)
    got = tiny.run(tiny.engine(**settings), requests, DRAWN)
    assert {name: completion.token_ids for name, completion in got.items()} == alone


def test_samples_of_a_group_differ_and_follow_the_seed(tiny: Any) -> None:
    requests = tiny.samples(tiny.prompt(9), 6)
    first = tiny.run(tiny.engine(seed=1), requests, DRAWN)
    again = tiny.run(tiny.engine(seed=1), requests, DRAWN)
    other = tiny.run(tiny.engine(seed=2), requests, DRAWN)
    assert first == again
    assert len({tuple(completion.token_ids) for completion in first.values()}) == 6
    assert all(first[name].token_ids != other[name].token_ids for name in first)


@pytest.mark.parametrize("length", PAGE_EDGES)
def test_group_prefills_its_prompt_once(tiny: Any, length: int) -> None:
    for max_running in (1, 3, 64):
        engine = tiny.engine(max_running=max_running)
        tiny.run(engine, tiny.samples(tiny.prompt(length), 7), DRAWN)
        # Members that come when the first is through compute what does not fill a page again.
        late = 7 - min(7, max_running)
        assert length <= engine.stats.prefill_tokens <= length + late * (1 + (length - 1) % 16)
        assert engine.stats.prompt_tokens == 7 * length
        assert engine.stats.requests == 7
        assert engine.stats.new_tokens == 7 * DRAWN.max_new_tokens


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("kv_tokens", [None, 160])
def test_host_ahead_of_the_device_changes_no_sample(
    tiny: Any, requests: list[Request], alone: dict[str, list[int]], lookahead: int, kv_tokens: int | None
) -> None:
    stops = [token for tokens in alone.values() for token in tokens[7:9]]
    cut = {
        name: tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))]
        for name, tokens in alone.items()
    }
    engine = tiny.engine(max_running=5, lookahead=lookahead, kv_tokens=kv_tokens, stop_ids=stops)
    got = tiny.run(engine, requests, DRAWN)
    assert {name: completion.token_ids for name, completion in got.items()} == cut
    assert engine.stats.new_tokens == sum(len(tokens) for tokens in cut.values())


def test_preemption_changes_no_sample(
    tiny: Any, requests: list[Request], alone: dict[str, list[int]]
) -> None:
    for page_size, pages in ((16, 5), (4, 16), (1, 60)):
        engine = tiny.engine(max_running=7, page_size=page_size, kv_tokens=page_size * pages, margin=0.0)
        got = tiny.run(engine, requests, DRAWN)
        assert {name: completion.token_ids for name, completion in got.items()} == alone
        assert engine.stats.preemptions > 0


def test_a_second_call_reuses_the_prefixes(
    tiny: Any, requests: list[Request], alone: dict[str, list[int]]
) -> None:
    engine = tiny.engine()
    tiny.run(engine, requests, DRAWN)
    first = engine.stats.prefill_tokens
    got = tiny.run(engine, requests, DRAWN)
    assert {name: completion.token_ids for name, completion in got.items()} == alone
    assert engine.stats.prefill_tokens - first < first


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_raw_distribution(tiny: Any, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=20, max_new_tokens=24)
    requests = [r for length in PAGE_EDGES for r in tiny.samples(tiny.prompt(length), 2, str(length))]
    prompts = {request.identity: request.prompt for request in requests}
    for name, completion in tiny.run(tiny.engine(max_running=5), requests, params).items():
        ids = [*prompts[name], *completion.token_ids]
        rows = tiny.logits(ids)[len(prompts[name]) - 1 : -1].log_softmax(dim=-1)
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)
        assert max(completion.logprobs) <= 0
