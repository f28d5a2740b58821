"""What a checkpoint of a training stage holds, where it lies, and how it is read.

`training/step-000120` is complete by its name; checkpoint_writer.py sees to that. What a kill leaves under `*.tmp` is deleted at
the next start. It holds weights, optimizer state and the step. The step is the cursor: the order of the data and the learning
rate are pure functions of it, and training draws no random numbers, so there is no generator to keep.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from metareward.errors import UserError
from metareward.model.decoder import Decoder

PREFIX = "step-"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != ".tmp")


def state_of(decoder: Decoder, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state after `step` optimizer steps, under names that do not depend on the number of ranks. No copies."""
    model_state, optimizer_state = get_state_dict(decoder, optimizer, options=trained_only(decoder))
    return {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}


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
    state = state_of(decoder, optimizer, 0)
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
    set_state_dict(
        decoder,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=trained_only(decoder),
    )
    return int(state["step"])


def trained_only(decoder: Decoder) -> StateDictOptions:
    """Frozen weights are in no checkpoint: the model's own files have them. What is trained must be there, all of it: `dcp.load`
    sees to that before weights are set, so a state without the frozen ones may then be less than the model.
    """
    everything = all(parameter.requires_grad for parameter in decoder.parameters())
    return StateDictOptions(ignore_frozen_params=True, strict=everything)


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
