"""Out of memory in a training stage: the setting to lower, and a GPU's snapshot. The GPU is a stand-in; the CPU's error is real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metareward.config import LoggingSettings, TrainSettings
from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.run import ranks
from metareward.run.directory import RunDirectory
from metareward.stages import out_of_memory
from metareward.stages.out_of_memory import check_memory_snapshot, naming_out_of_memory
from metareward.training.examples import Example
from metareward.training.memory_check import Workload

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
    }
)
EXAMPLES = [Example(str(index), "actor", tuple(range(100)), ((1, 2), (3, 4))) for index in range(64)]
SETTINGS = TrainSettings(batch_pairs=64, epochs=1, activation_checkpointing="none", micro_batch_tokens=8192)
ON_GPU = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is free."
Calls = list[tuple[str, Any]]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    ranks.start_ranks()
    yield
    ranks.stop_ranks()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A stand-in for the device and for the allocator's recorder, which writes what it was told into the snapshot."""
    calls: Calls = []

    def record(enabled: str | None = "all", **options: Any) -> None:
        calls.append(("record", options if enabled else None))

    def dump(path: str) -> None:
        calls.append(("dump", path))
        Path(path).write_text(json.dumps([call[0] for call in calls]))

    monkeypatch.setattr(ranks, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def stage(
    folder: Path,
    error: BaseException | None,
    device: str = "cuda",
    snapshot: bool = False,
    settings: TrainSettings = SETTINGS,
    examples: int = 64,
) -> None:
    """Iteration 3's training, which raises."""
    recipe = SimpleNamespace(logging=LoggingSettings(memory_snapshot=snapshot))
    context: Any = SimpleNamespace(recipe=recipe, run=RunDirectory(folder))
    work = Workload(CONFIG, EXAMPLES[:examples], settings.batch_pairs, 1, device)
    with naming_out_of_memory(context, 3, "train", work, settings):
        if error is not None:
            raise error


def test_the_snapshot_and_the_setting_are_named(tmp_path: Path, gpu: Calls) -> None:
    error = torch.OutOfMemoryError(f"CUDA out of memory. {ON_GPU}")
    with pytest.raises(UserError) as raised:
        stage(tmp_path, error, snapshot=True)
    file = tmp_path / "spans" / "memory-iteration-3-train-rank-0.pickle"
    text = str(raised.value)
    assert text.startswith(
        "the GPU ran out of memory in the train stage of iteration 3 (tried to allocate 2.00 GiB"
    )
    assert (
        "): set train.micro_batch_tokens = 4096; the same command then goes on from the last checkpoint"
        in text
    )
    assert f"; what was allocated is in {file}, which " in text
    assert raised.value.__cause__ is error
    # Recorded from before the work, written while that still goes on, and ended.
    assert json.loads(file.read_text()) == ["record", "dump"]
    assert [name for name, _ in gpu] == ["record", "dump", "record"]
    assert gpu[0][1]["max_entries"] == out_of_memory.EVENTS
    assert gpu[-1][1] is None


def test_nothing_is_recorded_unasked(tmp_path: Path, gpu: Calls) -> None:
    with pytest.raises(UserError, match=r"; logging\.memory_snapshot = true writes down what was allocated$"):
        stage(tmp_path, torch.OutOfMemoryError(ON_GPU))
    assert not gpu
    assert not list(tmp_path.iterdir())


def test_recording_ends_with_the_stage(tmp_path: Path, gpu: Calls) -> None:
    stage(tmp_path, None, snapshot=True)
    with pytest.raises(RuntimeError, match="of another kind"):
        stage(tmp_path, RuntimeError("of another kind"), snapshot=True)
    assert [name for name, _ in gpu] == ["record"] * 4
    assert not list(tmp_path.iterdir())


def test_a_full_disk_hides_nothing(tmp_path: Path, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    with pytest.raises(
        UserError, match=r"micro_batch_tokens = .* could not be written to .*No space left on device"
    ):
        stage(tmp_path, torch.OutOfMemoryError(ON_GPU), snapshot=True)
    assert gpu[-1] == ("record", None)


def test_what_is_left_to_lower_is_named(tmp_path: Path, gpu: Calls) -> None:
    """Micro-batches of one example cannot become smaller; nor does any setting help a model that fills the memory by itself."""
    small = TrainSettings(**{**vars(SETTINGS), "micro_batch_tokens": 104, "compute_dtype": "float32"})
    with pytest.raises(
        UserError, match=r'\): set train\.(compute_dtype = "bfloat16"|activation_checkpointing)'
    ):
        stage(tmp_path, torch.OutOfMemoryError(ON_GPU), settings=small)
    least = TrainSettings(
        **{**vars(SETTINGS), "micro_batch_tokens": 104, "activation_checkpointing": "full", "batch_pairs": 1}
    )
    nothing = r"\): no setting saves enough; take a smaller model, or more or larger GPUs; "
    with pytest.raises(UserError, match=nothing):
        stage(tmp_path, torch.OutOfMemoryError(ON_GPU), settings=least, examples=1)


def test_on_a_cpu_the_allocator_s_own_error(tmp_path: Path) -> None:
    """The real one, and Python's; no snapshot, and none is offered."""
    sentence = r"^the machine ran out of memory in the train stage .*: set train\.micro_batch_tokens = 4096; .*checkpoint$"
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    for error in (refused.value, MemoryError()):
        with pytest.raises(UserError, match=sentence):
            stage(tmp_path, error, "cpu")
    with pytest.raises(UserError, match=r"\(tried to allocate 1125899906842624 bytes, "):
        stage(tmp_path, refused.value, "cpu")


def test_a_snapshot_needs_a_gpu(tmp_path: Path) -> None:
    asked = LoggingSettings(memory_snapshot=True)
    with pytest.raises(UserError, match=r"logging\.memory_snapshot = true .* no GPU here: set it to false"):
        check_memory_snapshot(asked, torch.device("cpu"))
    with pytest.raises(UserError, match="set it to false"):
        stage(tmp_path, None, "cpu", snapshot=True)
    check_memory_snapshot(asked, torch.device("cuda", 0))
    check_memory_snapshot(LoggingSettings(), torch.device("cpu"))
