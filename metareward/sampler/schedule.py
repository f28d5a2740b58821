"""Who runs next: requests are drawn lazily, grouped by prompt, and admitted when all they may need is free.

A sequence gets, at admission, every page it can ever need (its prompt and ``max_new_tokens``). So a running
sequence never waits, nothing is ever preempted, and admission cannot deadlock. The full pages of a prompt
are held once for all consecutive requests with that prompt; the partly filled last page is copied for each,
because each continues it differently. The last member of a group takes over the group's own pages, so that
a prompt with one sample costs neither a copy nor a page more.

Plain Python without torch: the property tests run it against an oracle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from metareward.errors import UserError
from metareward.sampler.pages import PagePool
from metareward.sampler.request import Request


def pages_for(tokens: int, page_size: int) -> int:
    """Number of pages that hold ``tokens`` tokens."""
    return -(-tokens // page_size)


def reservation(prompt_length: int, max_new_tokens: int, page_size: int) -> int:
    """Pages a sequence may ever need. The last new token is never an input, so it needs no room."""
    return pages_for(prompt_length + max_new_tokens - 1, page_size)


@dataclass(eq=False)
class PromptGroup:
    """Consecutive requests with one prompt, from its prefill until the last of them has forked.

    ``pages`` hold the prompt; the group is one of their holders. ``logits`` is the prompt's last row,
    from which every member draws its first token; whoever prefills the group sets it.
    """

    prompt: tuple[int, ...]
    pages: list[int]
    logits: Any = None


@dataclass(eq=False)
class Sequence:
    """A running request and the pages it holds, in the order of its positions."""

    request: Request
    pages: list[int]


@dataclass
class Admission:
    """What one step adds: first ``prefill`` these groups, then do the page ``copies`` (from, to), then start
    the ``sequences``, each with the group whose logits give its first token."""

    prefill: list[PromptGroup] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sequences: list[tuple[Sequence, PromptGroup]] = field(default_factory=list)


class Scheduler:
    """Admits requests into at most ``max_running`` slots, in the order in which they come.

    ``max_prefill_tokens`` bounds the prompts computed in one step, so that running sequences are not kept
    waiting for long; a longer prompt is computed alone. At most two requests more than were admitted are
    drawn: the next one, and the one after it, which tells whether a group ends.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        pool: PagePool,
        *,
        page_size: int,
        max_running: int,
        max_new_tokens: int,
        max_prefill_tokens: int,
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.max_running = max_running
        self.max_new_tokens = max_new_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.running: set[Sequence] = set()
        self._source: Iterator[Request] = iter(requests)
        self._upcoming: deque[Request] = deque()
        self._open_group: PromptGroup | None = None

    def admit(self) -> Admission:
        """Admit as many requests as slots, pages and the prefill bound allow.

        Empty with nothing running only when the requests are used up.

        Raises:
            UserError: a request needs more pages than the whole pool has.
        """
        admission = Admission()
        prefill_tokens = 0
        while len(self.running) < self.max_running:
            request = self._peek(0)
            if request is None:
                break
            group = self._open_group
            if group is None:
                prefill_tokens += len(request.prompt)
                if admission.prefill and prefill_tokens > self.max_prefill_tokens:
                    break
            following = self._peek(1)
            last = following is None or following.prompt != request.prompt
            if not self._fits(request, group, last):
                if self.running:
                    break
                # A lone group may leave no room for a copy beside it; its pages alone are always enough.
                # The members after this one compute their prompt again.
                last = True
                assert self._fits(request, group, last)
            self._upcoming.popleft()
            if group is None:
                pages = self.pool.allocate(pages_for(len(request.prompt), self.page_size))
                group = self._open_group = PromptGroup(request.prompt, pages)
                admission.prefill.append(group)
            sequence = (
                self._take_over(request, group) if last else self._fork(request, group, admission.copies)
            )
            self.running.add(sequence)
            admission.sequences.append((sequence, group))
        return admission

    def finish(self, sequence: Sequence) -> None:
        """Give back everything the sequence holds."""
        self.running.remove(sequence)
        self.pool.release(sequence.pages)

    def close(self) -> None:
        """Give back everything that is still held; for an abandoned or failed run."""
        for sequence in list(self.running):
            self.finish(sequence)
        if self._open_group is not None:
            self.pool.release(self._open_group.pages)
            self._open_group = None
        self._upcoming.clear()

    def _peek(self, index: int) -> Request | None:
        while len(self._upcoming) <= index:
            request = next(self._source, None)
            if request is None:
                return None
            need = self._reservation(request)
            if need > self.pool.capacity:
                raise UserError(
                    f"request {request.identity!r} needs {need * self.page_size} tokens of key-value cache "
                    f"({len(request.prompt)} of prompt and up to {self.max_new_tokens} new) and the cache "
                    f"has {self.pool.capacity * self.page_size}: raise kv_tokens or lower max_new_tokens"
                )
            self._upcoming.append(request)
        return self._upcoming[index]

    def _reservation(self, request: Request) -> int:
        return reservation(len(request.prompt), self.max_new_tokens, self.page_size)

    def _fits(self, request: Request, group: PromptGroup | None, last: bool) -> bool:
        prompt_pages = pages_for(len(request.prompt), self.page_size)
        shared_pages = len(request.prompt) // self.page_size
        need = self._reservation(request) - (prompt_pages if last else shared_pages)
        if group is None:
            need += prompt_pages
        return need <= self.pool.free

    def _take_over(self, request: Request, group: PromptGroup) -> Sequence:
        """The last member: the group's hold on its pages becomes the sequence's."""
        own = self.pool.allocate(self._reservation(request) - len(group.pages))
        self._open_group = None
        return Sequence(request, group.pages + own)

    def _fork(self, request: Request, group: PromptGroup, copies: list[tuple[int, int]]) -> Sequence:
        """Any other member: full pages are shared, the partly filled one is copied."""
        full = len(request.prompt) // self.page_size
        own = self.pool.allocate(self._reservation(request) - full)
        shared = group.pages[:full]
        self.pool.retain(shared)
        if full < len(group.pages):
            copies.append((group.pages[full], own[0]))
        return Sequence(request, shared + own)
