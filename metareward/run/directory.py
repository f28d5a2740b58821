"""The run directory: what lies where, and which recipe it belongs to."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from metareward.config import Recipe
from metareward.errors import UserError
from metareward.recipe_files import differences, dump_recipe, load_recipe
from metareward.run.jsonl import write_text


@dataclass(frozen=True)
class IterationFiles:
    """Paths of one iteration's files; see the design's contract 1."""

    folder: Path

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def responses(self) -> Path:
        return self.folder / "responses.jsonl"

    @property
    def judgments(self) -> Path:
        return self.folder / "judgments.jsonl"

    @property
    def actor_pairs(self) -> Path:
        return self.folder / "actor_pairs.jsonl"

    @property
    def comparisons(self) -> Path:
        return self.folder / "comparisons.jsonl"

    @property
    def judge_pairs(self) -> Path:
        return self.folder / "judge_pairs.jsonl"

    @property
    def reference(self) -> Path:
        return self.folder / "reference_logprobs.jsonl"

    @property
    def training(self) -> Path:
        return self.folder / "training"

    @property
    def model(self) -> Path:
        return self.folder / "model"


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder. `seed` has the same layout as an iteration, of which it uses examples, training and model."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    @property
    def seed(self) -> IterationFiles:
        return IterationFiles(self.root / "seed")

    def iteration(self, number: int) -> IterationFiles:
        """Files of iteration `number`, counted from 1."""
        return IterationFiles(self.root / f"iteration-{number}")

    def open(self, recipe: Recipe) -> None:
        """Make the directory, or check that it belongs to this recipe; call on rank 0.

        A recipe that failed its first checks has made nothing, so another one may take its folder. A kill may leave
        nothing but the recipe's temporary file.

        Raises:
            UserError: made by another recipe, naming the settings that differ; or not a run directory; or not writable.
        """
        if self.recipe.is_file():
            differing = differences(load_recipe(self.recipe), recipe)
            if differing and self.has_work():
                shown = "; ".join(differing[:8]) + ("; ..." if len(differing) > 8 else "")
                raise UserError(
                    f"{self.root} was made by another recipe ({shown}): "
                    f"use the same settings to continue it, or another --run-dir"
                )
        elif self.root.is_dir() and any(path.name != "recipe.toml.tmp" for path in self.root.iterdir()):
            raise UserError(
                f"{self.root} is not empty and has no recipe.toml: give --run-dir a new folder, or one that a run made"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock(self.root)
            text = dump_recipe(recipe)
            if not self.recipe.is_file() or self.recipe.read_text(encoding="utf-8") != text:
                write_text(self.recipe, text)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"cannot write to {self.root} ({os.strerror(error.errno or 0)}): give another --run-dir"
            ) from None

    def has_work(self) -> bool:
        """Whether a stage has begun: every stage's first file lies in one of these folders."""
        return self.seed.folder.is_dir() or any(self.root.glob("iteration-*"))


_locked: dict[Path, int] = {}


def lock(root: Path) -> None:
    """Keep other processes out of a run until this one ends, however it ends; call on rank 0.

    Raises:
        UserError: another process works in it, which may be what is left of a killed torchrun.
    """
    if root in _locked:
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another process is working in {root}: wait for it, or end it (a killed torchrun can leave its workers behind)"
        ) from None
    _locked[root] = handle


def open_existing(root: Path) -> tuple[RunDirectory, Recipe]:
    """A run directory that is there, with the recipe that made it.

    Raises:
        UserError: no recipe.toml in it.
    """
    run = RunDirectory(root)
    if not run.recipe.is_file():
        raise UserError(f"{root} is not a run directory (no recipe.toml): give the folder named by --run-dir")
    return run, load_recipe(run.recipe)
