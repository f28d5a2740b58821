"""Checkpoints of a training stage: torch.distributed.checkpoint, under a temporary name until every rank has written.

`training/step-000120` is complete by its name. What a kill leaves under `*.tmp` is deleted at the next start.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from metareward.errors import UserError
from metareward.model.decoder import Decoder

PREFIX = "step-"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != ".tmp")


def save_checkpoint(
    folder: Path, step: int, decoder: Decoder, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write the state after `step` optimizer steps and drop all but the newest `keep`. A collective."""
    final = folder / f"{PREFIX}{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    model_state, optimizer_state = get_state_dict(decoder, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(temporary, final)
        for old in checkpoint_folders(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, decoder: Decoder, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint, for any number of ranks; returns its step, 0 where there is none. A collective.

    Raises:
        UserError: the newest checkpoint cannot be read, naming it; nothing is deleted.
    """
    if dist.get_rank() == 0:
        for leftover in folder.glob(f"{PREFIX}*.tmp"):
            shutil.rmtree(leftover)
    dist.barrier()
    found = checkpoint_folders(folder)
    if not found:
        return 0
    model_state, optimizer_state = get_state_dict(decoder, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(0)}
    try:
        dcp.load(state, checkpoint_id=str(found[-1]))
    except Exception as error:
        others = f"; the run then goes on from {found[-2].name}" if len(found) > 1 else ""
        raise UserError(
            f"the checkpoint {found[-1]} cannot be read ({first_cause(error)}): delete that folder and run again{others}"
        ) from error
    set_state_dict(decoder, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def first_cause(error: BaseException) -> str:
    """The first line of what a (possibly collective) checkpoint error stems from."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
