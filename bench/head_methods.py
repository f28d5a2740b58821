"""The methods that the head benchmark compares: ours and plain PyTorch's here, other packages' in head_peers.py.

A method takes the inputs of a cell and returns a `Call`: what to run, and how to read its gradients. Whatever it can
make ready once (padding, compiled functions) it makes there, outside of the measured time. One that cannot run raises
`Unavailable` with the reason, which goes into its row.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from metareward_kernels import dispatch, pair_losses
from metareward_kernels.pair_losses import PairLogprobs
from torch import Tensor

from bench.head_inputs import BETA, Inputs, sequence_sums

Op = Literal["logprob", "preference"]
# With what runs elsewhere.
BF16_CPU_OPS = {"linear_fp32": "torch.mm", "linear_softmax": None}


class Unavailable(Exception):
    """Why a method cannot run here, as a phrase."""


class Call(NamedTuple):
    forward: Callable[[], Tensor]  # the [T] log-probs, their sum [], or the loss []
    leaves: tuple[Tensor, Tensor]  # hidden, in whatever layout the method wants, and weight
    upstream: Tensor | None = None  # gradient of the log-probs; None for a scalar
    positions: Tensor | None = None  # where the T tokens lie in the flattened leaf; None for [T,H]


@dataclass(frozen=True)
class Method:
    name: str
    op: Op
    prepare: Callable[[Inputs], Call]
    package: str = "torch"
    reported: tuple[
        str, ...
    ] = ()  # our ops that it runs, for the row's implementation; () for others' methods
    note: str | None = None
    logit_copies: int = (
        0  # [T,V] tensors in fp32 that it holds at its peak, more or less; 0 where it holds none
    )
    forced: str | None = None  # METAREWARD_KERNELS while it runs
    compiled: bool = False  # by torch.compile, which takes its time in the first call

    @property
    def ours(self) -> bool:
        return self.package == "metareward"

    def implementation(self, device: str, dtype: str) -> str:
        """The package and version; behind ours, which implementation of each op runs.

        Raises:
            Unavailable: the package is missing, or the forced implementation cannot run on the device.
        """
        found = installed(self.package)
        if found is None and not self.ours:  # ours runs from a checkout too
            raise Unavailable(f"{self.package} is not installed")
        if not self.ours:
            return f"{self.package} {found}"
        try:
            with forced(self.forced):
                known = [op for op in self.reported if op in dispatch.OPS]
                running = {op: which_runs(op, device, dtype) for op in known}
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        ops = ", ".join(f"{op}: {which}" for op, which in running.items() if which is not None)
        return f"{self.package} {found or 'checkout'} ({ops})"


def which_runs(op: str, device: str, dtype: str) -> str | None:
    """The implementation of one of our ops, or None where it has no part: two are for bf16 on a CPU alone."""
    if op in BF16_CPU_OPS and (device != "cpu" or dtype != "bf16"):
        return BF16_CPU_OPS[op]
    return dispatch.implementation(op, device)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load(module: str, name: str, package: str) -> Any:
    """An attribute of a module of a package that may be missing or fail to load here.

    Raises:
        Unavailable: it cannot be had, with the reason.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        found = installed(package)
        what = f"{package} is not installed" if found is None else f"{package} {found} has no usable {name}"
        raise Unavailable(f"{what} ({one_line(error)})") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:limit]


@contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """Our ops run with this implementation; None leaves the choice as it is."""
    before = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    if implementation is not None:
        os.environ[dispatch.ENVIRONMENT_VARIABLE] = implementation
    try:
        yield
    finally:
        if before is not None:
            os.environ[dispatch.ENVIRONMENT_VARIABLE] = before
        elif implementation is not None:
            del os.environ[dispatch.ENVIRONMENT_VARIABLE]


def per_token(inputs: Inputs, logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """A call of logprobs(hidden, weight, targets) -> [T]."""
    leaves = (inputs.hidden, inputs.weight)
    return Call(lambda: logprobs(*leaves, inputs.targets), leaves, inputs.upstream)


def with_pair_loss(inputs: Inputs, logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """The same, summed over each completion, and the mean DPO loss of the pairs."""
    leaves = (inputs.hidden, inputs.weight)
    tokens = torch.tensor(inputs.lengths, device=inputs.hidden.device)
    chosen, rejected = inputs.pairs.unbind(1)

    def loss() -> Tensor:
        sums = sequence_sums(logprobs(*leaves, inputs.targets).float(), inputs)
        pairs = PairLogprobs(
            sums[chosen],
            sums[rejected],
            inputs.reference_logprobs[chosen],
            inputs.reference_logprobs[rejected],
            tokens[chosen],
            tokens[rejected],
        )
        return pair_losses.dpo(pairs, beta=BETA).mean()

    return Call(loss, leaves)


def both_ops(
    name: str, logprobs: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]], **fields: Any
) -> list[Method]:
    """A way to per-token log-probs, for both ops. `logprobs` makes the function and may raise Unavailable."""
    return [
        Method(name, "logprob", lambda inputs: per_token(inputs, logprobs()), **fields),
        Method(
            f"{name} + pair loss", "preference", lambda inputs: with_pair_loss(inputs, logprobs()), **fields
        ),
    ]


def our_linear_logprob() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return load("metareward_kernels.linear_logprob", "linear_logprob", "metareward")


def our_gather_logprob() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    gather = load("metareward_kernels.gather_logprob", "gather_logprob", "metareward")
    return lambda hidden, weight, targets: gather(F.linear(hidden, weight), targets)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most trainers do: logits, upcast, log_softmax, gather."""
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def torch_linear_cross_entropy(chunked: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    op = load("torch.nn.functional", "linear_cross_entropy", "torch")
    options = load("torch.nn", "LinearCrossEntropyOptions", "torch")() if chunked else None
    return lambda hidden, weight, targets: -op(hidden, weight, targets, reduction="none", options=options)


def torch_summed_cross_entropy(inputs: Inputs) -> Call:
    op = load("torch.nn.functional", "linear_cross_entropy", "torch")
    options = load("torch.nn", "LinearCrossEntropyOptions", "torch")()
    leaves = (inputs.hidden, inputs.weight)
    return Call(lambda: -op(*leaves, inputs.targets, reduction="sum", options=options), leaves)


def our_preference(inputs: Inputs) -> Call:
    op = load("metareward_kernels.linear_preference", "linear_preference", "metareward")
    leaves = (inputs.hidden, inputs.weight)
    pairs = inputs.pairs.cpu()  # where it is read; from a GPU it would cost a wait

    def pair_loss(record: PairLogprobs) -> Tensor:
        return pair_losses.dpo(record, beta=BETA)

    def loss() -> Tensor:
        return op(
            *leaves, inputs.targets, inputs.cu_seqlens, pairs, inputs.reference_logprobs, pair_loss
        ).loss

    return Call(loss, leaves)


def our_dpo_loss(inputs: Inputs) -> Call:
    op = load("metareward_kernels.dpo_loss", "dpo_loss", "metareward")
    logprobs = our_linear_logprob()
    leaves = (inputs.hidden, inputs.weight)
    ends = inputs.cu_seqlens.to(inputs.hidden.device)

    def loss() -> Tensor:
        found = logprobs(*leaves, inputs.targets)
        return op(found, ends, inputs.pairs, inputs.reference_logprobs, beta=BETA).losses.mean()

    return Call(loss, leaves)


OURS = "metareward"
HEAD_OPS = ("linear_logprob", "linear_softmax", "linear_fp32", "head_rows")
# The first of an op is what the others' results are compared with.
METHODS = [
    *both_ops("linear_logprob", our_linear_logprob, package=OURS, reported=HEAD_OPS),
    Method("linear_preference", "preference", our_preference, OURS, HEAD_OPS[1:]),
    Method("linear_logprob + dpo_loss", "preference", our_dpo_loss, OURS, (*HEAD_OPS, "dpo_loss")),
    *both_ops(
        "linear + gather_logprob",
        our_gather_logprob,
        package=OURS,
        reported=("gather_logprob", "head_rows"),
        logit_copies=2,
    ),
    *both_ops("eager", lambda: eager, logit_copies=4),
    # With a pair loss behind it, it is eager once more.
    both_ops("linear_cross_entropy", lambda: torch_linear_cross_entropy(False), logit_copies=4)[0],
    *both_ops("linear_cross_entropy, chunked", lambda: torch_linear_cross_entropy(True)),
    Method(
        "linear_cross_entropy, chunked, summed",
        "logprob",
        torch_summed_cross_entropy,
        note="returns the sum alone, so every log-prob has the gradient 1",
    ),
]
