"""One step for the device: which tokens are computed, what they read, and which logits draw a token for whom.

Rows come in two kinds in one batch: the next token of every decoding sequence, then the chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from metareward.sampler.prefix_tree import Node
from metareward.sampler.slots import Slots

Array = NDArray[np.int32]
Long = NDArray[np.int64]


@dataclass(frozen=True)
class HostSegments:
    """What the rows of a step attend to, as numpy int32; the fields are those of ``metareward_kernels.Segments``."""

    page_ids: Array
    page_starts: Array
    lengths: Array
    rows: Array
    row_starts: Array
    limits: Array


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` .. ``start + len(tokens)`` of the sequence in ``slot``, to be computed in this step."""

    slot: int
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """T rows, of which the first D decode; R of them give logits, from which S tokens are drawn.

    copies: [C, 2] pages (from, to) to copy before anything is written.
    decode_slots: [D] their inputs are the newest tokens of these slots, which are on the device.
    token_ids: [T - D] inputs of the other rows.
    positions: [T]. places: [T] where keys and values go in the cache seen as one row of places.
    logit_rows: [R]. draws: [S] which of the R logits; draw_slots, draw_keys, draw_counts: [S] for whom, and the key
    and counter of the random number; draw_generations: [S] whose slot it was.
    """

    copies: Long
    decode_slots: Long
    token_ids: Long
    positions: Long
    places: Long
    segments: HostSegments
    logit_rows: Long
    draws: Long
    draw_slots: Long
    draw_keys: Long
    draw_counts: Long
    draw_generations: Long

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens among the rows."""
        return len(self.token_ids)


def kind_of(step: Step) -> str:
    """The phase of a step's forward pass: "prefill" of prompt tokens only, "decode" of next tokens only, else "mixed"."""
    if len(step.decode_slots) == 0:
        return "prefill"
    return "decode" if step.prefill_tokens == 0 else "mixed"


def work_of(step: Step) -> dict[str, int]:
    """What a step's forward pass computes, as `metareward.model.flops.Work` names it.

    A prefix that several rows read counts once in kv_tokens, as attention reads it, and for every row in pairs.
    """
    return {
        "passes": 1,
        "rows": len(step.positions),
        "prefill_rows": step.prefill_tokens,
        "logit_rows": len(step.logit_rows),
        "pairs": int(step.segments.limits.sum(dtype=np.int64)),
        "kv_tokens": int(step.segments.lengths.sum(dtype=np.int64)),
    }


@dataclass
class SharedSegments:
    """The segments of prefixes that several decoding sequences read: row and column of the page table where the
    pages begin, tokens, and the reading rows of the step."""

    slots: Long
    pages: Long
    lengths: Array
    rows: Array
    row_starts: Array


def shared_segments(root: Node, slots: Slots, page_size: int) -> SharedSegments:
    """A segment for every run of tree nodes with the same two or more decoding readers.

    Sets ``slots.unshared`` of the decoding sequences to where what they read alone begins. The pages of a segment
    are found in the row of any reader.
    """
    slots.unshared[slots.active] = 0
    starts: list[tuple[int, int]] = []
    lengths: list[int] = []
    readers: list[Long] = []
    stack = [(child, 0, -1) for child in root.active]
    while stack:
        node, above, segment = stack.pop()
        if len(node.users) < 2:
            continue
        slot_ids = np.fromiter(node.users, dtype=np.int64, count=len(node.users))
        slot_ids = slot_ids[slots.row_of[slot_ids] >= 0]
        if len(slot_ids) < 2:
            continue
        if len(slot_ids) == above:
            # The same readers as the node above: one longer segment.
            lengths[segment] += len(node.tokens)
        else:
            segment = len(starts)
            starts.append((int(slot_ids[0]), node.start // page_size))
            lengths.append(len(node.tokens))
            readers.append(slot_ids)
        slots.unshared[slot_ids] = node.end // page_size
        stack.extend((child, len(slot_ids), segment) for child in node.active)
    counts = [len(slot_ids) for slot_ids in readers]
    all_readers = np.concatenate(readers) if readers else np.zeros(0, dtype=np.int64)
    places = np.array(starts, dtype=np.int64).reshape(-1, 2)
    return SharedSegments(
        slots=places[:, 0],
        pages=places[:, 1],
        lengths=np.array(lengths, dtype=np.int32),
        rows=slots.row_of[all_readers].astype(np.int32),
        row_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
    )


def build_segments(
    shared: SharedSegments, slots: Slots, decoding: Long, chunks: Seq[Chunk], page_size: int
) -> HostSegments:
    """All segments of a step: the shared prefixes, the rest of every decoding sequence, the chunks.

    A decoding sequence's ``lengths`` already count the token of this step. A chunk reads its own row of the page
    table from the beginning, each of its tokens up to itself.
    """
    width, size = slots.page_table.shape[1], len(decoding)
    unshared = slots.unshared[decoding]
    own = slots.lengths[decoding] - unshared * page_size
    counts = np.array([len(chunk.tokens) for chunk in chunks], dtype=np.int64)
    ends = np.array([chunk.start + len(chunk.tokens) for chunk in chunks], dtype=np.int32)
    entries = np.concatenate((shared.row_starts[1:], shared.row_starts[-1] + np.arange(1, size + 1)))
    last = entries[-1] if len(entries) else 0
    rows = size + int(counts.sum())
    limits = [np.repeat(shared.lengths, np.diff(shared.row_starts)), own]
    limits += [np.arange(chunk.start + 1, chunk.start + 1 + len(chunk.tokens)) for chunk in chunks]
    return HostSegments(
        page_ids=slots.page_table.reshape(-1),
        page_starts=np.concatenate(
            (
                shared.slots * width + shared.pages,
                decoding * width + unshared,
                np.array([chunk.slot * width for chunk in chunks], dtype=np.int64),
            )
        ).astype(np.int32),
        lengths=np.concatenate((shared.lengths, own, ends)).astype(np.int32),
        rows=np.concatenate((shared.rows, np.arange(rows))).astype(np.int32),
        row_starts=np.concatenate(([0], entries, last + np.cumsum(counts))).astype(np.int32),
        limits=np.concatenate(limits).astype(np.int32),
    )


def places_of(slots: Slots, decoding: Long, chunks: Seq[Chunk], page_size: int) -> tuple[Long, Long]:
    """(positions [T], places [T]) of a step's rows; a decoding sequence's ``lengths`` count this step's token."""
    positions = slots.lengths[decoding].astype(np.int64) - 1
    pages = slots.page_table[decoding, positions // page_size].astype(np.int64)
    all_positions, all_places = [positions], [pages * page_size + positions % page_size]
    for chunk in chunks:
        at = np.arange(chunk.start, chunk.start + len(chunk.tokens))
        row = slots.page_table[chunk.slot]
        all_positions.append(at)
        all_places.append(row[at // page_size].astype(np.int64) * page_size + at % page_size)
    return np.concatenate(all_positions), np.concatenate(all_places)
