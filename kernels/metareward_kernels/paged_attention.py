"""Decode attention over a paged KV cache: one query a sequence, its keys and values scattered over pages.

Per sequence of length L: 4 L Hq D FLOP on 2 L Hk D elements of cache, so it is bound by reading the cache; every
key and value is read once for all the query heads of its group. Scores, softmax and sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metareward_kernels import dispatch

_GATHER_BYTES = (
    64 << 20
)  # the PyTorch path copies the pages of some sequences at a time, at most about this much


def _attend_gathered(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The PyTorch path for a few sequences at once."""
    sequences, query_heads, dim = query.shape
    page, kv_heads = key_pages.shape[1:3]
    slots = page_table.shape[1] * page
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    valid = torch.arange(slots, device=query.device)[None] < lengths[:, None]  # [S, slots]
    # Entries past the end may be anything, and what they point to may be NaN: read page 0 there, and zero it.
    table = torch.where(valid[:, ::page], page_table, 0).long()
    keys = key_pages[table].reshape(sequences, slots, kv_heads, dim).to(compute)
    values = value_pages[table].reshape(sequences, slots, kv_heads, dim).to(compute)
    values = values.masked_fill(~valid[:, :, None, None], 0.0)
    grouped = query.view(sequences, kv_heads, query_heads // kv_heads, dim).to(compute)
    scores = torch.einsum("skgd,stkd->skgt", grouped, keys).mul_(scale)
    scores = scores.masked_fill_(~valid[:, None, None, :], float("-inf")).softmax(dim=-1)
    scores = scores.masked_fill_(lengths[:, None, None, None] == 0, 0.0)
    return torch.einsum("skgt,stkd->skgd", scores, values).reshape(query.shape).to(query.dtype)


def paged_attention_decode_torch(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The PyTorch path of `paged_attention_decode`."""
    sequences, slots = page_table.shape[0], page_table.shape[1] * key_pages.shape[1]
    if sequences == 0 or slots == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    row_bytes = 2 * 4 * slots * key_pages.shape[2] * key_pages.shape[3]
    rows = max(1, _GATHER_BYTES // max(1, row_bytes))
    query = query.contiguous()
    parts = [
        _attend_gathered(
            query[i : i + rows],
            key_pages,
            value_pages,
            page_table[i : i + rows],
            lengths[i : i + rows],
            scale,
        )
        for i in range(0, sequences, rows)
    ]
    return torch.cat(parts)


def _check_indices(key_pages: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    pages, page = key_pages.shape[:2]
    if lengths.numel() == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > page_table.shape[1] * page:
        raise IndexError(
            f"lengths span [{low}, {high}], outside the page table's [0, {page_table.shape[1] * page}]"
        )
    first = torch.arange(page_table.shape[1], device=lengths.device) * page
    used = page_table[first[None] < lengths[:, None]]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pages):
        raise IndexError(
            f"the page table names pages [{int(used.min())}, {int(used.max())}] of [0, {pages - 1}]"
        )


@torch.library.custom_op("metareward::paged_attention_decode", mutates_args=())
def _paged_attention_decode(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    known = query.dtype in (torch.float32, torch.bfloat16)
    unsupported = None if known else f"the compiled op takes float32 and bfloat16, not {query.dtype}"
    if dispatch.implementation("paged_attention_decode", query.device.type, unsupported) == "cpp":
        try:
            return torch.ops.metareward.paged_attention_decode_cpp(
                query.contiguous(),
                key_pages,
                value_pages,
                page_table.contiguous(),
                lengths.contiguous(),
                scale,
            )
        except RuntimeError:  # the stable ABI knows no IndexError
            _check_indices(key_pages, page_table, lengths)
            raise
    if query.device.type == "cpu":  # elsewhere the check would wait for the device at every layer
        _check_indices(key_pages, page_table, lengths)
    return paged_attention_decode_torch(query, key_pages, value_pages, page_table, lengths, scale)


@_paged_attention_decode.register_fake
def _(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def paged_attention_decode(
    query: Tensor,  # [S,Hq,D]
    key_pages: Tensor,  # [P,page,Hk,D]
    value_pages: Tensor,  # [P,page,Hk,D]
    page_table: Tensor,  # [S,M]
    lengths: Tensor,  # [S]
    scale: float,
) -> Tensor:
    """Softmax attention of each sequence's one query over the first `lengths` tokens of its pages.

    query [S,Hq,D], key_pages and value_pages [P,page,Hk,D] of one dtype (any strides but a contiguous last
    dimension), Hq a multiple of Hk; query head h reads key head h // (Hq / Hk). page_table [S,M] int32: page m of a
    sequence holds its tokens [m * page, (m + 1) * page); entries past its length are never read. lengths [S] int32
    counts the current token, whose key and value are already written. scale multiplies the scores.
    Returns [S,Hq,D] in the query's dtype; zeros where the length is 0. Not differentiable.
    Raises TypeError, ValueError or (on the CPU) IndexError for inputs that do not fit together.
    """
    if not query.dtype == key_pages.dtype == value_pages.dtype:
        raise TypeError(
            f"query, keys and values differ in dtype: {query.dtype}, {key_pages.dtype}, {value_pages.dtype}"
        )
    if page_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise TypeError(f"page_table and lengths must be int32, got {page_table.dtype} and {lengths.dtype}")
    if query.dim() != 3 or key_pages.dim() != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            "need query [S,Hq,D] and key_pages, value_pages [P,page,Hk,D], got "
            f"{list(query.shape)}, {list(key_pages.shape)}, {list(value_pages.shape)}"
        )
    if query.shape[2] != key_pages.shape[3] or query.shape[1] % max(1, key_pages.shape[2]) != 0:
        raise ValueError(f"query {list(query.shape)} does not fit key_pages {list(key_pages.shape)}")
    if page_table.dim() != 2 or page_table.shape[0] != query.shape[0] or lengths.shape != query.shape[:1]:
        raise ValueError(
            f"need page_table [S,M] and lengths [S] for {query.shape[0]} sequences, "
            f"got {list(page_table.shape)} and {list(lengths.shape)}"
        )
    if query.shape[2] > 1 and (key_pages.stride(3) != 1 or value_pages.stride(3) != 1):
        raise ValueError("the last dimension of key_pages and value_pages must be contiguous")
    return _paged_attention_decode(query, key_pages, value_pages, page_table, lengths, float(scale))
