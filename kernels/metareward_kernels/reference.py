"""Every op in plain PyTorch, written to be read: the oracle of the tests.

Nothing here is chunked, batched or fast. Everything runs in the precision of its inputs, fp64 included.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metareward_kernels.pair_losses import PairLogprobs, PairLoss

if TYPE_CHECKING:
    from metareward_kernels.paged_attention import Segments
    from metareward_kernels.segment_tree import SegmentTree

MASK32 = 0xFFFFFFFF


def head_distribution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """log softmax((hidden @ weight.T + bias) / temperature). [T,H], [V,H], [V] -> [T,V]."""
    logits = hidden @ weight.T
    return ((logits if bias is None else logits + bias) / temperature).log_softmax(dim=-1)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The head's log-probs at the targets. [T,H], [V,H], [T] -> [T]. Holds [T,V]."""
    return head_distribution(hidden, weight, bias, temperature).gather(1, targets[:, None]).squeeze(1)


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats of each distribution. [T,V] -> [T]; an entry of probability 0 adds 0."""
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(dim=-1)


def linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    reference_logprobs: Tensor,
    loss: PairLoss,
    *,
    pair_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of all logits, sums over sequences, the loss of every pair. Holds [T,V].

    Returns the loss [] (gradients by autograd), log-probs [S] and the mean entropy of each sequence's tokens [S].
    """
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logprobs = (logits / temperature).log_softmax(dim=-1)
    at_target = logprobs.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)
    lengths = torch.diff(cu_seqlens).tolist()
    sums = torch.stack([part.sum() for part in at_target.split(lengths)])
    means = torch.stack([part.sum() / max(1, part.numel()) for part in entropy.split(lengths)])
    tokens = torch.tensor(lengths, dtype=sums.dtype)
    chosen, rejected = pairs.unbind(dim=1)
    record = PairLogprobs(
        sums[chosen],
        sums[rejected],
        reference_logprobs[chosen],
        reference_logprobs[rejected],
        tokens[chosen],
        tokens[rejected],
    )
    losses = loss(record)
    return (losses / len(pairs) if pair_weights is None else losses * pair_weights).sum(), sums, means


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Row by row, head by head: gather every token that the row sees in any of its segments, then one softmax."""
    page = key_pages.shape[1]
    group = query.shape[1] // key_pages.shape[2]
    keys: list[list[Tensor]] = [[] for _ in query]  # of each row, a tensor [limit, Hk, D] a segment
    values: list[list[Tensor]] = [[] for _ in query]
    for g, start in enumerate(segments.page_starts.tolist()):
        for entry in range(int(segments.row_starts[g]), int(segments.row_starts[g + 1])):
            row, limit = int(segments.rows[entry]), int(segments.limits[entry])
            pages = segments.page_ids[start : start + math.ceil(limit / page)].long()
            keys[row].append(key_pages[pages].flatten(0, 1)[:limit])
            values[row].append(value_pages[pages].flatten(0, 1)[:limit])
    out = torch.zeros_like(query)
    for row in range(query.shape[0]):
        if sum(len(part) for part in keys[row]) == 0:
            continue
        seen_keys, seen_values = torch.cat(keys[row]), torch.cat(values[row])
        for head in range(query.shape[1]):
            scores = seen_keys[:, head // group] @ query[row, head] * scale
            out[row, head] = scores.softmax(dim=0) @ seen_values[:, head // group]
    return out


def visible_tokens(segments: SegmentTree) -> Tensor:
    """[T,T] bool: whether token i sees token j, from the definition."""
    offsets, parents = segments.offsets.tolist(), segments.parents.tolist()
    seen = torch.zeros(segments.tokens, segments.tokens, dtype=torch.bool)
    for segment, parent in enumerate(parents):
        for token in range(offsets[segment], offsets[segment + 1]):
            seen[token, offsets[segment] : token + 1] = True
            above = parent
            while above >= 0:
                seen[token, offsets[above] : offsets[above + 1]] = True
                above = parents[above]
    return seen


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTree, scale: float
) -> Tensor:
    """Head by head, under the full mask. [T,Hq,D], [T,Hk,D] twice -> [T,Hq,D]."""
    group = query.shape[1] // key.shape[1]
    hidden = ~visible_tokens(segments)
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        heads.append(weights @ value[:, head // group])
    return torch.stack(heads, dim=1)


def kept_tokens(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> Tensor:
    """Token ids (ascending) of one valid row [V] that may be drawn: top-k first, then top-p of what is left, then
    min-p.
    """
    row = logits.double()
    if temperature == 0.0:
        return row.argmax(dim=0, keepdim=True)
    order = row.sort(descending=True, stable=True).indices  # stable: of equal logits the lower token id first
    if 0 < top_k < row.numel():
        order = order[:top_k]
    weights = ((row[order] - row.max()) / temperature).exp()
    if top_p < 1.0:
        mass = weights.cumsum(dim=0)
        order = order[: int((mass < top_p * mass[-1]).sum()) + 1]
    order = order[weights[: order.numel()] >= min_p]
    return order.sort().values


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse-CDF draw in vocabulary order over the kept tokens, in fp64. [S,V], [S] -> [S] int64, and [S] float32
    each: the log-prob under softmax(logits), and the one under the truncated distribution.

    A row that holds NaN or +inf, or no finite logit, has no distribution: token -1, log-probs NaN.
    """
    tokens = torch.full((logits.shape[0],), -1, dtype=torch.int64)
    logprobs = torch.full((logits.shape[0],), math.nan, dtype=torch.float32)
    truncated = torch.full((logits.shape[0],), math.nan, dtype=torch.float32)
    for s in range(logits.shape[0]):
        row = logits[s].double()
        if row.numel() == 0 or not math.isfinite(row.max()):  # max() is NaN when any element is
            continue
        kept = kept_tokens(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        drawn = 0
        if kept.numel() > 1:
            cumulative = ((row[kept] - row.max()) / temperature).exp().cumsum(dim=0)
            drawn = int((cumulative <= uniforms[s] * cumulative[-1]).sum())
        tokens[s] = kept[drawn]
        logprobs[s] = row.log_softmax(dim=0)[kept[drawn]]
        truncated[s] = 0.0 if temperature == 0.0 else (row[kept] / temperature).log_softmax(dim=0)[drawn]
    return tokens, logprobs, truncated


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. [T,K], [N,K] -> [T,N]. In fp64 the exact sums, to far below fp32's rounding."""
    return x @ weight.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x squared over the last dimension + eps) * weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def add_rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """residual += delta in place; the RMS norm of what it then holds. [T,H], [T,H], [H] -> [T,H]."""
    if delta is not None:
        residual += delta
    return rms_norm(residual, weight, eps)


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Head by head: optional norm, rotary embedding of queries and keys; keys and values into their slots, token by
    token. [T,(Hq+2Hk)*D] -> [T,Hq,D]. sin is signed: the first half of its channels is negated.
    """
    page, kv_heads, dim = key_pages.shape[1:]
    heads = qkv.reshape(qkv.shape[0], qkv.shape[1] // dim, dim)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm_weight is not None:
        query = rms_norm(query, q_norm_weight, eps)
    if k_norm_weight is not None:
        key = rms_norm(key, k_norm_weight, eps)
    query, key = (x * cos + x.roll(dim // 2, dims=-1) * sin for x in (query, key))
    for t, slot in enumerate(slots.tolist()):
        key_pages[slot // page, slot % page] = key[t]
        value_pages[slot // page, slot % page] = value[t]
    return query


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, silu(x) = x / (1 + e^-x). [T,2I] -> [T,I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds (Salmon et al., SC 2011), in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def keyed_uniform(key: int, position: int) -> float:
    """The uniform number in (0,1) of one (key, position): 53 bits; zero is replaced by half a step."""
    low_high = (key & MASK32, (key >> 32) & MASK32)
    words = philox4x32_10((position & MASK32, (position >> 32) & MASK32, 0, 0), low_high)
    return max((words[0] << 21) | (words[1] >> 11), 0.5) * 2.0**-53
