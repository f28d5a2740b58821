"""The head's peers from other packages (the `bench` extra), each called as its own documentation does.

Liger's fused cross entropy and cut-cross-entropy's own kernels are Triton and run on CUDA alone. Liger's chunked DPO
and cut-cross-entropy's `torch_compile` are PyTorch and run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.head_inputs import BETA, Inputs, pad
from bench.head_methods import Call, Method, Unavailable, both_ops, load

TRL_TOKENS = 128  # of a sequence in the batch that TRL's loop over sequences is given


def needs_cuda(inputs: Inputs, what: str) -> None:
    if inputs.hidden.device.type != "cuda":
        raise Unavailable(f"{what} is written in Triton and needs a CUDA device")


def liger_cross_entropy(reduction: str) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        needs_cuda(inputs, "LigerFusedLinearCrossEntropyLoss")
        loss = load("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", "liger-kernel")(
            reduction=reduction
        )
        leaves = (inputs.hidden, inputs.weight)
        upstream = inputs.upstream if reduction == "none" else None
        return Call(lambda: -loss(inputs.weight, inputs.hidden, inputs.targets), leaves, upstream)

    return prepare


def liger_dpo(compiled: bool, chunk_pairs: int) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        make = load("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "liger-kernel")
        loss = make(beta=BETA, use_ref_model=False, compiled=compiled, chunk_size=chunk_pairs)
        hidden, targets, positions = pad(inputs)
        weight = inputs.weight
        return Call(lambda: loss(weight, hidden, targets)[0], (hidden, weight), None, positions)

    return prepare


def cut_cross_entropy(**options: object) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        if options["impl"] == "cce":
            needs_cuda(inputs, "cut-cross-entropy's cce")
            if inputs.hidden.dtype == torch.float32:
                raise Unavailable("cut-cross-entropy's cce takes bfloat16 and float16 alone")
        op = load("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
        leaves = (inputs.hidden, inputs.weight)
        return Call(
            lambda: -op(*leaves, inputs.targets, reduction="none", **options), leaves, inputs.upstream
        )

    return prepare


def trl_logprobs() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    select = load("trl.trainer.utils", "selective_log_softmax", "trl")

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        width = TRL_TOKENS if len(targets) % TRL_TOKENS == 0 else len(targets)
        logits = F.linear(hidden, weight)
        return select(logits.view(-1, width, logits.shape[1]), targets.view(-1, width)).flatten()

    return logprobs


DPO_NOTE = "the same pairs as a padded batch; T counts real tokens, the padding is computed too"
LIGER, CCE = "liger-kernel", "cut-cross-entropy"
PEERS = [
    Method("Liger fused linear cross entropy", "logprob", liger_cross_entropy("none"), LIGER),
    Method(
        "Liger fused linear cross entropy, summed",
        "logprob",
        liger_cross_entropy("sum"),
        LIGER,
        note="returns the sum alone, so every log-prob has the gradient 1",
    ),
    Method(
        "cut-cross-entropy", "logprob", cut_cross_entropy(impl="cce"), CCE, note="filter_eps as by default"
    ),
    Method(
        "cut-cross-entropy, unfiltered",
        "logprob",
        cut_cross_entropy(impl="cce", filter_eps=None),
        CCE,
        note="filter_eps=None: no gradient is left out",
    ),
    Method(
        "cut-cross-entropy, torch_compile",
        "logprob",
        cut_cross_entropy(impl="torch_compile"),
        CCE,
        logit_copies=2,
        compiled=True,
    ),
    *both_ops("TRL selective_log_softmax", trl_logprobs, package="trl", logit_copies=4),
    *(
        Method(
            f"Liger chunked DPO, {pairs} pair{'s' if pairs > 1 else ''} a chunk{', compiled' if compiled else ''}",
            "preference",
            liger_dpo(compiled, pairs),
            LIGER,
            note=DPO_NOTE,
            compiled=compiled,
        )
        for pairs, compiled in ((1, False), (1, True), (8, True))
    ),
]
