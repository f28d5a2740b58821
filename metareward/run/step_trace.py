"""Chosen steps of every stage, each in full: its spans one by one, and a trace of torch.profiler.

Off by default, because a profiled step is slower than others and its trace takes megabytes.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger("metareward")


class ChosenSteps:
    """Steps `after` + 1 to `after` + `count` of every stage, counted from 1; a count of 0 chooses none.

    folder: where traces go, as torch-iteration-1-judge-rank-0.json.gz. The CUDA activity has never run on a GPU.
    """

    def __init__(self, count: int = 0, after: int = 0, folder: Path | None = None, rank: int = 0) -> None:
        self.first, self.last = after + 1, after + count
        self.folder = folder
        self.rank = rank
        self._profile: profile | None = None
        self._stage: tuple[str, int] = ("", 0)
        self._seen = 0

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def stage_begins(self, stage: str, iteration: int, seen: int = 0) -> None:
        """A stage begins, or goes on after `seen` steps."""
        self._stage, self._seen = (stage, iteration), seen
        self._start_if_next()

    def turns_at(self, step: int) -> bool:
        """Whether something begins or ends with the end of step number `step`."""
        self._seen = step
        return self.first - 1 <= step <= self.last and self.first <= self.last

    def step_ends(self, step: int) -> None:
        """Step number `step` of the stage has ended, one at which something turns."""
        if step >= self.last:
            self._finish()
        else:
            self._start_if_next()

    def stage_ends(self) -> None:
        self._finish()
        if self.first <= self.last and 0 < self._seen < self.first:
            logger.info(
                "%s of iteration %d has %d steps, fewer than logging.profile_after: none of them was traced",
                *self._stage,
                self._seen,
            )
        self._seen = 0

    def _start_if_next(self) -> None:
        if self._profile is not None or self.folder is None or self._seen + 1 not in self:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        if self._seen < self.first or self.folder is None:
            return
        stage, iteration = self._stage
        path = self.folder / f"torch-iteration-{iteration}-{stage}-rank-{self.rank}.json.gz"
        running.export_chrome_trace(str(path))
        logger.info("wrote %s, steps %d to %d", path, self.first, self._seen)
