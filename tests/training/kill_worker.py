"""Trainings that are killed at chosen places, one after the other, and started again each time.

A script: it imports everything once and forks the ranks of every start, so that a start costs little. Its argument is a list of
`Case`s saved by torch.save. Each start adds a line to `<case>.starts`: the step it begins with, then how every rank ended. The
last start's ranks write what they saw to `<case>-<rank>.pt`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Else every rank would import it anew, which takes it longer than all else.
import torch._dynamo
import torch.distributed.checkpoint as dcp
from rank_worker import Job, fork_ranks, run
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from metareward.model.decoder import MLP
from metareward.run import ranks
from metareward.training import checkpoint_writer, trainer


@dataclass(frozen=True)
class Kill:
    """Rank `victim` dies at `place` of optimizer step `step` (from 1)."""

    place: str
    step: int
    victim: int


@dataclass
class Case:
    """A training on `processes` ranks. Every kill has a start of its own; the start after them ends the training."""

    name: str
    job: dict[str, Any]
    processes: int
    kills: Sequence[Kill] = ()


class Killer:
    """Ends this process by SIGKILL at the place of `kill`."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill
        self.current = 1
        self.wrap(trainer, "load_checkpoint", self.load)
        self.wrap(MLP, "forward", self.forward)
        register_optimizer_step_pre_hook(lambda *_: self.at("update"))
        register_optimizer_step_post_hook(lambda *_: self.at("updated"))
        self.wrap(dcp.FileSystemWriter, "write_data", self.write)
        self.wrap(checkpoint_writer.PublishingWriter, "finish", self.finish)
        self.wrap(checkpoint_writer, "drop_old", self.drop_old)
        self.wrap(shutil, "rmtree", self.delete)

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *parts, **named: wrapper(original, *parts, **named))

    def at(self, place: str, step: int | None = None) -> None:
        if (place, self.current if step is None else step) == (self.kill.place, self.kill.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def load(self, original: Callable[..., int], *parts: Any) -> int:
        # Not while loading: it makes an optimizer step on empty state.
        self.current = 0
        done = original(*parts)
        self.current = done + 1
        return done

    def on_step(self, done: int) -> None:
        self.at("step's end")
        self.current = done + 1

    def forward(self, original: Callable[..., torch.Tensor], *parts: Any) -> torch.Tensor:
        self.at("forward")
        out = original(*parts)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.at("backward"))
        return out

    def write(self, original: Callable[..., Any], writer: Any, *parts: Any) -> Any:
        """In the writing thread: the data are written, the training goes on by a step, and only then comes the kill."""
        written = original(writer, *parts)
        if self.kill.place == "write" and step_of(writer.final) == self.kill.step:
            limit = time.monotonic() + 60
            while self.current < self.kill.step + 2 and time.monotonic() < limit:
                time.sleep(0.001)
            self.at("write", self.current - 2)
        return written

    def finish(self, original: Callable[..., Any], writer: Any, *parts: Any, **named: Any) -> None:
        self.at("index", step_of(writer.final))
        original(writer, *parts, **named)

    def drop_old(self, original: Callable[..., None], folder: Path, keep: int) -> None:
        found = checkpoint_writer.checkpoint_folders(folder)
        if len(found) > keep:
            self.at("named", step_of(found[-1]))
        original(folder, keep)

    def delete(self, original: Callable[..., None], folder: Path, *parts: Any) -> None:
        newest = checkpoint_writer.checkpoint_folders(folder.parent)[-1:]
        if self.kill.place == "deleting" and [step_of(path) for path in newest] == [self.kill.step]:
            (folder / ".metadata").unlink()
            self.at("deleting", self.kill.step)
        original(folder, *parts)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def start(case: Case, folder: Path, kill: Kill | None) -> list[int]:
    """Run the case's ranks to their end; the exit code of each."""

    def work(rank: int) -> None:
        load = trainer.load_checkpoint

        def noted_load(*parts: Any) -> int:
            done = load(*parts)
            if rank == 0:
                with (folder / f"{case.name}.starts").open("a") as file:
                    file.write(f"{done + 1}")
            return done

        trainer.load_checkpoint = noted_load
        job = Job(**case.job)
        if kill is not None and rank == kill.victim:
            job.on_step = Killer(kill).on_step
        ranks.start_ranks()
        torch.save(vars(run(job)), folder / f"{case.name}-{rank}.pt")
        ranks.stop_ranks()

    return fork_ranks(case.processes, work)


def main(plan: Path) -> None:
    cases: list[Case] = torch.load(plan, weights_only=False)
    for case in cases:
        for kill in (*case.kills, None):
            codes = start(case, plan.parent, kill)
            with (plan.parent / f"{case.name}.starts").open("a") as file:
                file.write(" " + " ".join(map(str, codes)) + "\n")


if __name__ == "__main__":
    # A pickled Case knows this module by its own name.
    sys.modules["kill_worker"] = sys.modules["__main__"]
    main(Path(sys.argv[1]))
