"""Which examples an optimizer step sees, and how they are split over ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.errors import UserError
from metareward.training.examples import DataOrder, Example, check_batch, micro_batches


def test_token_counts() -> None:
    item = Example("a", "actor", (1, 2, 3), ((4,), (5, 6)))
    assert item.tokens == 6
    assert item.target_tokens == 3


@given(
    tokens=st.lists(st.integers(1, 60), min_size=1, max_size=24),
    budget=st.integers(1, 80),
    world_size=st.integers(1, 5),
    data=st.data(),
)
def test_micro_batches(tokens: list[int], budget: int, world_size: int, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(st.sampled_from(["actor", "judge"]), min_size=len(tokens), max_size=len(tokens))
    )
    indices = data.draw(st.lists(st.sampled_from(range(len(tokens))), unique=True, min_size=1))
    plan = micro_batches(indices, kinds, tokens, budget, world_size)

    assert len(plan) == world_size
    assert len({len(batches) for batches in plan}) == 1
    assert sorted(index for batches in plan for batch in batches for index in batch) == sorted(indices)
    for batches in plan:
        counts = [len(batch) for batch in batches]
        assert 0 not in counts[: sum(count > 0 for count in counts)], "empty micro-batches come last"
        order = [kinds[index] for batch in batches for index in batch]
        assert order == sorted(order), "one kind comes after the other"
        for batch in batches:
            assert len(batch) <= 1 or sum(tokens[index] for index in batch) <= budget
    sizes = [sum(len(batch) for batch in batches) for batches in plan]
    assert max(sizes) - min(sizes) <= 1
    # Some rank needs its last micro-batch, or there would be one fewer.
    assert any(batches[-1] for batches in plan)
    # The split does not depend on the order in which the indices come.
    assert micro_batches(indices[::-1], kinds, tokens, budget, world_size) == plan


def test_ranks_get_about_the_same_work() -> None:
    tokens = [100, 90, 80, 70, 10, 9, 8, 7]
    plan = micro_batches(range(8), ["actor"] * 8, tokens, 10_000, 2)
    work = [sum(tokens[index] for batch in batches for index in batch) for batches in plan]
    assert max(work) - min(work) <= 22


@given(
    count=st.integers(1, 40), batch=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 2**40)
)
def test_each_epoch_is_a_permutation(count: int, batch: int, epochs: int, seed: int) -> None:
    order = DataOrder(count, batch, epochs, seed, stream=1)
    steps = [order.indices(step) for step in range(order.steps)]
    assert order.steps == epochs * order.steps_per_epoch
    for epoch in range(epochs):
        part = steps[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(index for indices in part for index in indices) == list(range(count))
        assert all(len(indices) == batch for indices in part[:-1])
    # Pure: asked again, in another order, of another object.
    again = DataOrder(count, batch, epochs, seed, stream=1)
    assert [again.indices(step) for step in reversed(range(order.steps))] == steps[::-1]


def test_order_differs_between_epochs_streams_and_seeds() -> None:
    def first(seed: int, stream: int, epoch: int) -> tuple[int, ...]:
        return tuple(DataOrder(50, 50, 5, seed, stream).indices(epoch))

    orders = {first(seed, stream, epoch) for seed in (0, 1) for stream in (0, 1, 2) for epoch in range(3)}
    assert len(orders) == 18


def test_order_is_fixed() -> None:
    """A change here would make interrupted runs go on with other data."""
    assert DataOrder(6, 4, 2, seed=7, stream=1).indices(0) == [3, 0, 2, 1]
    assert DataOrder(6, 4, 2, seed=7, stream=1).indices(3) == [2, 5]


def test_check_batch() -> None:
    check_batch(32, 8, "train.batch_pairs")
    check_batch(4, 4, "train.batch_pairs")
    check_batch(1, 1, "train.batch_pairs")
    with pytest.raises(UserError) as caught:
        check_batch(30, 8, "train.batch_pairs")
    assert str(caught.value) == (
        "train.batch_pairs = 30 does not divide over 8 processes: set it to 24 or 32, or change the number of processes"
    )
    with pytest.raises(UserError, match="set it to 4, or change"):
        check_batch(3, 4, "seed.batch_examples")
