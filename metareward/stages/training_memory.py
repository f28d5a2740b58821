"""Before weights are loaded: whether the training will fit, told in the log and in metrics.jsonl."""

from __future__ import annotations

import logging
from pathlib import Path

from metareward.config import TrainSettings
from metareward.model.hf_files import read_config
from metareward.run import ranks
from metareward.run.memory import free_memory
from metareward.stages.context import Context
from metareward.training.memory_check import Workload, check_memory
from metareward.training.trainer import TrainingSet

logger = logging.getLogger(__name__)


def check_training_memory(
    context: Context, iteration: int, stage: str, policy: Path, data: TrainingSet, settings: TrainSettings
) -> None:
    """Estimate, tell, and refuse where it is more than the rank with the least free memory has. A collective.

    Raises:
        UserError: on every rank, naming the setting to change.
    """
    device = ranks.device()
    free = min(ranks.gather(free_memory(device)))
    work = Workload(read_config(policy), data.examples, data.order.batch, ranks.world_size(), device.type)
    estimate = check_memory(work, settings, free)
    if ranks.is_first():
        logger.info("%s; %.2f GB are free", estimate.sentence(), free / 1e9)
    context.metrics.event(
        "memory_estimate", stage, iteration, free=free, peak=estimate.peak, **vars(estimate)
    )
