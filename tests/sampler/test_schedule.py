"""The scheduler against an oracle: simulated page contents must read back as each sequence's own tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from metareward.errors import UserError
from metareward.sampler.pages import PagePool
from metareward.sampler.request import Request
from metareward.sampler.schedule import Scheduler, Sequence, reservation


class Machine:
    """A cache of plain Python cells, driven exactly as the engine drives the tensors."""

    def __init__(
        self, rng: random.Random, groups: int, *, capacity: int, page_size: int, max_running: int
    ) -> None:
        self.rng, self.page_size = rng, page_size
        self.max_new = rng.randint(1, 3 * page_size)
        longest = capacity * page_size - self.max_new + 1
        self.requests: list[Request] = []
        for group in range(groups):
            length = rng.randint(1, min(longest, 5 * page_size))
            prompt = tuple([group, *(rng.randrange(1000) for _ in range(length - 1))])
            members = rng.choice([1, 1, 2, 3, 2 * max_running + 1])
            self.requests += [Request(f"{group}/{member}", prompt) for member in range(members)]
        self.drawn = 0
        self.pool = PagePool(capacity)
        self.scheduler = Scheduler(
            self.draw(),
            self.pool,
            page_size=page_size,
            max_running=max_running,
            max_new_tokens=self.max_new,
            max_prefill_tokens=4 * page_size,
        )
        self.cells: dict[int, object] = {}
        self.written: dict[Sequence, list[object]] = {}
        self.started: list[str] = []
        self.prefills: Counter[tuple[int, ...]] = Counter()
        self.steps = 0

    def draw(self) -> Iterator[Request]:
        for request in self.requests:
            self.drawn += 1
            yield request

    def slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def step(self) -> bool:
        """One engine step; False when all is done."""
        self.steps += 1
        admission = self.scheduler.admit()
        assert self.drawn <= len(self.started) + len(admission.sequences) + 2, "drawn too far ahead"
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert (
            len(admission.prefill) <= 1
            or sum(len(group.prompt) for group in admission.prefill) <= 4 * self.page_size
        )
        if not self.scheduler.running:
            return False
        for group in admission.prefill:
            self.prefills[group.prompt] += 1
            for position, token in enumerate(group.prompt):
                self.cells[self.slot(group.pages, position)] = token
        for source, target in admission.copies:
            for offset in range(self.page_size):
                self.cells[target * self.page_size + offset] = self.cells.get(
                    source * self.page_size + offset
                )
        for sequence, group in admission.sequences:
            assert group.prompt == sequence.request.prompt
            self.started.append(sequence.request.identity)
            self.written[sequence] = list(group.prompt)
        for sequence in list(self.scheduler.running):
            content = self.written[sequence]
            limit = len(sequence.request.prompt) + self.max_new - 1
            if len(content) >= limit or self.rng.random() < 0.1:
                self.check(sequence)
                self.scheduler.finish(sequence)
                del self.written[sequence]
            else:
                content.append((sequence.request.identity, len(content)))
                self.cells[self.slot(sequence.pages, len(content) - 1)] = content[-1]
        self.check_references()
        return True

    def check(self, sequence: Sequence) -> None:
        """A wrong share, a missed copy or a page given twice shows as another's token here."""
        content = self.written[sequence]
        assert [self.cells[self.slot(sequence.pages, i)] for i in range(len(content))] == content

    def check_references(self) -> None:
        held = Counter(page for sequence in self.scheduler.running for page in sequence.pages)
        if self.scheduler._open_group is not None:
            held.update(self.scheduler._open_group.pages)
        assert all(self.pool.references(page) == held[page] for page in range(self.pool.capacity))
        assert self.pool.free == self.pool.capacity - len(held)


def test_every_sequence_reads_back_its_own_tokens() -> None:
    rng = random.Random(1)
    steps = forks = 0
    while steps < 20_000:
        page_size = rng.choice([1, 2, 4, 16])
        machine = Machine(
            rng,
            rng.randint(0, 30),
            # Down to pools where only one sequence fits, where admission must still go on.
            capacity=rng.randint(4, 60),
            page_size=page_size,
            max_running=rng.randint(1, 9),
        )
        while machine.step():
            pass
        assert machine.started == [request.identity for request in machine.requests], "not in order"
        assert machine.pool.free == machine.pool.capacity
        steps += machine.steps
        forks += len(machine.started) - machine.prefills.total()
    assert forks > 1000, "the run hardly shared anything"


def test_closing_in_the_middle_frees_everything() -> None:
    rng = random.Random(2)
    for _ in range(300):
        machine = Machine(rng, 10, capacity=40, page_size=4, max_running=rng.randint(1, 6))
        for _ in range(rng.randint(0, 20)):
            if not machine.step():
                break
        machine.scheduler.close()
        assert machine.pool.free == machine.pool.capacity
        assert not machine.scheduler.running


def scheduler_for(requests: list[Request], capacity: int, max_running: int, max_new: int = 3) -> Scheduler:
    return Scheduler(
        requests,
        PagePool(capacity),
        page_size=4,
        max_running=max_running,
        max_new_tokens=max_new,
        max_prefill_tokens=100,
    )


def test_group_larger_than_the_slots_is_prefilled_once() -> None:
    requests = [Request(str(i), (1, 2, 3, 4, 5)) for i in range(7)]
    scheduler = scheduler_for(requests, capacity=20, max_running=2)
    prefills = 0
    while (admission := scheduler.admit()).sequences:
        prefills += len(admission.prefill)
        for sequence, _ in admission.sequences:
            scheduler.finish(sequence)
    assert prefills == 1
    assert scheduler.pool.free == 20


def test_lone_request_takes_over_its_pages_without_a_copy() -> None:
    scheduler = scheduler_for([Request("a", (1, 2, 3, 4, 5))], capacity=2, max_running=2)
    admission = scheduler.admit()
    assert admission.copies == []
    assert admission.sequences[0][0].pages == admission.prefill[0].pages
    assert scheduler.pool.free == 0


def test_pool_of_exactly_one_sequence_serves_a_group() -> None:
    # No room for a copy beside the group's own page: each member must take the pages over in turn.
    requests = [Request(str(i), (1, 2, 3, 4, 5)) for i in range(3)]
    scheduler = scheduler_for(requests, capacity=2, max_running=4)
    served = []
    while (admission := scheduler.admit()).sequences:
        assert len(admission.sequences) == 1
        served.append(admission.sequences[0][0].request.identity)
        scheduler.finish(admission.sequences[0][0])
    assert served == ["0", "1", "2"]


def test_request_larger_than_the_pool_is_refused_by_name() -> None:
    scheduler = scheduler_for([Request("giant", tuple(range(30)))], capacity=4, max_running=2)
    with pytest.raises(UserError, match=r"giant.*32 tokens.*the cache has 16.*kv_tokens"):
        scheduler.admit()


def test_long_prompt_is_prefilled_alone() -> None:
    prompts = [tuple(range(length)) for length in (60, 61, 150, 10)]
    scheduler = scheduler_for(
        [Request(str(i), p) for i, p in enumerate(prompts)], capacity=500, max_running=8
    )
    sizes = []
    while (admission := scheduler.admit()).sequences:
        sizes.append([len(group.prompt) for group in admission.prefill])
    assert sizes == [[60], [61], [150], [10]]


@pytest.mark.parametrize(
    ("prompt", "new", "pages"), [(1, 1, 1), (4, 1, 1), (4, 2, 2), (5, 4, 2), (5, 5, 3), (1, 4, 1), (1, 5, 2)]
)
def test_reservation_leaves_out_the_last_new_token(prompt: int, new: int, pages: int) -> None:
    assert reservation(prompt, new, page_size=4) == pages
