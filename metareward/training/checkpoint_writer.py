"""Checkpoints written beside training: a copy of the state, then torch.distributed.checkpoint in a thread.

A checkpoint gets its name when every rank's part is on the disk and the index of all parts is too, in the thread and at once, so
that a kill loses no more than the steps since. The thread talks to other ranks in a process group of its own: its
collectives would else mix with those of the training step. Has run on CPU ranks (gloo) only; not on a GPU yet.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.training.checkpoint import (
    PREFIX,
    checkpoint_folders,
    first_cause,
    first_line,
    state_of,
)

logger = logging.getLogger(__name__)

# One rank's disk may be much slower than another's; torch's own limit is half an hour.
PATIENCE = timedelta(hours=12)


def publish(temporary: Path, final: Path, keep: int) -> None:
    """Give a complete checkpoint its name, and delete all but the newest `keep`."""
    os.replace(temporary, final)
    drop_old(final.parent, keep)


def drop_old(folder: Path, keep: int) -> None:
    for old in checkpoint_folders(folder)[:-keep]:
        # Renamed first: half deleted, it must not look complete.
        shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))


class PublishingWriter(dcp.FileSystemWriter):
    """torch's writer of files, which names the folder as its last act.

    torch calls `finish` on one rank, when all have written, and hands an error in it to all: the barrier and the agreement
    that a rename needs are there already.
    """

    def __init__(self, final: Path, keep: int) -> None:
        self.temporary, self.final, self.keep = final.with_name(final.name + ".tmp"), final, keep
        super().__init__(self.temporary)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        publish(self.temporary, self.final, self.keep)


@contextmanager
def telling_failures(final: Path) -> Iterator[None]:
    """Around anything that waits for a write: its failure becomes a UserError that names the checkpoint."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        cause = first_cause(error)
        # torch's writer hides the errno, so a full disk is told by what is left.
        free = shutil.disk_usage(final.parent).free // 2**20
        raise UserError(
            f"the checkpoint {final} cannot be written ({first_line(cause)}; {free} MB are free): make room on that disk and "
            f"run the same command again, it goes on from the checkpoint before"
        ) from error


def save_checkpoint(
    folder: Path, step: int, decoder: Decoder, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write the state after `step` optimizer steps, wait for it, and drop all but the newest `keep`. A collective.

    Raises:
        UserError: it cannot be written; those before are as they were.
    """
    final = checkpoint_path(folder, step)
    with telling_failures(final):
        dcp.save(state_of(decoder, optimizer, step), storage_writer=PublishingWriter(final, keep))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:06d}"


class CheckpointWriter:
    """Writes the checkpoints of one training, each in a thread; a context manager, and every call a collective.

    `beside`: go on training meanwhile, on a copy of this rank's part of the state (12 bytes a parameter, in main memory).
    Otherwise `save` returns when the checkpoint is on the disk, and takes no copy.
    """

    def __init__(self, folder: Path, keep: int, beside: bool) -> None:
        self.folder, self.keep, self.beside = folder, keep, beside
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[Any]] | None = None

    def __enter__(self) -> CheckpointWriter:
        if self.beside:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def save(self, step: int, decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write the state after `step` optimizer steps, when the checkpoint before is written.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        if not self.beside:
            save_checkpoint(self.folder, step, decoder, optimizer, self.keep)
            return
        self.wait()
        final = checkpoint_path(self.folder, step)
        # Torch's default for a FileSystemWriter would hand CPU tensors on as they are, and training changes them.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        with telling_failures(final):
            writing = dcp.async_save(
                state_of(decoder, optimizer, step),
                storage_writer=PublishingWriter(final, self.keep),
                async_stager=stager,
                process_group=self._group,
            )
        assert isinstance(writing, Future)
        writing.add_done_callback(lambda _: stager.close())
        self._pending = (final, writing)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it could not be written. The failure is raised here and not in the midst of a step, where some ranks
                would know of it and some would not.
        """
        if self._pending is None:
            return
        final, writing = self._pending
        self._pending = None
        with telling_failures(final):
            writing.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except (UserError, RuntimeError) as failure:
            if error is None:
                raise
            # What ended the training is the news; this may well follow from it.
            logger.warning("%s", failure)
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
