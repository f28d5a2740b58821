"""Whether a method computes what the reference does: its result, and the gradients of hidden and weight."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.head_methods import Call

Found = tuple[Tensor, tuple[Tensor, ...]]  # the result, and the gradients of hidden [T,H] and weight [V,H]
# Of a log-prob in nats; of a loss or a sum of log-probs relative; of a gradient the norm of the difference over the norm.
# In bf16 a peer may round logits (to steps of 1/32 near 4), every term of a gradient, and a running sum.
TOLERANCE = {
    "bf16": {"logprob": 0.1, "sum": 0.1, "loss": 1e-2, "gradient": 5e-2},
    "fp32": {"logprob": 1e-3, "sum": 1e-4, "loss": 1e-4, "gradient": 1e-3},
}


def in_token_order(call: Call, found: Found) -> Found:
    """The gradient of hidden as [T,H], whatever its layout."""
    if call.positions is None or not found[1]:
        return found
    hidden, weight = found[1]
    return found[0], (hidden.flatten(0, -2)[call.positions], weight)


def deviations(found: Found, expected: Found) -> dict[str, float]:
    """How far a result and its gradients are from the expected ones; by the names of TOLERANCE's measures."""
    result, wanted = found[0].double(), expected[0].double()
    if result.dim() == 1:
        worst = {"logprob": float((result - wanted).abs().max())}
    else:
        name, wanted = ("loss", wanted) if wanted.dim() == 0 else ("sum", wanted.sum())
        worst = {name: float((result - wanted).abs() / wanted.abs())}
    for name, ours, theirs in zip(("hidden", "weight"), expected[1], found[1], strict=bool(found[1])):
        difference = torch.linalg.vector_norm(theirs.float() - ours.float())
        worst[f"gradient_{name}"] = float(difference / torch.linalg.vector_norm(ours.float()))
    return worst


def too_far(found: dict[str, float], dtype: str) -> str | None:
    """Which deviation is above its tolerance (NaN is), as a phrase; or None."""
    for name, value in found.items():
        tolerance = TOLERANCE[dtype][name.partition("_")[0]]
        if not value <= tolerance:
            return f"{name} deviates by {value:.2g}, more than {tolerance:.2g}"
    return None


def one_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)
