"""Decode steps as CUDA graphs: one replay instead of several hundred launches.

A graph has fixed shapes, so a step is padded to a bucket of rows, its tiles and its page table to capacities; the
graph of a bucket is captured when it is first wanted, over buffers that every step is copied into. Padding rows
belong to nobody: they write to a page that no sequence owns, read no segment, and their logits are not looked at.
Steps with prompt tokens are not captured: their shapes vary too much.

All graphs share the memory of what they compute on the way; each keeps its logits, [rows, V], which are valid until
a graph runs again. Padding and the buffers are tested on a CPU; capture and replay have never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from metareward_kernels.attention_tiles import TileCapacity
from torch import Tensor

from metareward.errors import UserError
from metareward.sampler.inputs import Inputs, Tiling, as_inputs, ends_of, host_arrays, pack, unpack
from metareward.sampler.step import Long, Step


def bucket_of(rows: int, most: int) -> int:
    """The rows that a step is padded to: a power of two up to 32, then a multiple of 32, of 64 above 512; at most `most`.

    Up to some hundred rows a step is bound by reading the weights, and rows more cost next to nothing.
    """
    if rows <= 32:
        bucket = 1 << (rows - 1).bit_length()
    else:
        multiple = 32 if rows <= 512 else 64
        bucket = -(-rows // multiple) * multiple
    return min(bucket, most)


def pad_step(step: Step, rows: int, *, slot: int, page: int, page_size: int) -> Step:
    """A decode-only step with rows added up to `rows`; the added ones give logits too, after the others.

    slot: whose newest token, 0, they take as input, at position 0. page: the page of the cache that their keys and
    values go to, several to one place if need be, for nobody reads it. They see nothing.
    """
    extra = rows - len(step.positions)
    assert extra >= 0, (rows, len(step.positions))
    assert step.prefill_tokens == 0

    def padded(array: Long, with_what: Long | int) -> Long:
        return np.concatenate((array, np.broadcast_to(np.asarray(with_what, dtype=np.int64), extra)))

    return replace(
        step,
        decode_slots=padded(step.decode_slots, slot),
        positions=padded(step.positions, 0),
        places=padded(step.places, page * page_size + np.arange(extra) % page_size),
        logit_rows=padded(step.logit_rows, np.arange(rows - extra, rows)),
    )


@dataclass(frozen=True)
class Captured:
    """A graph, the buffer that its inputs are views of, and what it computes: logits [rows, V]."""

    replay: Callable[[], None]
    buffer: Tensor
    logits: Tensor
    tiles: TileCapacity
    page_ids: int


class DecodeGraphs:
    """The graphs of a model's decode steps.

    forward: computes logits [rows, V] from inputs on the device; slot, page, page_size: see `pad_step`; max_running:
    the largest bucket. Call `clear` when what `forward` reads beside its inputs has moved.
    """

    def __init__(
        self,
        forward: Callable[[Inputs], Tensor],
        tiling: Tiling,
        device: torch.device,
        *,
        max_running: int,
        page_size: int,
    ) -> None:
        self._forward = forward
        self._tiling = tiling
        self._device = device
        self._max_running = max_running
        self._page_size = page_size
        self._graphs: dict[int, Captured] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all graphs: they read memory that is no longer the model's or the cache's."""
        self._graphs.clear()
        self._pool = None

    def run(self, step: Step, *, slot: int, page: int) -> Tensor:
        """Logits [D, V] of a step that only decodes, valid until the next call.

        Raises:
            UserError: the graph cannot be captured.
        """
        rows = len(step.positions)
        bucket = bucket_of(rows, self._max_running)
        step = pad_step(step, bucket, slot=slot, page=page, page_size=self._page_size)
        captured = self._graphs.get(bucket)
        entries, page_ids = len(step.segments.rows), len(step.segments.page_ids)
        if captured is None or entries > captured.tiles.entries or page_ids > captured.page_ids:
            # Segments with equal readers are one, so those that are shared form a tree over the rows: fewer than
            # rows. Entries are as many as the rows times the levels they read.
            tiles = self._tiling.capacity(2 * bucket, _power_of_two(max(entries, 4 * bucket)))
            captured = self._capture(step, tiles, _power_of_two(page_ids))
            self._graphs[bucket] = captured
        else:
            packed = self._packed(step, captured.tiles)
            captured.buffer[: len(packed)].copy_(packed, non_blocking=True)
        captured.replay()
        return captured.logits[:rows]

    def _packed(self, step: Step, tiles: TileCapacity, page_ids: int = 0) -> Tensor:
        """The step's arrays, all but the page table padded to fixed sizes, which is last: what is past it stays."""
        arrays = self._arrays(step, tiles, page_ids)
        return pack(arrays, pinned=self._device.type == "cuda")

    def _arrays(self, step: Step, tiles: TileCapacity, page_ids: int) -> list[np.ndarray]:
        segments = step.segments
        table = self._tiling.table(segments, len(step.positions), tiles)
        # The kernel finds page_starts, lengths and row_starts in its tiles; here they would be of varying sizes.
        fixed = replace(
            segments,
            page_ids=_extended(segments.page_ids, page_ids),
            page_starts=segments.page_starts[:0],
            lengths=segments.lengths[:0],
            rows=_extended(segments.rows, tiles.entries),
            row_starts=segments.row_starts[:1],
            limits=_extended(segments.limits, tiles.entries),
        )
        return host_arrays(replace(step, segments=fixed), table)

    def _capture(self, step: Step, tiles: TileCapacity, page_ids: int) -> Captured:
        arrays = self._arrays(step, tiles, page_ids)
        buffer = torch.empty(ends_of(arrays)[-1], dtype=torch.uint8, device=self._device)
        buffer.copy_(pack(arrays, pinned=self._device.type == "cuda"), non_blocking=True)
        inputs = as_inputs(unpack(buffer, arrays), tiles.slots)
        # Kernels are compiled in a run before, which capturing does not allow. It computes the step itself, so what it
        # writes to the cache is what the replay will write.
        self._forward(inputs)
        try:
            replay, logits = self._record(inputs)
        except RuntimeError as error:
            raise UserError(
                f"no CUDA graph of batch size {len(step.positions)} could be captured ({error}): "
                "make the engine with cuda_graphs=False"
            ) from error
        return Captured(replay, buffer, logits, tiles, page_ids)

    def _record(self, inputs: Inputs) -> tuple[Callable[[], None], Tensor]:
        """A function that computes the same again from what the inputs then hold, and where its logits are."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(inputs)
        return graph.replay, logits


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _extended(array: np.ndarray, size: int) -> np.ndarray:
    """The array with zeros after it up to `size`; as it is when it is as long or longer."""
    return np.concatenate((array, np.zeros(max(0, size - len(array)), dtype=array.dtype)))
