"""A step's numpy arrays as tensors on the device, sent in one copy that the host does not wait for.

From pageable memory a copy to a GPU waits for all that was started there before, and twenty small copies cost more
than a large one: so the arrays are packed into one pinned buffer, and the tensors are views of its copy. PyTorch
reuses a pinned buffer only when the copies from it have ended. On a CPU the tensors share the arrays' memory.

The packing is tested on a CPU; the copy to a GPU has never run on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from metareward_kernels import Segments
from metareward_kernels.attention_tiles import TileCapacity, TileTable, make_tiles, tile_capacity
from metareward_kernels.paged_attention import chosen_for
from numpy.typing import NDArray
from torch import Tensor

from metareward.model.config import ModelConfig
from metareward.sampler.step import HostSegments, Step

ALIGNMENT = 16  # bytes: Triton compiles a kernel apart for pointers that are no multiple of it


class Tiling(NamedTuple):
    """How the attention of a step is cut into tiles where the Triton kernels run, see `make_tiles`."""

    block_rows: tuple[int, int]
    target_tiles: int

    def table(
        self, segments: HostSegments, query_rows: int, capacity: TileCapacity | None = None
    ) -> TileTable:
        """The tiles of a step of `query_rows` rows, on the host."""
        return make_tiles(
            segments.page_starts,
            segments.lengths,
            segments.rows,
            segments.row_starts,
            segments.limits,
            query_rows=query_rows,
            block_rows=self.block_rows,
            target_tiles=self.target_tiles,
            capacity=capacity,
        )

    def capacity(self, segments: int, entries: int) -> TileCapacity:
        """Sizes that hold the tiles of any step with so many segments and entries."""
        return tile_capacity(
            segments=segments,
            entries=entries,
            block_rows=self.block_rows,
            target_tiles=self.target_tiles,
        )


def tiling_of(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tiling | None:
    """The tiling for a model of this dtype, or None where another implementation than Triton's runs."""
    if chosen_for(device.type, dtype, config.head_dim) != "triton":
        return None
    from metareward_kernels import triton_paged_attention as triton

    return Tiling(
        triton.block_rows(dtype, config.num_heads, config.num_kv_heads, config.head_dim),
        triton.target_tiles(device, config.num_kv_heads),
    )


class Inputs(NamedTuple):
    """What the forward pass of a step reads, on the device; see `Step`. tiles: None where none are needed."""

    decode_slots: Tensor  # [D] int64
    token_ids: Tensor  # [T-D] int64
    positions: Tensor  # [T] int64
    places: Tensor  # [T] int64
    logit_rows: Tensor  # [R] int64
    segments: Segments
    tiles: TileTable | None


def host_arrays(step: Step, tiles: TileTable | None) -> list[NDArray[Any]]:
    """The arrays of a step in the order that `as_inputs` takes; the page table, the largest, comes last."""
    segments = step.segments
    arrays: list[NDArray[Any]] = [
        step.decode_slots,
        step.token_ids,
        step.positions,
        step.places,
        step.logit_rows,
        segments.page_starts,
        segments.lengths,
        segments.rows,
        segments.row_starts,
        segments.limits,
    ]
    if tiles is not None:
        arrays += [part.numpy() for part in (tiles.narrow, tiles.wide, tiles.entry_slots, tiles.merge_starts)]
    return [*arrays, segments.page_ids]


def as_inputs(tensors: Sequence[Tensor], slots: int | None) -> Inputs:
    """The tensors of `host_arrays` by name; slots: of the tile table, None without one."""
    *rest, page_ids = tensors
    decode_slots, token_ids, positions, places, logit_rows, *rest = rest
    starts, lengths, rows, row_starts, limits, *rest = rest
    segments = Segments(page_ids, starts, lengths, rows, row_starts, limits)
    tiles = None if slots is None else TileTable(*rest, slots)  # type: ignore[call-arg, arg-type]
    return Inputs(decode_slots, token_ids, positions, places, logit_rows, segments, tiles)


def ends_of(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Where each array ends in the packed buffer, in bytes, with what it needs to keep the next one aligned."""
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    return np.cumsum(sizes, dtype=np.int64).tolist()


def pack(arrays: Sequence[NDArray[Any]], *, pinned: bool) -> Tensor:
    """One buffer [bytes] uint8 on the host that holds all arrays; `unpack` finds them again."""
    ends = ends_of(arrays)
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned)
    host = buffer.numpy()
    for array, end, begin in zip(arrays, ends, [0, *ends], strict=False):
        host[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        host[begin + array.nbytes : end] = 0
    return buffer


def unpack(buffer: Tensor, like: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Views of a packed buffer, or of a copy of it, with the shapes and dtypes of the arrays that were packed."""
    tensors = []
    for array, begin in zip(like, [0, *ends_of(like)], strict=False):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(buffer[begin : begin + array.nbytes].view(dtype).view(array.shape))
    return tensors


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, without waiting for it. On a CPU they share memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack(pack(arrays, pinned=True).to(device, non_blocking=True), arrays)
