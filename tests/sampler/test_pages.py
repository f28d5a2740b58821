"""The page pool against an oracle that keeps, for each page, the multiset of its holders."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from metareward.sampler.pages import PagePool


def test_random_add_fork_finish_agrees_with_an_oracle() -> None:
    rng = random.Random(0)
    pool = PagePool(40)
    holders: list[list[int]] = []
    oracle: Counter[int] = Counter()
    for _ in range(40_000):
        action = rng.random()
        if action < 0.35:
            count = rng.randint(0, 6)
            if count <= pool.free:
                pages = pool.allocate(count)
                assert len(set(pages)) == count
                assert all(oracle[page] == 0 for page in pages), "a held page was handed out"
                oracle.update(pages)
                holders.append(pages)
        elif action < 0.55 and holders:
            parent = rng.choice(holders)
            shared = parent[: rng.randint(0, len(parent))]
            pool.retain(shared)
            oracle.update(shared)
            holders.append(list(shared))
        elif action < 0.999 and holders:
            pages = holders.pop(rng.randrange(len(holders)))
            pool.release(pages)
            oracle.subtract(pages)
        elif action >= 0.999 and pool.capacity < 80:
            pool.grow(pool.capacity + 1)
        assert pool.free == pool.capacity - sum(1 for count in oracle.values() if count > 0)
        page = rng.randrange(pool.capacity)
        assert pool.references(page) == oracle[page]
    for pages in holders:
        pool.release(pages)
    assert pool.free == pool.capacity
    assert sorted(pool.allocate(pool.capacity)) == list(range(pool.capacity))


def test_double_free_is_an_assertion() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[:1])


def test_retaining_a_free_page_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="free"):
        PagePool(1).retain([0])


def test_more_than_is_free_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="2 pages wanted, 1 are free"):
        PagePool(1).allocate(2)


def test_shrinking_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot shrink"):
        PagePool(3).grow(2)
