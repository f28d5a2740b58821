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
from torch.distributed.checkpoint.api import CheckpointException
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
    try:
        dcp.save(state, checkpoint_id=str(temporary))
    except (CheckpointException, OSError) as error:
        cause = first_cause(error)
        # torch's writer hides the errno, so a full disk is told by what is left.
        free = shutil.disk_usage(folder).free // 2**20
        raise UserError(
            f"the checkpoint {final} cannot be written ({first_line(cause)}; {free} MB are free): make room on that disk and "
            f"run the same command again, it goes on from the checkpoint before"
        ) from error
    dist.barrier()
    if dist.get_rank() == 0:
        os.replace(temporary, final)
        for old in checkpoint_folders(folder)[:-keep]:
            # Renamed first: half deleted, it must not look complete.
            shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))
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
    # torch's own exception is no Exception.
    except (Exception, CheckpointException) as error:
        cause = first_cause(error)
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            # Too little memory says nothing against the checkpoint.
            raise cause from error
        others = f"; the run then goes on from {found[-2].name}" if len(found) > 1 else ""
        raise UserError(
            f"the checkpoint {found[-1]} cannot be read ({first_line(cause)}): delete that folder and run again{others}"
        ) from error
    set_state_dict(decoder, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def first_cause(error: BaseException) -> BaseException:
    """What the first failing rank raised, where `error` is torch's exception for a failed collective.

    Raises:
        KeyboardInterrupt, SystemExit: where it was that; torch catches and wraps these too.
    """
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    if not isinstance(cause, Exception):
        raise cause
    return cause


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
