"""The schedule against an oracle, without a model: a device whose cache holds hashes instead of keys and values."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metareward.errors import UserError
from metareward.sampler.admission import most_pages
from metareward.sampler.pages import PagePool
from metareward.sampler.prefix_tree import PrefixTree
from metareward.sampler.request import Completion, Request
from metareward.sampler.schedule import Scheduler
from metareward.sampler.step import Step
from tests.sampler.fake_device import STOP, FakeDevice, expected, extend


class World:
    """A pool, a tree and a device, and what a run over them gives."""

    def __init__(
        self,
        pages: int,
        page_size: int,
        max_running: int,
        max_step_tokens: int,
        lookahead: int = 0,
        margin: float = 1.25,
    ) -> None:
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool, page_size)
        self.page_size = page_size
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.lookahead, self.margin = lookahead, margin
        self.device = FakeDevice(page_size, max_running)
        self.scheduler: Scheduler
        self.prefilled = 0

    def run(self, requests: list[Request], max_new_tokens: int) -> dict[str, Completion]:
        """Every completion; checks the books after each step."""
        device = self.device
        device.chains = chains(requests)
        self.scheduler = scheduler = Scheduler(
            iter(requests),
            self.pool,
            self.tree,
            self.tree.root("weights"),
            key_of=hash,
            stop_ids=[STOP],
            max_running=self.max_running,
            max_new_tokens=max_new_tokens,
            max_step_tokens=self.max_step_tokens,
            margin=self.margin,
        )
        got: dict[str, Completion] = {}
        pending: deque[tuple[Step, np.ndarray, np.ndarray]] = deque()
        while True:
            step = scheduler.next_step()
            self.check_books()
            if step is not None:
                assert len(step.token_ids) <= max(
                    self.max_step_tokens - len(step.decode_slots), self.page_size
                )
                self.prefilled += len(step.token_ids)
                pending.append((step, *device.run(step)))
            elif not pending:
                break
            if step is None or len(pending) > self.lookahead:
                for completion in scheduler.record(*pending.popleft())[0]:
                    assert completion.identity not in got
                    got[completion.identity] = completion
                self.check_books()
        assert not scheduler.running
        assert self.pool.free + self.tree.evictable == self.pool.capacity, "pages were lost"
        return got

    def check_books(self) -> None:
        """Every page is free, in one node, or one sequence's own; users and counts agree with what runs."""
        scheduler, slots = self.scheduler, self.scheduler.slots
        owned = [page for node in self.tree.nodes() for page in node.pages]
        assert len(owned) == self.tree.pages
        idle = sum(len(node.pages) for node in self.tree.nodes() if not node.users)
        assert idle == self.tree.evictable
        readers: dict[int, set[int]] = {}
        for sequence in scheduler.running:
            assert slots.sequences[sequence.slot] is sequence
            assert sequence.leaf is not None
            first = sequence.leaf.end // self.page_size
            row = slots.page_table[sequence.slot, : slots.held[sequence.slot]].tolist()
            owned += row[first:]
            path, node = [], sequence.leaf
            while node is not None:
                path[:0] = node.pages
                readers.setdefault(id(node), set()).add(sequence.slot)
                node = node.parent
            assert row[:first] == path
        for node in self.tree.nodes():
            extra = set(node.users) - readers.get(id(node), set())
            copying = {s.slot for s in scheduler.running if s.copy_from is not None}
            assert readers.get(id(node), set()) <= set(node.users)
            assert extra <= copying
            assert set(node.active) == {c for cs in node.children.values() for c in cs if c.users}
            assert len(node.tokens) == len(node.pages) * self.page_size
            assert 0 <= node.settled <= node.computed <= len(node.tokens)
        assert len(owned) == len(set(owned)), "a page has two owners"
        assert len(owned) + self.pool.free == self.pool.capacity


def chains(requests: list[Request]) -> dict[int, list[int]]:
    """For every prefix of every prompt, its hash and the hashes of all its prefixes."""
    found: dict[int, list[int]] = {}
    for prompt in {request.prompt for request in requests}:
        states: list[int] = []
        for token in prompt:
            states.append(extend(states[-1] if states else 0, token))
            found[states[-1]] = list(states)
    return found


def family(rng: random.Random, count: int, longest: int) -> list[Request]:
    """Requests whose prompts fork from each other anywhere, with repetitions."""
    prompts: list[tuple[int, ...]] = [()]
    requests = []
    for index in range(count):
        if index and rng.random() < 0.4:
            prompt = rng.choice(prompts[1:] or [(1,)])
        else:
            base = rng.choice(prompts)
            base = base[: rng.randint(0, len(base))]
            room = max(1, longest - len(base))
            prompt = (*base, *(rng.randint(1, 3) for _ in range(rng.randint(1, room))))[:longest]
            prompts.append(prompt)
        requests.append(Request(f"r{index}", prompt))
    if rng.random() < 0.5:
        requests.sort(key=lambda request: request.prompt)
    return requests


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 2, 3, 4, 7]),
    max_running=st.integers(1, 9),
    max_step_tokens=st.integers(1, 40),
    spare=st.integers(0, 25),
    lookahead=st.integers(0, 2),
    count=st.integers(0, 24),
    max_new_tokens=st.integers(1, 14),
    margin=st.sampled_from([0.0, 0.5, 1.25]),
)
def test_any_requests_through_any_pool_give_what_the_definition_says(
    seed: int,
    page_size: int,
    max_running: int,
    max_step_tokens: int,
    spare: int,
    lookahead: int,
    count: int,
    max_new_tokens: int,
    margin: float,
) -> None:
    requests = family(random.Random(seed), count, longest=30)
    most = max((most_pages(len(r.prompt), max_new_tokens, page_size) for r in requests), default=0)
    world = World(most + spare, page_size, max_running, max_step_tokens, lookahead, margin)
    got = world.run(requests, max_new_tokens)
    assert got == {r.identity: expected(r, max_new_tokens) for r in requests}
    # And again over a cache that is full of prefixes.
    assert world.run(requests, max_new_tokens) == got


def test_soak_through_a_pool_that_is_too_small() -> None:
    rng = random.Random(4)
    requests = family(rng, 20_000, longest=8)
    world = World(pages=10, page_size=4, max_running=8, max_step_tokens=24, margin=0.5)
    world.check_books = lambda: None  # type: ignore[method-assign]  # a hundred thousand times it takes long
    got = world.run(requests, 20)
    assert len(got) == 20_000
    for request in requests[::37]:
        assert got[request.identity] == expected(request, 20)
    assert world.scheduler.counts.preemptions > 100, "the pool was never too small"


def groups(prompt: list[int], members: int, tails: int, tail: int) -> list[Request]:
    """``tails`` prompts that share ``prompt`` and go on differently for ``tail`` tokens, ``members`` requests each."""
    return [
        Request(f"{t}/{m}", (*prompt, 4 + t, *[1] * (tail - 1))) for t in range(tails) for m in range(members)
    ]


def test_a_group_computes_its_prompt_once() -> None:
    for length in (1, 3, 4, 5, 8, 9):
        world = World(200, 4, 16, 64)
        world.run(groups([1] * (length - 1), 11, 1, 1), 6)
        assert world.prefilled == length


def test_forks_inside_a_page_compute_only_what_differs() -> None:
    world = World(300, 4, 64, 640)
    world.run(groups([1, 2, 3] * 7, 1, 8, 5), 6)
    assert world.prefilled == 21 + 8 * 5


def test_late_members_compute_at_most_a_page_again() -> None:
    world = World(200, 4, 3, 64)
    world.run(groups([2] * 18, 11, 1, 1), 6)
    assert world.prefilled <= 19 + 10 * 4


def test_full_hit_computes_one_token() -> None:
    world = World(200, 4, 3, 64)
    world.run([Request("first", (1,) * 16)], 6)
    world.prefilled = 0
    world.run([Request("again", (1,) * 16)], 6)
    assert world.prefilled == 1


def test_prefixes_of_other_weights_are_not_used() -> None:
    world = World(200, 4, 3, 64)
    world.run([Request("first", (1,) * 16)], 6)
    assert world.tree.pages == 4
    world.tree.root("other weights")
    assert world.tree.pages == 0
    assert world.pool.free == 200


def test_shared_pages_count_once_at_the_peak() -> None:
    world = World(400, 4, 32, 640)
    world.run(groups([3] * 40, 10, 2, 1), 1)
    assert world.scheduler.counts.peak_pages <= 10 + 2 + 20
    assert world.scheduler.counts.unshared_pages == 20 * 11


def test_least_recently_used_prefix_goes_first() -> None:
    # 12 pages. Three prompts of 3 whole pages stay in the tree; using the first again makes the second the oldest.
    world = World(12, 4, 1, 64)
    a, b, c, d = (
        [Request(f"{name}", (token,) * 12)] for name, token in zip("abcd", (1, 2, 3, 4), strict=True)
    )
    for requests in (a, b, c, a, d):
        world.run(requests, 1)
    heads = {node.tokens[0] for node in world.tree.nodes()}
    assert 2 not in heads
    assert {3, 4} <= heads


def test_requests_are_drawn_one_ahead() -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Request(str(drawn), (drawn,))

    pool = PagePool(100)
    tree = PrefixTree(pool, 4)
    limits = {"max_running": 5, "max_new_tokens": 3, "max_step_tokens": 99}
    scheduler = Scheduler(endless(), pool, tree, tree.root(0), key_of=hash, stop_ids=[], **limits)
    scheduler.next_step()
    assert drawn <= 6


def test_request_larger_than_the_pool_is_refused() -> None:
    world = World(4, 4, 2, 64)
    with pytest.raises(UserError, match=r"'big'.*17 of prompt.*raise kv_tokens"):
        world.run([Request("big", (1,) * 17)], 2)


def test_closing_in_the_middle_gives_everything_back() -> None:
    pool = PagePool(60)
    tree = PrefixTree(pool, 4)
    limits = {"max_running": 8, "max_new_tokens": 9, "max_step_tokens": 16}
    requests = family(random.Random(1), 30, longest=24)
    scheduler = Scheduler(iter(requests), pool, tree, tree.root(0), key_of=hash, stop_ids=[], **limits)
    device = FakeDevice(4, 8)
    for _ in range(7):
        step = scheduler.next_step()
        assert step is not None
        scheduler.record(step, *device.run(step))
    scheduler.next_step()
    assert scheduler.running
    scheduler.close()
    assert pool.free + tree.evictable == pool.capacity
    assert all(node.computed == len(node.tokens) for node in tree.nodes()), (
        "the tree promises what is not computed"
    )
    tree.clear()
    assert pool.free == pool.capacity
