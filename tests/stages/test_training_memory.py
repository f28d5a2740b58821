"""The check before training: told in metrics.jsonl where it fits, refused by name where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metareward.config import LoggingSettings, TrainSettings
from metareward.errors import UserError
from metareward.run import ranks
from metareward.run.metrics import Metrics, read_metrics
from metareward.stages import training_memory
from metareward.training.examples import DataOrder, Example
from metareward.training.trainer import TrainingSet

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
SETTINGS = TrainSettings(batch_pairs=2, epochs=1, activation_checkpointing="none", micro_batch_tokens=24)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    ranks.start_ranks()
    yield
    ranks.stop_ranks()


def check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, settings: TrainSettings
) -> list[dict[str, Any]]:
    """The events it leaves."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(training_memory, "free_memory", lambda device: free)
    examples = [Example(str(index), "actor", tuple(range(20)), ((1, 2), (3, 4))) for index in range(2)]
    data = TrainingSet(examples, DataOrder(2, 2, 1, 0, 1), settings.micro_batch_tokens)
    context: Any = SimpleNamespace(metrics=Metrics(folder, LoggingSettings(), active=True))
    training_memory.check_training_memory(context, 3, "train", folder, data, settings)
    return read_metrics(folder)


def test_what_fits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (event,) = check(tmp_path, monkeypatch, 10**9, SETTINGS)
    assert (event["event"], event["stage"], event["iteration"]) == ("memory_estimate", "train", 3)
    assert event["free"] == 10**9
    parts = ("weights", "gradients", "optimizer", "copy", "gathered", "activations", "work")
    assert event["peak"] == sum(event[name] for name in parts)
    # 4,096 in the embedding and as many in the head; 10,304 a block; 32 in the last norm.
    assert event["weights"] == 4 * (2 * 4096 + 2 * 10_304 + 32)
    assert "training needs about 0.00 GB a process (weights 0.00, " in caplog.text
    assert "; 1.00 GB are free" in caplog.text


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = check(tmp_path, monkeypatch, 10**9, SETTINGS)[0]["peak"]
    with pytest.raises(UserError, match=r'free: set train.activation_checkpointing = "full"; '):
        check(tmp_path, monkeypatch, peak - 1, SETTINGS)
    # Nothing was done yet, and the same run can be tried all the same.
    unchecked = TrainSettings(**{**vars(SETTINGS), "check_memory": False})
    assert check(tmp_path, monkeypatch, peak - 1, unchecked)[-1]["free"] == peak - 1
