"""Draw one token a row from logits: temperature, top-k, top-p, min-p, by inverse CDF in vocabulary order.

The uniform number comes from outside (`keyed_uniforms`), so a draw is a pure function of a row and a number. Masses
and cumulative sums are fp64: in fp32 a sum over a large vocabulary drops the tail. The compiled path reads the row
two or three times, bf16 as it is, and selects by threshold; the PyTorch path sorts when top-k or top-p is on.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from metareward_kernels import dispatch


def _kept_mask(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor | None:
    """[S,V] bool of the tokens that top-k and top-p leave, or None for all of them."""
    limited = 0 < top_k < logits.shape[1]
    if not limited and top_p >= 1.0:
        return None
    ordered, order = logits.sort(
        dim=1, descending=True, stable=True
    )  # of equal logits the lower token id first
    if limited:
        ordered, order = ordered[:, :top_k], order[:, :top_k]
    keep = torch.ones_like(order, dtype=torch.bool)
    if top_p < 1.0:
        mass = ordered.double().sub_(ordered[:, :1]).div_(temperature).exp_().cumsum(dim=1)
        keep[:, 1:] = mass[:, :-1] < top_p * mass[:, -1:]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, keep)


def sample_tokens_torch(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch path of `sample_tokens`, truncated log-probs included."""
    rows, vocabulary = logits.shape
    if rows == 0 or vocabulary == 0:
        nan = torch.full((rows,), float("nan"), device=logits.device)
        return torch.full((rows,), -1, dtype=torch.int64, device=logits.device), nan, nan.clone()
    top = logits.amax(dim=1, keepdim=True)
    shifted = logits.double() - top
    if temperature == 0.0:
        # argmax leaves open which of equal maxima it gives; the first True of a mask is defined.
        tokens = (logits == top).int().argmax(dim=1)
        truncated = shifted.new_zeros(rows)
    else:
        weights = (shifted / temperature).exp_()
        kept = _kept_mask(logits, temperature, top_k, top_p)
        if min_p > 0.0:
            weights.masked_fill_(weights < min_p, 0.0)
        if kept is not None:
            weights.mul_(kept)
        cumulative = weights.cumsum(dim=1)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        tokens.clamp_(
            max=vocabulary - 1
        )  # only rows with NaN run past the end, and they are overwritten below
        truncated = shifted.gather(1, tokens[:, None]).squeeze(1) / temperature - cumulative[:, -1].log()
    logprobs = shifted.gather(1, tokens[:, None]).squeeze(1) - shifted.exp().sum(dim=1).log()
    invalid = ~top.squeeze(1).isfinite()
    return (
        tokens.masked_fill(invalid, -1),
        logprobs.float().masked_fill(invalid, float("nan")),
        truncated.float().masked_fill(invalid, float("nan")),
    )


@torch.library.custom_op("metareward::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = dispatch.implementation("sample_tokens", logits.device.type)
    if chosen == "cpp":
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        return torch.ops.metareward.sample_tokens_cpp(
            logits, uniforms.contiguous(), temperature, top_k, top_p, min_p
        )
    if chosen == "triton":
        from metareward_kernels.triton_sample import sample_tokens_triton

        return sample_tokens_triton(logits, uniforms, temperature, top_k, top_p, min_p)
    return sample_tokens_torch(logits, uniforms, temperature, top_k, top_p, min_p)


@_sample_tokens.register_fake
def _(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        torch.empty(rows, dtype=torch.int64, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
    )


@overload
def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    truncated_logprobs: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    truncated_logprobs: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def sample_tokens(
    logits: Tensor,  # [S,V]
    uniforms: Tensor,  # [S]
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    truncated_logprobs: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row; also its log-prob under the raw distribution softmax(logits).

    logits [S,V] float32 or bfloat16 (read exactly: the draw is that of the same values in float32); uniforms [S]
    float64 in (0,1). temperature 0 takes the argmax, the lowest id of equal maxima. top_k 0 (or at least V), top_p 1.0
    and min_p 0.0 are off. top_k keeps the k most probable tokens, then top_p the smallest set of the most probable
    ones whose mass reaches top_p of the mass after top_k, then min_p those whose probability is at least min_p times
    that of the most probable; of equal logits the lower id goes first. The token is the smallest kept id i whose
    cumulative mass exceeds uniform * total, summed in fp64.
    Returns (tokens [S] int64, logprobs [S] float32), and with `truncated_logprobs` also the log-probs [S] float32
    under the distribution drawn from, after temperature, top-k, top-p and min-p (0 at temperature 0). A row that holds
    NaN or +inf, or no finite logit, gives (-1, NaN, NaN): the caller knows whose row it is.
    Raises TypeError or ValueError for other dtypes, shapes, settings.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16) or uniforms.dtype != torch.float64:
        raise TypeError(
            f"need float32 or bfloat16 logits and float64 uniforms, got {logits.dtype} and {uniforms.dtype}"
        )
    if logits.dim() != 2 or uniforms.shape != logits.shape[:1]:
        raise ValueError(
            f"need logits [S,V] and uniforms [S], got {list(logits.shape)} and {list(uniforms.shape)}"
        )
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or a positive number, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must lie in [0, 1], got {min_p}")
    tokens, logprobs, truncated = _sample_tokens(
        logits, uniforms, float(temperature), top_k, float(top_p), float(min_p)
    )
    return (tokens, logprobs, truncated) if truncated_logprobs else (tokens, logprobs)
