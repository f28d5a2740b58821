"""What each mode of activation checkpointing computes twice, counted by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from metareward.model.flops import Work, attention_flops, step_flops
from metareward.model.hf_files import load_decoder
from metareward.model.recompute import Recompute
from metareward.training.examples import Example
from metareward.training.packing import pack, work_of
from metareward.training.step import hidden_states

CPU = torch.device("cpu")
LAYERS = 2
# Of a block: queries, keys, values, output, gate, up, down.
PRODUCTS = 7


class Operators(TorchDispatchMode):
    """Counts what really runs, by name; what a checkpoint hands out from its store does not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def counted(folder: Path, examples: list[Example], mode: Recompute) -> tuple[Counter[str], Counter[str]]:
    """Operators of the blocks' forward pass, and of their backward pass with what it computes again."""
    decoder = load_decoder(folder, dtype=torch.float32)
    decoder.activation_checkpointing = mode
    batch = pack(examples, CPU)
    with Operators() as forward:
        loss = hidden_states(decoder, batch).square().sum()
    with Operators() as backward:
        loss.backward()
    return forward.counts, backward.counts


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
@pytest.mark.parametrize(
    ("mode", "again", "attention"), [("none", 0, 0), ("selective", 0, 0), ("full", PRODUCTS - 1, 1)]
)
def test_what_is_computed_again(
    models: dict[str, tuple[Any, Path]],
    make_examples: Callable[..., list[Example]],
    family: str,
    mode: Recompute,
    again: int,
    attention: int,
) -> None:
    """Nothing needs the output of a block's last product, so even "full" does not compute that one again."""
    forward, backward = counted(models[family][1], make_examples(3), mode)
    assert forward["aten::mm"] == LAYERS * PRODUCTS
    assert forward["metareward::segment_attention_cpp"] == LAYERS
    assert backward["aten::mm"] == LAYERS * (2 * PRODUCTS + again)
    assert backward["metareward::segment_attention_cpp"] == LAYERS * attention
    assert backward["metareward::segment_attention_backward_cpp"] == LAYERS


def test_selective_computes_the_cheap_rest_again(
    models: dict[str, tuple[Any, Path]], make_examples: Callable[..., list[Example]]
) -> None:
    """Or it would be "none" by another name."""
    _, kept = counted(models["qwen3"][1], make_examples(3), "none")
    _, again = counted(models["qwen3"][1], make_examples(3), "selective")
    assert kept["aten::silu"] == 0
    assert again["aten::silu"] == LAYERS


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_what_is_computed_again_by_pytorch_s_counter(
    models: dict[str, tuple[Any, Path]], make_examples: Callable[..., list[Example]], family: str
) -> None:
    """The counter knows products and not our attention, whose FLOPs are taken off."""
    batch, totals = pack(make_examples(3), CPU), []
    for mode in ("none", "full"):
        decoder = load_decoder(models[family][1], dtype=torch.float32)
        decoder.activation_checkpointing = mode
        with FlopCounterMode(display=False) as counter:
            hidden_states(decoder, batch).square().sum().backward()
        totals.append(counter.get_total_flops())
    work = Work.of(work_of(batch))
    found = step_flops(decoder.config, work, recompute_blocks=True)
    assert totals[1] - totals[0] == found.recomputed - attention_flops(decoder.config, work.pairs)
