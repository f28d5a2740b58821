"""metrics.jsonl: one line an event, always written; TensorBoard and Weights & Biases when asked.

Only rank 0 writes. Every line has `time` (seconds since the epoch), `event`, `stage` and `iteration` (0 is the seed stage).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from metareward.config import LoggingSettings
from metareward.errors import UserError
from metareward.run.jsonl import cut_torn_line, encode


class Metrics:
    """Appends events to RUN/metrics.jsonl and hands numbers on to the loggers that the recipe asks for."""

    def __init__(self, folder: Path, settings: LoggingSettings, active: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self.active = active
        self.board: Any = None
        self.wandb: Any = None
        if not active:
            return
        # Else the next event would be glued to what a kill left of the last one, and lost with it.
        cut_torn_line(self.path)
        if settings.tensorboard:
            self.board = tensorboard_writer(folder / "tensorboard")
        if settings.wandb_project:
            self.wandb = wandb_run(settings.wandb_project, folder)

    def event(self, event: str, stage: str, iteration: int, **values: Any) -> None:
        """Record one event. Numbers also go to the loggers, under `stage/name`, at `values["step"]` or the iteration."""
        if not self.active:
            return
        line = {
            "time": round(time.time(), 3),
            "event": event,
            "stage": stage,
            "iteration": iteration,
            **values,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(encode(line))
        numbers = {
            f"{stage}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        # The steps of all iterations follow each other on one axis.
        step = iteration * 1_000_000 + values["step"] if "step" in values else iteration
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log({**numbers, "iteration": iteration, "global_step": step})

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "logging.tensorboard is on but tensorboard is not installed: pip install 'metareward[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder))


def wandb_run(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb_project is set but wandb is not installed: pip install 'metareward[wandb]'"
        ) from None
    # The run's folder name is its identity, so that a continued run goes on in the same chart.
    return wandb.init(project=project, name=folder.name, id=folder.name, dir=str(folder), resume="allow")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All events of a run. A line that a kill cut short is passed over."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    events = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            events.append(json.loads(text))
        except ValueError:
            continue
    return events
