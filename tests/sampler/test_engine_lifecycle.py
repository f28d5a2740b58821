"""When completions stop, what is refused, how requests are drawn, and what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from metareward.errors import UserError
from metareward.sampler import Request, SamplingParams


def idle(engine: Any) -> bool:
    """Whether no sequence holds a page; what the prefix tree keeps is free for the taking."""
    return engine.pool.free + engine.tree.evictable == engine.pool.capacity


GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
DRAWN = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12)


def test_stop_id_is_included_and_ends_the_completion(tiny: Any) -> None:
    prompt = tiny.prompt(10)
    tokens = tiny.greedy(prompt, 12)
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    got = tiny.run(tiny.engine(stop_ids=[tokens[at]]), [Request("a", prompt)], GREEDY)["a"]
    assert got.token_ids == tokens[: at + 1]
    assert got.finished
    assert len(got.logprobs) == at + 1


def test_stop_id_as_the_very_first_token(tiny: Any) -> None:
    prompt = tiny.prompt(10)
    first = tiny.greedy(prompt, 1)[0]
    engine = tiny.engine(stop_ids=[first])
    got = tiny.run(engine, tiny.samples(prompt, 3), GREEDY)
    assert all(completion.token_ids == [first] and completion.finished for completion in got.values())
    assert engine.stats.steps == 1


def test_length_limit_is_not_a_finish_unless_the_stop_id_comes_last(tiny: Any) -> None:
    prompt = tiny.prompt(10)
    tokens = tiny.greedy(prompt, 12)
    length = next(i for i in range(2, 12) if tokens[i] not in tokens[:i]) + 1
    params = SamplingParams(temperature=0.0, max_new_tokens=length)
    unused = next(i for i in range(97) if i not in tokens)
    assert not tiny.run(tiny.engine(stop_ids=[unused]), [Request("a", prompt)], params)["a"].finished
    assert tiny.run(tiny.engine(stop_ids=[tokens[length - 1]]), [Request("a", prompt)], params)["a"].finished


def test_one_new_token_needs_no_decode(tiny: Any) -> None:
    engine = tiny.engine(max_running=2)
    requests = [r for length in (1, 16, 17) for r in tiny.samples(tiny.prompt(length), 3, str(length))]
    got = tiny.run(engine, requests, SamplingParams(temperature=0.0, max_new_tokens=1))
    assert engine.stats.new_tokens == 9
    for length in (1, 16, 17):
        expected = tiny.greedy(tiny.prompt(length), 1)
        assert all(got[f"{length}/{member}"].token_ids == expected for member in range(3))


def test_many_more_requests_than_slots_of_uneven_length(tiny: Any) -> None:
    requests = [r for i in range(40) for r in tiny.samples(tiny.prompt(1 + i, salt=i), 1 + i % 4, str(i))]
    engine = tiny.engine(max_running=6, stop_ids=range(0, 97, 7))
    got = tiny.run(engine, requests, DRAWN)
    assert got.keys() == {request.identity for request in requests}
    lengths = {len(completion.token_ids) for completion in got.values()}
    assert len(lengths) > 4, "the sequences all ended together, so no slot was refilled"
    for completion in got.values():
        stops = [token % 7 == 0 for token in completion.token_ids]
        assert not any(stops[:-1])
        assert completion.finished == stops[-1]
        assert completion.finished or len(stops) == 12
    total = sum(len(completion.token_ids) for completion in got.values())
    assert engine.stats.new_tokens == total
    # Full slots all the time would take this many steps; a drained batch many more.
    assert engine.stats.steps < 1.25 * total / 6


def test_requests_are_drawn_lazily(tiny: Any) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Request(str(drawn), tiny.prompt(5, salt=drawn))

    completions = tiny.engine(max_running=3).generate(endless(), DRAWN)
    for done in range(1, 20):
        next(completions)
        assert drawn <= done + 3 + 3 + 2
    completions.close()


def test_no_requests_no_completions(tiny: Any) -> None:
    assert tiny.run(tiny.engine(), [], DRAWN) == {}
    assert tiny.run(tiny.engine(), iter(()), DRAWN) == {}


def test_closing_early_frees_everything_and_the_next_call_starts_clean(tiny: Any) -> None:
    requests = tiny.samples(tiny.prompt(17), 9)
    uneven = {"max_running": 4, "stop_ids": range(0, 97, 7)}  # so that some run when the first is through
    expected = tiny.run(tiny.engine(**uneven), requests, DRAWN)
    engine = tiny.engine(**uneven)
    completions = engine.generate(requests, DRAWN)
    next(completions)
    assert not idle(engine)
    completions.close()
    assert idle(engine)
    again = tiny.run(engine, requests, DRAWN)
    # Prefixes that are still in the cache were computed beside others: log-probs differ in the last digits.
    assert {name: c.token_ids for name, c in again.items()} == {
        name: c.token_ids for name, c in expected.items()
    }


def test_two_open_iterators_are_refused(tiny: Any) -> None:
    engine = tiny.engine(max_running=1)
    first = engine.generate(tiny.samples(tiny.prompt(4), 3), DRAWN)
    next(first)
    with pytest.raises(RuntimeError, match="already generating"):
        next(engine.generate([Request("b", tiny.prompt(4))], DRAWN))
    assert len(list(first)) == 2


def test_failing_request_iterator_frees_everything(tiny: Any) -> None:
    def failing() -> Iterator[Request]:
        yield from tiny.samples(tiny.prompt(17), 5)
        raise OSError("the file went away")

    engine = tiny.engine(max_running=2)
    with pytest.raises(OSError, match="went away"):
        list(engine.generate(failing(), DRAWN))
    assert idle(engine)
    assert len(tiny.run(engine, tiny.samples(tiny.prompt(17), 2), DRAWN)) == 2


def test_gradients_are_as_the_caller_left_them_between_completions(tiny: Any) -> None:
    def requests() -> Iterator[Request]:
        for request in tiny.samples(tiny.prompt(4), 3):
            assert not torch.is_inference_mode_enabled()
            yield request

    for _ in tiny.engine(max_running=1).generate(requests(), DRAWN):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_cache_grows_under_running_sequences_and_is_kept(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [r for i in range(4) for r in tiny.samples(tiny.prompt(3, salt=i), 3, f"short/{i}")]
    long = [Request(f"long/{i}", tiny.prompt(100 + i)) for i in range(4)]
    expected = tiny.run(tiny.engine(stop_ids=range(0, 97, 7)), short + long, DRAWN)
    # Stop ids make the lengths uneven, so that some are in the middle when the first long one is drawn.
    engine = tiny.engine(max_running=5, stop_ids=range(0, 97, 7))
    grow, growths = engine.runner.grow, {}

    def watched(pages: int, *, keep: bool) -> None:
        growths.setdefault(pages, keep)
        grow(pages, keep=keep)

    monkeypatch.setattr(engine.runner, "grow", watched)
    got = tiny.run(engine, short + long, DRAWN)
    assert {name: c.token_ids for name, c in got.items()} == {
        name: c.token_ids for name, c in expected.items()
    }
    first, *later = growths.values()
    assert not first
    assert any(later), "the cache never grew with sequences in it"
    capacity = engine.pool.capacity
    assert engine.runner.pages == capacity
    tiny.run(engine, long, DRAWN)
    assert engine.pool.capacity == capacity


def test_changed_weights_leave_no_stale_cache(tiny: Any) -> None:
    requests = tiny.samples(tiny.prompt(20), 2)
    decoder = copy.deepcopy(tiny.decoder)
    engine = tiny.engine()
    engine = type(engine)(decoder, stop_ids=(), seed=0)
    before = tiny.run(engine, requests, GREEDY)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    after = tiny.run(engine, requests, GREEDY)
    fresh = tiny.run(type(engine)(decoder, stop_ids=(), seed=0), requests, GREEDY)
    assert after == fresh
    assert after != before


def test_prompt_too_long_for_the_model(tiny: Any) -> None:
    fits, over = Request("fits", tiny.prompt(148)), Request("over", tiny.prompt(149))
    assert len(tiny.run(tiny.engine(), [fits], DRAWN)["fits"].token_ids) == 12
    with pytest.raises(UserError, match=r"'over' has 149 tokens and the limit is 148 .*160.*shorten"):
        list(tiny.engine().generate([over], DRAWN))


def test_request_larger_than_the_cache(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"'big'.*kv_tokens"):
        list(tiny.engine(kv_tokens=32).generate([Request("big", tiny.prompt(40))], DRAWN))


def test_empty_prompt(tiny: Any) -> None:
    with pytest.raises(UserError, match="'none' has an empty prompt"):
        list(tiny.engine().generate([Request("none", ())], DRAWN))


@pytest.mark.parametrize("token", [-1, 97])
def test_token_outside_the_vocabulary(tiny: Any, token: int) -> None:
    with pytest.raises(UserError, match=r"'a' has a token id outside 0\.\.96"):
        list(tiny.engine().generate([Request("a", (1, token))], DRAWN))


def test_identity_used_twice(tiny: Any) -> None:
    with pytest.raises(ValueError, match="'a'"):
        list(tiny.engine().generate([Request("a", (1,)), Request("a", (2,))], DRAWN))


@pytest.mark.parametrize("setting", ["max_running", "page_size", "max_step_tokens", "kv_tokens"])
def test_engine_refuses_empty_sizes(tiny: Any, setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        tiny.engine(**{setting: 0})


def test_nan_logits_name_the_request(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine(max_running=3)
    expected = tiny.run(tiny.engine(), tiny.samples(tiny.prompt(6), 3), DRAWN)
    forward, steps = engine.runner.forward, iter(range(100))

    def broken(step: Any) -> torch.Tensor:
        logits = forward(step).clone()
        if next(steps) == 5:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"'p/1'.*new token 5"):
        list(engine.generate(tiny.samples(tiny.prompt(6), 3), DRAWN))
    assert idle(engine)
    monkeypatch.setattr(engine.runner, "forward", lambda step: torch.full((1, 97), float("nan")))
    with pytest.raises(FloatingPointError, match=r"'p/0'.*new token 0"):
        list(engine.generate(tiny.samples(tiny.prompt(6), 3), DRAWN))
    # What failed in the middle is not taken for computed.
    monkeypatch.setattr(engine.runner, "forward", forward)
    assert tiny.run(engine, tiny.samples(tiny.prompt(6), 3), DRAWN) == expected


def test_stats_add_up(tiny: Any) -> None:
    engine = tiny.engine(max_running=4)
    tiny.run(engine, tiny.samples(tiny.prompt(20), 5), DRAWN)
    stats = engine.stats
    parts = (stats.prefill_seconds, stats.decode_seconds, stats.sampling_seconds, stats.host_seconds)
    assert all(part > 0 for part in parts)
    assert stats.seconds == pytest.approx(sum(parts))
    tiny.run(engine, tiny.samples(tiny.prompt(20), 5), DRAWN)
    assert engine.stats.requests == 10
