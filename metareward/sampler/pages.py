"""Which pages of the key-value cache are in use, and by how many holders.

The pool deals in page numbers only; the tensors belong to the runner. A page of a shared prompt is held by
every sequence that attends to it, and by the prompt group as long as more members may still fork from it.
"""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """A fixed number of pages with reference counts. Freed pages are reused last in, first out."""

    def __init__(self, capacity: int) -> None:
        self._references: list[int] = []
        self._free: list[int] = []
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        """Number of pages, free or not."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many holders the page has; 0 when it is free."""
        return self._references[page]

    def grow(self, capacity: int) -> None:
        """Raise the number of pages to ``capacity``; held pages keep their numbers and holders."""
        old = self.capacity
        if capacity < old:
            raise ValueError(f"a pool of {old} pages cannot shrink to {capacity}")
        self._references.extend([0] * (capacity - old))
        # The stack is popped from its end: the lowest new number goes out first.
        self._free[:0] = range(capacity - 1, old - 1, -1)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free pages, each with one holder. The caller has checked ``free``."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} are free"
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            assert self._references[page] == 0, f"page {page} was in use and on the free list"
            self._references[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one holder to each page."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be retained"
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take one holder away from each page; a page without holders is free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} was released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
