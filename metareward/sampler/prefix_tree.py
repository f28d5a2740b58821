"""Which prompt prefixes are in the key-value cache: a radix tree over token ids, page by page.

A node is a run of whole pages and the tokens in them; a path from a root is a prefix of some prompt. A page
that a node holds is immutable once computed, so any number of sequences read it. Every sequence that reads a
node is among its users, and among those of all nodes above it. Nodes without users stay until their pages are
wanted: the least recently used leaf goes first.

There is a root for each version of the weights, because keys and values of other weights are wrong ones.
Plain Python without torch: property tests run it against an oracle.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from metareward.sampler.pages import PagePool


class Node:
    """A run of whole pages below ``parent``.

    ``start`` is the position of its first token. Of its tokens, ``computed`` have keys and values once the step
    being put together has run; ``settled`` had them before that step. ``users`` are the slots of the sequences
    that read it; ``active`` are its children with users.
    """

    __slots__ = (
        "active",
        "children",
        "computed",
        "last_used",
        "pages",
        "parent",
        "settled",
        "start",
        "tokens",
        "users",
    )

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], pages: list[int], start: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.start = start
        self.computed = 0
        self.settled = 0
        self.last_used = 0
        self.users: dict[int, None] = {}
        self.active: dict[Node, None] = {}
        # By first token. Children fork at whole pages, so several may begin alike.
        self.children: dict[int, list[Node]] = {}

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of some tokens: everything down to ``node``, whose end is on a page's edge.

    Beyond it, the first ``partial`` slots of page ``partial_page`` (of ``partial_node``) hold the next tokens: a
    sequence that goes another way inside that page copies it.
    """

    node: Node
    partial: int = 0
    partial_page: int = -1
    partial_node: Node | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] equals b[:low], a[:high] does not equal b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class PrefixTree:
    """The prefixes in the pages of ``pool``, in nodes of whole pages of ``page_size`` tokens."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.evictable = 0  # pages of nodes without users
        self.pages = 0  # pages of all nodes
        self._roots: dict[object, Node] = {}
        self._ticks = count(1)
        # (last use, tie-break, node) of nodes that may have been leaves without users; checked when popped.
        self._idle: list[tuple[int, int, Node]] = []

    def root(self, version: object) -> Node:
        """The root for one version of the weights; the prefixes of all other versions are dropped.

        Nothing of another version may be in use.
        """
        if version not in self._roots:
            self.clear()
            self._roots[version] = Node(None, (), [], 0)
        return self._roots[version]

    def clear(self) -> None:
        """Drop every prefix. None may be in use."""
        self.evict(self.pages)
        assert self.pages == 0, "prefixes in use cannot be dropped"
        self._roots.clear()
        self._idle.clear()

    def match(self, root: Node, tokens: tuple[int, ...], limit: int) -> Match:
        """The longest cached prefix of ``tokens[:limit]``; a node that it ends in is split there."""
        page_size, node, at = self.page_size, root, 0
        while at < limit:
            best, length = None, 0
            for child in node.children.get(tokens[at], ()):
                here = common_prefix(child.tokens, tokens[at : min(at + len(child.tokens), limit)])
                if here > length:
                    best, length = child, here
            if best is None:
                break
            whole = length // page_size * page_size
            if whole == len(best.tokens):
                node, at = best, best.end
                continue
            page, partial = best.pages[whole // page_size], length - whole
            source = best
            if whole:
                node = self._split(best, whole)
                source = best  # what is left of it: it now begins at the partly shared page
            return Match(node, partial, page, source) if partial else Match(node)
        return Match(node)

    def enter(self, node: Node, slot: int) -> None:
        """Make the sequence in ``slot`` a user of the node and of all above it."""
        step: Node | None = node
        while step is not None and slot not in step.users:
            if not step.users:
                self.evictable -= len(step.pages)
                if step.parent is not None:
                    step.parent.active[step] = None
            step.users[slot] = None
            step = step.parent

    def leave(self, node: Node, slot: int, until: Node | None = None) -> None:
        """The sequence in ``slot`` no longer reads the node, nor those above it up to (and without) ``until``."""
        tick = next(self._ticks)
        step: Node | None = node
        while step is not until and step is not None:
            del step.users[slot]
            step.last_used = tick
            if not step.users:
                self.evictable += len(step.pages)
                if step.parent is not None:
                    del step.parent.active[step]
                    self._offer(step)
            step = step.parent

    def insert(self, parent: Node, tokens: tuple[int, ...], pages: list[int]) -> Node:
        """A new node of whole pages below ``parent``; the tree takes over the caller's hold on the pages."""
        assert len(tokens) == len(pages) * self.page_size > 0, "a node is whole pages"
        node = Node(parent, tokens, pages, parent.end)
        node.last_used = next(self._ticks)
        parent.children.setdefault(tokens[0], []).append(node)
        self.pages += len(pages)
        self.evictable += len(pages)
        self._offer(node)
        return node

    def cut(self, node: Node, tokens: int) -> Node:
        """Drop everything of a node after its first ``tokens`` tokens (rounded down to pages); it may have neither
        users nor children. Returns the node that is left: this one, or its parent when nothing is."""
        assert not node.users, "only an unused node can be cut"
        assert not node.children, "only a leaf can be cut"
        keep = tokens // self.page_size
        dropped = node.pages[keep:]
        self.pool.release(dropped)
        self.pages -= len(dropped)
        self.evictable -= len(dropped)
        if keep == 0:
            assert node.parent is not None
            self._detach(node)
            return node.parent
        node.pages, node.tokens = node.pages[:keep], node.tokens[: keep * self.page_size]
        node.computed = min(node.computed, len(node.tokens))
        node.settled = min(node.settled, len(node.tokens))
        return node

    def evict(self, pages: int) -> None:
        """Free at least ``pages`` pages of unused nodes, or all there are."""
        target = self.pool.free + pages
        while self.pool.free < target and self._idle:
            used, _, node = heapq.heappop(self._idle)
            if node.users or node.children or node.last_used != used or not node.pages:
                continue
            self.pool.release(node.pages)
            self.pages -= len(node.pages)
            self.evictable -= len(node.pages)
            parent = node.parent
            self._detach(node)
            if parent is not None and parent.parent is not None and not parent.users and not parent.children:
                self._offer(parent)

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(child for siblings in node.children.values() for child in siblings)

    def _split(self, node: Node, tokens: int) -> Node:
        """Cut a node in two after ``tokens`` tokens, a whole number of pages; returns the new upper one."""
        parent, pages = node.parent, tokens // self.page_size
        assert parent is not None
        upper = Node(parent, node.tokens[:tokens], node.pages[:pages], node.start)
        upper.computed, upper.settled = min(node.computed, tokens), min(node.settled, tokens)
        upper.last_used = node.last_used
        upper.users = dict(node.users)
        upper.children = {node.tokens[tokens]: [node]}
        siblings = parent.children[node.tokens[0]]
        siblings[siblings.index(node)] = upper
        if node.users:
            del parent.active[node]
            parent.active[upper] = None
            upper.active[node] = None
        node.parent, node.start = upper, node.start + tokens
        node.tokens, node.pages = node.tokens[tokens:], node.pages[pages:]
        node.computed, node.settled = node.computed - upper.computed, node.settled - upper.settled
        return upper

    def _detach(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        siblings = parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.tokens[0]]
        node.pages, node.parent = [], None

    def _offer(self, node: Node) -> None:
        """Tell the eviction of a node that may be an unused leaf."""
        if not node.children:
            heapq.heappush(self._idle, (node.last_used, next(self._ticks), node))
