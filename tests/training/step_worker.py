"""One training step of three micro-batches, and its gradients: on this process, or on two ranks as `two_ranks`.

The optimizer has learning rate 0, so that the gradients of the step stay where they are and the weights as they were.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from metareward.config import TrainSettings
from metareward.model.decoder import Decoder
from metareward.training.examples import Example
from metareward.training.objectives import pair_objective
from metareward.training.sharded import load_sharded
from metareward.training.step import train_step

CPU = torch.device("cpu")
# No gradient of these tests is as long: clipping scales by exactly 1.
FAR = 1e30
Reference = Mapping[str, tuple[float, float]]


@dataclass
class Outcome:
    figures: dict[str, float]
    gradients: dict[str, Tensor]
    collectives: dict[str, int]


class Collectives(TorchDispatchMode):
    """Counts the calls of torch.distributed's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name().removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def step(
    decoder: Decoder,
    settings: TrainSettings,
    micro: Sequence[Sequence[Example]],
    weight: int,
    reference: Reference,
) -> Outcome:
    """One step on this rank's micro-batches; `weight` is the number of pairs on all ranks."""
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.0)
    filler = next(item for examples in micro for item in examples)
    with Collectives() as collectives:
        result = train_step(
            decoder, optimizer, pair_objective(settings, reference), micro, weight, filler, FAR, CPU
        )
    figures = {**result.figures, "grad_norm": result.grad_norm, "flops": result.flops}
    return Outcome(figures, gradients(decoder), dict(collectives.counts))


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    found = {}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def rank_main(rank: int, folder: Path) -> None:
    """One of two ranks: its own micro-batches of `plan.pt`, in fp32 and sharded."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plan = torch.load(folder / "plan.pt", weights_only=False)
    for name, (model, micro) in plan["jobs"].items():
        settings: TrainSettings = plan["settings"]
        decoder = load_sharded(model, settings, CPU, 2)
        outcome = step(decoder, settings, micro[rank], plan["weight"], plan["reference"])
        torch.save(outcome, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def two_ranks(
    jobs: Mapping[str, tuple[Path, Sequence[Sequence[Sequence[Example]]]]],
    settings: TrainSettings,
    weight: int,
    reference: Reference,
    folder: Path,
) -> dict[str, list[Outcome]]:
    """Name -> what each rank saw. jobs: name -> (model directory, micro-batches of every rank)."""
    plan = {"jobs": jobs, "settings": settings, "weight": weight, "reference": reference}
    torch.save(plan, folder / "plan.pt")
    mp.spawn(rank_main, (folder,), nprocs=2)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for name in jobs
    }
