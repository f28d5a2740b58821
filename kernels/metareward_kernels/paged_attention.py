"""Attention over a paged KV cache, segment by segment: decode, shared prefixes and chunked prefill in one op.

A segment is a run of pages and the query rows that read it. A prefix that n rows share is read once for all of
them: n Hq D 4 L FLOP on 2 L Hk D elements of cache, so that the arithmetic and not the reading is the limit from a
few dozen rows on; a segment with one row (a sequence's own suffix) is bound by reading it. What a row sees in several
segments is merged by log-sum-exp. Scores, softmax and sums are fp32 (fp64 for fp64); on CPUs with bf16 arithmetic the
compiled op multiplies bf16 queries, keys, weights and values and adds in fp32.

The PyTorch path has never run on a GPU, where it would wait for the device to learn the lengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from metareward_kernels import dispatch

if TYPE_CHECKING:
    from metareward_kernels.attention_tiles import TileTable

_GATHER_ELEMENTS = (
    1 << 24
)  # the PyTorch path copies keys and holds scores of at most about this many elements


class Segments(NamedTuple):
    """G segments with E entries (row, limit) in all. All int32, contiguous, on the query's device.

    The segments of a row hold different tokens, and a segment names a row once. Entries of page_ids that no segment
    names, and the slots of pages past a segment's length, may hold anything.
    """

    page_ids: Tensor  # [N] page numbers: a flat buffer that the segments point into
    page_starts: Tensor  # [G] where in page_ids the ceil(length / page) pages of segment g begin
    lengths: Tensor  # [G] tokens in segment g
    rows: Tensor  # [E] the query rows that read the segment, segment after segment
    row_starts: Tensor  # [G+1] segment g has the entries row_starts[g] .. row_starts[g+1] - 1
    limits: Tensor  # [E] entry e sees the first limits[e] tokens of its segment, at most its length


def chosen_for(device: str, dtype: torch.dtype, dim: int) -> str:
    """The implementation that runs for queries of `dtype` with heads of `dim` channels."""

    def unsupported(implementation: str) -> str | None:
        if implementation == "triton":
            from metareward_kernels import triton_paged_attention

            return triton_paged_attention.unsupported(dtype, dim)
        return dispatch.unsupported_dtype(implementation, dtype)

    return dispatch.implementation("paged_attention", device, unsupported)


def _attend_padded(
    query: Tensor,  # [B,n,Hk,group,D]
    keys: Tensor,  # [B,L,Hk,D]
    values: Tensor,  # [B,L,Hk,D]
    limits: Tensor,  # [B,n]
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of n rows of each of B segments: [B,n,Hk,group,D], and the log-sum-exp [B,n,Hk,group]."""
    slots = torch.arange(keys.shape[1], device=keys.device)
    hidden = slots[None, None] >= limits[:, :, None]  # [B,n,L]
    scores = torch.einsum("bnkgd,blkd->bnkgl", query, keys).mul_(scale)
    scores = scores.masked_fill_(hidden[:, :, None, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    nothing = torch.isneginf(lse)
    weights = scores.sub_(lse.masked_fill(nothing, 0.0)[..., None]).exp_()
    return torch.einsum("bnkgl,blkd->bnkgd", weights, values), lse


def _gather(pages: Tensor, ids: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Slots of the pages `ids` [B,M] as [B,L,Hk,D], zero where `seen` [B,L] is false: there may be NaN there."""
    batch, slots = seen.shape
    tokens = pages[ids].reshape(batch, -1, *pages.shape[2:])[:, :slots].to(dtype)
    return tokens.masked_fill_(~seen[:, :, None, None], 0.0)


def _batches(lengths: list[int], counts: list[int], row_elements: int) -> list[list[int]]:
    """Segments that are computed together: a shared one alone, others with those of a similar length."""
    batches = [[g] for g, count in enumerate(counts) if count > 1 and lengths[g] > 0]
    single = sorted(
        (g for g, count in enumerate(counts) if count == 1 and lengths[g] > 0), key=lengths.__getitem__
    )
    while single:
        longest = lengths[single[-1]]
        room = max(1, _GATHER_ELEMENTS // (longest * row_elements))
        together = [g for g in single[-room:] if 2 * lengths[g] >= longest]
        batches.append(together)
        del single[-len(together) :]
    return batches


def _merge(out: Tensor, lse: Tensor, rows: Tensor, count: int) -> Tensor:
    """One softmax out of the entries' own, in their order: out [E,Hq,D], lse [E,Hq] -> [count,Hq,D]."""
    merged = out.new_zeros(count, *out.shape[1:])
    top = lse.new_full((count, lse.shape[1]), float("-inf"))
    total = lse.new_zeros(count, lse.shape[1])
    order = rows.argsort(stable=True)
    ranked = rows[order]
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ranked, ranked)
    for turn in range(int(rank.max()) + 1 if len(rows) else 0):  # every row takes its next entry
        entries = order[rank == turn]
        at = rows[entries]
        new_top = torch.maximum(top[at], lse[entries])
        base = new_top.masked_fill(torch.isneginf(new_top), 0.0)
        old, new = (top[at] - base).exp(), (lse[entries] - base).exp()
        merged[at] = merged[at] * old[..., None] + out[entries] * new[..., None]
        total[at] = total[at] * old + new
        top[at] = new_top
    return merged / total.masked_fill(total == 0, 1.0)[..., None]


def paged_attention_torch(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, segments: Segments, scale: float
) -> Tensor:
    """The PyTorch path of `paged_attention`."""
    query_rows, query_heads, dim = query.shape
    page, kv_heads = key_pages.shape[1:3]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    page_ids, page_starts, _, rows, _, limits = (part.long() for part in segments)
    lengths: list[int] = segments.lengths.tolist()
    borders: list[int] = segments.row_starts.tolist()
    counts = [end - begin for begin, end in pairwise(borders)]
    grouped = query.reshape(query_rows, kv_heads, query_heads // max(1, kv_heads), dim)
    out = torch.zeros(len(rows), *grouped.shape[1:], dtype=compute, device=query.device)
    lse = torch.full(out.shape[:-1], float("-inf"), dtype=compute, device=query.device)
    for batch in _batches(lengths, counts, max(1, kv_heads * dim)):
        slots = max(lengths[g] for g in batch)
        chosen = torch.tensor(batch, device=query.device)
        first = torch.arange(0, slots, page, device=query.device)
        ends = segments.lengths.long()[chosen]
        named = first[None] < ends[:, None]  # [B,M]
        places = torch.where(named, page_starts[chosen, None] + first[None] // page, 0)
        ids = torch.where(named, page_ids[places], 0)
        seen = torch.arange(slots, device=query.device)[None] < ends[:, None]
        keys, values = (_gather(pages, ids, seen, compute) for pages in (key_pages, value_pages))
        step = max(1, _GATHER_ELEMENTS // (query_heads * slots))
        for begin in range(borders[batch[0]], borders[batch[0] + 1], step) if len(batch) == 1 else [0]:
            if len(batch) == 1:
                entries = torch.arange(begin, min(begin + step, borders[batch[0] + 1]), device=query.device)[
                    None
                ]
            else:
                entries = torch.tensor([[borders[g]] for g in batch], device=query.device)
            out[entries], lse[entries] = _attend_padded(
                grouped[rows[entries]].to(compute), keys, values, limits[entries], scale
            )
    merged = _merge(out.flatten(1, 2), lse.flatten(1, 2), rows, query_rows)
    return merged.to(query.dtype)


def _check_indices(query: Tensor, key_pages: Tensor, segments: Segments) -> None:
    page_ids, page_starts, lengths, rows, row_starts, limits = segments
    pages, page = key_pages.shape[:2]
    rises = bool((row_starts[1:] >= row_starts[:-1]).all())
    if int(row_starts[0]) != 0 or int(row_starts[-1]) != len(rows) or not rises:
        raise IndexError(f"row_starts must rise from 0 to the {len(rows)} entries")
    if len(lengths) == 0:
        return
    needed = (lengths + page - 1) // page
    if (
        int(lengths.min()) < 0
        or int(page_starts.min()) < 0
        or int((page_starts + needed).max()) > len(page_ids)
    ):
        raise IndexError(f"page_starts and lengths lead outside the {len(page_ids)} page_ids")
    starts = torch.repeat_interleave(page_starts - needed.cumsum(0) + needed, needed)
    used = page_ids[starts + torch.arange(len(starts), device=starts.device)]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= pages):
        raise IndexError(
            f"the segments name pages [{int(used.min())}, {int(used.max())}] of [0, {pages - 1}]"
        )
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(query)):
        raise IndexError(
            f"the segments name rows [{int(rows.min())}, {int(rows.max())}] of [0, {len(query) - 1}]"
        )
    longest = torch.repeat_interleave(lengths, row_starts.diff())
    if rows.numel() and (int(limits.min()) < 0 or bool((limits > longest).any())):
        raise IndexError("limits must lie between 0 and the length of their segment")


def _attend(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, segments: Segments, scale: float
) -> Tensor:
    if chosen_for(query.device.type, query.dtype, query.shape[2]) == "cpp":
        try:
            return torch.ops.metareward.paged_attention_cpp(
                query.contiguous(), key_pages, value_pages, *(part.contiguous() for part in segments), scale
            )
        except RuntimeError:  # the stable ABI knows no IndexError
            _check_indices(query, key_pages, segments)
            raise
    if query.device.type == "cpu":  # elsewhere the check would wait for the device at every layer
        _check_indices(query, key_pages, segments)
    return paged_attention_torch(query, key_pages, value_pages, segments, scale)


@torch.library.custom_op("metareward::paged_attention", mutates_args=())
def _paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_ids: Tensor,
    page_starts: Tensor,
    lengths: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    limits: Tensor,
    scale: float,
) -> Tensor:
    segments = Segments(page_ids, page_starts, lengths, rows, row_starts, limits)
    return _attend(query, key_pages, value_pages, segments, scale)


@_paged_attention.register_fake
def _(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_ids: Tensor,
    page_starts: Tensor,
    lengths: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    limits: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def paged_attention(
    query: Tensor,  # [T,Hq,D]
    key_pages: Tensor,  # [P,page,Hk,D]
    value_pages: Tensor,  # [P,page,Hk,D]
    segments: Segments,
    scale: float,
    tiles: TileTable | None = None,
) -> Tensor:
    """Softmax attention of each query row over all the tokens that it sees in its segments.

    query [T,Hq,D], key_pages and value_pages [P,page,Hk,D] of one dtype (any strides but a contiguous last
    dimension), Hq a multiple of Hk; query head h reads key head h // (Hq / Hk). segments: see Segments; entry e lets
    row rows[e] see the first limits[e] tokens of its segment, in decode all of them, in a prefill chunk's own pages as
    many as are not after it. Keys and values of seen tokens are already written. Those within a segment's length must
    be finite, or rows that do not see them may turn into NaN. scale multiplies the scores. tiles: for the Triton kernel,
    the work cut up on the host (`attention_tiles.make_tiles`, on the query's device), once for all layers of a step;
    without it every call waits for the device to learn the segments; with it page_starts, lengths and row_starts are
    not read. Others do not need it.
    Returns [T,Hq,D] in the query's dtype; zeros for a row that sees nothing. The same input gives the same bits,
    whatever the number of threads. Not differentiable.
    Raises TypeError, ValueError or (on the CPU) IndexError for inputs that do not fit together.
    """
    if not query.dtype == key_pages.dtype == value_pages.dtype:
        raise TypeError(
            f"query, keys and values differ in dtype: {query.dtype}, {key_pages.dtype}, {value_pages.dtype}"
        )
    for name, part in zip(Segments._fields, segments, strict=True):
        if part.dtype != torch.int32 or part.dim() != 1:
            raise TypeError(f"segments.{name} must be an int32 vector, got {part.dtype} {list(part.shape)}")
    if query.dim() != 3 or key_pages.dim() != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            "need query [T,Hq,D] and key_pages, value_pages [P,page,Hk,D], got "
            f"{list(query.shape)}, {list(key_pages.shape)}, {list(value_pages.shape)}"
        )
    if query.shape[2] != key_pages.shape[3] or query.shape[1] % max(1, key_pages.shape[2]) != 0:
        raise ValueError(f"query {list(query.shape)} does not fit key_pages {list(key_pages.shape)}")
    count = len(segments.lengths)
    if len(segments.page_starts) != count or len(segments.row_starts) != count + 1:
        raise ValueError(
            f"need page_starts [G] and row_starts [G+1] for {count} segments, "
            f"got [{len(segments.page_starts)}] and [{len(segments.row_starts)}]"
        )
    if segments.rows.shape != segments.limits.shape:
        raise ValueError(f"rows [{len(segments.rows)}] and limits [{len(segments.limits)}] differ in length")
    if query.shape[2] > 1 and (key_pages.stride(3) != 1 or value_pages.stride(3) != 1):
        raise ValueError("the last dimension of key_pages and value_pages must be contiguous")
    if chosen_for(query.device.type, query.dtype, query.shape[2]) == "triton":
        from metareward_kernels.triton_paged_attention import paged_attention_triton

        if query.device.type == "cpu" and tiles is None:
            _check_indices(query, key_pages, segments)
        return paged_attention_triton(query, key_pages, value_pages, segments, float(scale), tiles)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Past the wrapping of a Python op, which costs as much as a small step's attention, at every layer.
        return _attend(query, key_pages, value_pages, segments, float(scale))
    return _paged_attention(query, key_pages, value_pages, *segments, float(scale))
