"""Blocks under torch.compile: one compiled function that all of them share, because they differ in their weights alone.

`Block.forward` calls it inside of what FSDP does around a block. So weights are gathered as ever, and parameters keep their names
in checkpoints and models. The numbers of tokens and of segments are marked dynamic: micro-batches of other sizes are not compiled
anew. Attention is one op of the graph, and activation checkpointing decides what the graph's backward half computes again.
Has run on a CPU only, never on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from metareward_kernels import traced_segment_attention
from torch import Tensor

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.decoder import Attend, Block, Decoder
from metareward.model.recompute import Recompute
from metareward.training.packing import TreeAttention

NEEDED = {"cpu": "install a C++ compiler (g++)", "cuda": "install the triton that fits your PyTorch"}
"""By type of device: what a compiler that does not work is most often for want of."""


def check_compiler(settings: TrainSettings, device: torch.device, setting: str = "train.compile") -> None:
    """
    Raises:
        UserError: blocks are to be compiled, and a first small function cannot be.
    """
    if not settings.compile:
        return
    problem = compiler_problem(device.type)
    if problem is not None:
        needed = NEEDED.get(device.type, "look whether torch.compile knows this device")
        raise UserError(
            f"{setting} = true, but torch.compile does not work on this {device.type} ({problem}): {needed}, or set it to false"
        )


@cache
def compiler_problem(device_type: str) -> str | None:
    """Why torch.compile cannot compile a function of a few numbers, or None. Takes seconds, once a process."""

    def small(x: Tensor) -> Tensor:
        return torch.cos(x) + 1.0

    try:
        torch.compile(small, fullgraph=True)(torch.ones(64, device=device_type))
    except Exception as error:
        return cause(error)
    return None


def cause(error: BaseException) -> str:
    """What a compiler's exception says first, without what wraps it."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


def compile_blocks(decoder: Decoder, backend: str | Callable[..., Any] = "inductor") -> None:
    """From now on the decoder's blocks run compiled, which happens at their first call; with `TreeAttention` only."""
    import torch._dynamo

    # It warns of in-place operations in a block, and there are none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    compiled = torch.compile(run_block, fullgraph=True, backend=backend)

    def run(
        block: Block, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend, recompute: Recompute
    ) -> Tensor:
        assert isinstance(attend, TreeAttention), "a compiled block takes its tree of segments as a tensor"
        table = attend.tree.table
        for tensor, dimension in ((hidden, 0), (cos, 0), (sin, 0), (table, 1)):
            torch._dynamo.mark_dynamic(tensor, dimension)
        return compiled(block, hidden, cos, sin, table, recompute)

    decoder.compiled_block = run


def run_block(
    block: Block, hidden: Tensor, cos: Tensor, sin: Tensor, table: Tensor, recompute: Recompute
) -> Tensor:
    """What is compiled: a block, with attention as one op. table: `SegmentTree.table`."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return traced_segment_attention(query, key, value, table, query.shape[-1] ** -0.5)

    return block.run(hidden, cos, sin, attend, recompute)


@contextmanager
def naming_compiler_failures(settings: TrainSettings) -> Iterator[None]:
    """Around all that runs blocks: a compiler's failure becomes a UserError."""
    if not settings.compile:
        yield
        return
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise UserError(
            f"torch.compile cannot compile the model's blocks ({cause(error)}): set train.compile = false"
        ) from error
