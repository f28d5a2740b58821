"""Sampling on groups of ranks that share a model, as an engine and as whole stages.

A script: it imports everything once and forks the ranks of every number of processes. Its argument is the path of a dictionary,
(name, processes) -> a `Sampling` or a `Staging`, saved by torch.save. Every rank writes what it saw to `<name>-<rank>.pt`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Else every rank would import it anew, which takes it longer than all else.
import torch._dynamo
from rank_worker import fork_ranks
from torch import Tensor

from metareward.config import Recipe
from metareward.loop import run_stage
from metareward.model.hf_files import load_decoder
from metareward.model.packed_attention import packed_attention
from metareward.model.tensor_parallel import ALONE, TensorGroup
from metareward.run import ranks
from metareward.sampler import Engine, Request, SamplingParams
from metareward.stages.logprob_difference import logprob_difference

# Few pages and slots, and too little left to grow: sequences wait, share and give way.
SETTINGS: dict[str, Any] = {
    "page_size": 4,
    "max_running": 5,
    "max_step_tokens": 24,
    "kv_tokens": 52,
    "margin": 0.1,
}
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=12)
DRAWN = SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=12)
ODD_SIZES = (1, 3, 97, 1023, 4097)


@dataclass
class Sampling:
    """An engine on groups of `size` ranks; each group takes its share of the requests."""

    model: Path
    size: int
    dtype: torch.dtype = torch.float32


@dataclass
class Staging:
    """The respond stage of a run."""

    recipe: Recipe
    root: Path


def prompt(length: int, salt: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(100 * salt + length)
    return tuple(torch.randint(2, 131, (length,), generator=generator).tolist())


def requests() -> list[Request]:
    """Prompts on both sides of a page's edge; all but one begin alike, and every one has two samples."""
    shared = prompt(10, salt=1)
    prompts = [prompt(7, salt=2), *((*shared, *prompt(length, salt=3)) for length in (1, 2, 3, 6, 7, 15))]
    return [
        Request(f"{index}/{sample}", tokens) for index, tokens in enumerate(prompts) for sample in range(2)
    ]


def sample(case: Sampling) -> dict[str, Any]:
    size, rank = case.size, ranks.rank()
    group = ALONE if size == 1 else TensorGroup(rank % size, size, ranks.neighbours(size))
    decoder = load_decoder(case.model, dtype=case.dtype, group=group)
    engine = Engine(decoder, stop_ids=range(0, 131, 12), seed=3, **SETTINGS)
    mine = requests()[rank // size :: ranks.world_size() // size]
    found = {
        name: {item.identity: item for item in engine.generate(mine, params)}
        for name, params in (("greedy", GREEDY), ("drawn", DRAWN))
    }
    scored = [(request.prompt, found["drawn"][request.identity]) for request in mine]
    return {
        **found,
        "preemptions": engine.stats.preemptions,
        "difference": logprob_difference(decoder, scored),
        "logits": plain_logits(decoder),
        "block_bytes": sum(
            part.numel() * part.itemsize for block in decoder.blocks for part in block.parameters()
        ),
        "cache_bytes": sum(pages.numel() * pages.itemsize for pages in engine.runner.key_pages),
        "sums": [
            group.sum(torch.randn(count, generator=torch.Generator().manual_seed(rank)))
            for count in ODD_SIZES
        ],
    }


@torch.inference_mode()
def plain_logits(decoder: Any) -> Tensor:
    ids = torch.tensor(prompt(23, salt=4))
    return decoder.logits(decoder(ids, torch.arange(len(ids)), packed_attention([0, len(ids)])))


def stage(case: Staging) -> dict[str, Any]:
    run_stage(case.recipe, case.root, "respond", 1)
    return {}


def main(plan: Path) -> None:
    cases: dict[tuple[str, int], Any] = torch.load(plan, weights_only=False)
    for processes in sorted({count for _, count in cases}):

        def work(rank: int, processes: int = processes) -> None:
            ranks.start_ranks()
            for (name, count), case in cases.items():
                if count == processes:
                    outcome = sample(case) if isinstance(case, Sampling) else stage(case)
                    torch.save(outcome, plan.with_name(f"{name}-{rank}.pt"))
            ranks.stop_ranks()

        codes = fork_ranks(processes, work)
        if any(codes):
            sys.exit(f"of {processes} ranks ended with {codes}")


if __name__ == "__main__":
    # So that what is saved and loaded is of one module, whoever does it.
    sys.modules["tensor_parallel_worker"] = sys.modules["__main__"]
    main(Path(sys.argv[1]))
