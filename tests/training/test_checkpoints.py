"""Interrupted and resumed training, what a kill leaves behind, and checkpoints that cannot be read."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from metareward.config import TrainSettings
from metareward.training import checkpoint_writer
from metareward.training.checkpoint import checkpoint_folders, load_checkpoint
from metareward.training.checkpoint_writer import save_checkpoint
from metareward.training.examples import Example
from metareward.training.optimizer import build_optimizer
from metareward.training.sharded import load_sharded

Models = dict[str, tuple[Any, Path]]


@pytest.fixture
def job(
    models: Models,
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    worker: ModuleType,
    tmp_path: Path,
) -> Any:
    """Six steps of DPO with a checkpoint after every second one."""
    settings = make_settings(epochs=3, checkpoint_steps=2, weight_decay=0.1, learning_rate=1e-3)
    return worker.Job(models["llama-tied"][1], make_examples(6), settings, tmp_path / "training")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("objective", ["pair", "sft"])
@pytest.mark.parametrize(("stop_after", "goes_on_from"), [(2, 3), (5, 5)])
def test_resumed_training_is_bitwise_the_same(
    job: Any, worker: ModuleType, tmp_path: Path, objective: str, stop_after: int, goes_on_from: int
) -> None:
    job.objective = objective
    if objective == "sft":
        job.examples = [replace(item, completions=item.completions[:1]) for item in job.examples]
    whole = worker.run(replace(job, checkpoints=tmp_path / "undisturbed"))
    first = worker.run(replace(job, stop_after=stop_after))
    assert first.error == f"Interrupted: after step {stop_after}"
    second = worker.run(job)
    assert not second.error
    assert [figures["step"] for figures in second.steps] == list(range(goes_on_from, 7))
    for name, weight in whole.weights.items():
        assert torch.equal(second.weights[name], weight), name
    for left, right in zip(second.steps[::-1], whole.steps[::-1], strict=False):
        assert {name: left[name] for name in ("loss", "grad_norm", "learning_rate")} == {
            name: right[name] for name in ("loss", "grad_norm", "learning_rate")
        }


def test_resumed_in_bf16_with_recomputation(job: Any, worker: ModuleType, tmp_path: Path) -> None:
    job.settings = replace(job.settings, compute_dtype="bfloat16", activation_checkpointing="full")
    whole = worker.run(replace(job, checkpoints=tmp_path / "undisturbed"))
    worker.run(replace(job, stop_after=4))
    second = worker.run(job)
    assert all(torch.equal(second.weights[name], weight) for name, weight in whole.weights.items())


def test_optimizer_state_survives(job: Any) -> None:
    """Bitwise equality of weights alone would pass if both runs lost it."""
    decoder = load_sharded(job.model, job.settings, torch.device("cpu"), 1)
    optimizer = build_optimizer(decoder, job.settings)
    for parameter in decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(job.checkpoints, 17, decoder, optimizer, keep=1)
    again = load_sharded(job.model, job.settings, torch.device("cpu"), 1)
    other = build_optimizer(again, job.settings)
    assert load_checkpoint(job.checkpoints, again, other) == 17
    for left, right in zip(decoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(left.full_tensor(), right.full_tensor())
        for name, value in optimizer.state[left].items():
            found = other.state[right][name]
            assert found.dtype == value.dtype
            assert torch.equal(*(item.full_tensor() if item.ndim else item for item in (value, found))), name


def test_checkpoints_that_are_kept(job: Any, worker: ModuleType) -> None:
    for keep, wanted in (
        (1, ["step-000004"]),
        (2, ["step-000002", "step-000004"]),
        (5, ["step-000002", "step-000004"]),
    ):
        settings = replace(job.settings, keep_checkpoints=keep)
        folder = job.checkpoints.with_name(f"keep-{keep}")
        worker.run(replace(job, settings=settings, checkpoints=folder))
        # The last step makes none: the finished model follows at once.
        assert names(folder) == wanted


def test_leftovers_of_a_kill_are_removed(job: Any, worker: ModuleType) -> None:
    worker.run(replace(job, stop_after=2))
    leftover = job.checkpoints / "step-000004.tmp"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    seen: list[list[str]] = []
    second = worker.run(replace(job, stop_after=3, on_step=lambda step: seen.append(names(job.checkpoints))))
    assert second.steps[0]["step"] == 3
    assert seen == [["step-000002"]]


def test_kill_while_an_old_checkpoint_is_deleted(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half deleted must not keep the name of a complete one."""
    job.settings = replace(job.settings, keep_checkpoints=1)

    def half(folder: Path) -> None:
        damage_metadata(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            worker.run(job)
    assert [folder.name for folder in checkpoint_folders(job.checkpoints)] == ["step-000004"]
    assert [figures["step"] for figures in worker.run(job).steps] == [5, 6]
    assert names(job.checkpoints) == ["step-000004"]


def test_no_checkpoint_is_a_start(job: Any) -> None:
    decoder = load_sharded(job.model, job.settings, torch.device("cpu"), 1)
    assert load_checkpoint(job.checkpoints, decoder, build_optimizer(decoder, job.settings)) == 0


def damage_data(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-2000])


def damage_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def garble_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"")


def remove_data(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        file.unlink()


@pytest.mark.parametrize("damage", [damage_data, damage_metadata, garble_metadata, remove_data])
def test_damaged_newest_checkpoint(job: Any, worker: ModuleType, damage: Callable[[Path], None]) -> None:
    worker.run(replace(job, stop_after=5))
    newest = checkpoint_folders(job.checkpoints)[-1]
    assert newest.name == "step-000004"
    damage(newest)
    before = contents(job.checkpoints)
    outcome = worker.run(job)
    assert outcome.error.startswith(f"UserError: the checkpoint {newest} cannot be read (")
    assert outcome.error.endswith(
        "): delete that folder and run again; the run then goes on from step-000002"
    )
    assert "\n" not in outcome.error
    assert not outcome.steps
    assert contents(job.checkpoints) == before
    # The advice holds.
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = worker.run(job)
    assert [figures["step"] for figures in resumed.steps] == [3, 4, 5, 6]


def test_only_checkpoint_damaged(job: Any, worker: ModuleType) -> None:
    worker.run(replace(job, stop_after=2))
    damage_data(job.checkpoints / "step-000002")
    assert worker.run(job).error.endswith("): delete that folder and run again")


@pytest.mark.parametrize(("beside", "steps"), [(False, [1]), (True, [1, 2, 3])])
def test_failed_save_is_told(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch, beside: bool, steps: list[int]
) -> None:
    """At once, or by the next save where training went on meanwhile."""
    job.settings = replace(job.settings, async_checkpoints=beside)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    outcome = worker.run(job)
    assert outcome.error.startswith(
        f"UserError: the checkpoint {job.checkpoints / 'step-000002'} cannot be written ([Errno 28] No space left on device; "
    )
    assert [figures["step"] for figures in outcome.steps] == steps
    monkeypatch.undo()
    assert checkpoint_folders(job.checkpoints) == []
    # What was half written is in nobody's way.
    assert worker.run(replace(job, stop_after=2)).error == "Interrupted: after step 2"
    assert names(job.checkpoints) == ["step-000002"]


def test_failed_last_save_is_told_at_the_end(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.settings = replace(job.settings, checkpoint_steps=4)
    monkeypatch.setattr(checkpoint_writer.os, "replace", fail_to_rename)
    outcome = worker.run(job)
    assert f"the checkpoint {job.checkpoints / 'step-000004'} cannot be written (read-only" in outcome.error
    assert [figures["step"] for figures in outcome.steps] == [1, 2, 3, 4, 5, 6]


def test_failed_save_does_not_hide_what_ended_the_training(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint_writer.os, "replace", fail_to_rename)
    assert worker.run(replace(job, stop_after=3)).error == "Interrupted: after step 3"
    assert "step-000002 cannot be written (read-only" in caplog.text


def fail_to_rename(*args: Any) -> None:
    raise OSError("read-only")


def test_training_goes_on_while_a_checkpoint_is_written(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The writer is held back until the next step is done: what it then writes is the state before that step."""
    stepped = threading.Event()
    write = dcp.FileSystemWriter.write_data

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert stepped.wait(timeout=60), "training waits for its checkpoint"
        return write(*args, **kwargs)

    whole = worker.run(replace(job, checkpoints=tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", slow)
        first = worker.run(
            replace(job, stop_after=3, on_step=lambda step: stepped.set() if step == 3 else None)
        )
    assert first.error == "Interrupted: after step 3"
    assert names(job.checkpoints) == ["step-000002"]
    second = worker.run(job)
    assert [figures["step"] for figures in second.steps] == [3, 4, 5, 6]
    assert all(torch.equal(second.weights[name], weight) for name, weight in whole.weights.items())


def test_both_ways_to_write_give_the_same_checkpoint(job: Any, worker: ModuleType, tmp_path: Path) -> None:
    ends = []
    for beside in (False, True):
        settings = replace(job.settings, async_checkpoints=beside)
        part = replace(job, settings=settings, checkpoints=tmp_path / str(beside))
        worker.run(replace(part, stop_after=4))
        ends.append(worker.run(part).weights)
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_training_draws_no_random_numbers(job: Any, worker: ModuleType) -> None:
    """Checkpoints hold no state of a random number generator because of this."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    worker.run(job)
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupt_while_saving_stays_one(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps it into a CheckpointException."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(KeyboardInterrupt):
        worker.run(job)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError()])
def test_interrupt_or_full_memory_while_loading_is_no_damage(
    job: Any, worker: ModuleType, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    worker.run(replace(job, stop_after=2))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", fail)
    with pytest.raises(type(failure)):
        worker.run(job)
