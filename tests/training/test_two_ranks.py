"""Two gloo processes against one: losses, weights, checkpoints across numbers of ranks, and errors on one rank only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metareward.config import TrainSettings
from metareward.training.examples import Example

TIMING = {"seconds", "tokens_per_s", "tflops", "recomputed_tflops"}
WITHOUT_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
NAMES = ["pairs", "untied", "sft", pytest.param("lora", marks=WITHOUT_PEFT)]
Jobs = dict[str, dict[str, Any]]
Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def jobs(
    models: dict[str, tuple[Any, Path]],
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    worker: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Jobs:
    """Five examples in batches of two: the last step of an epoch has fewer examples than there are ranks."""
    folder = tmp_path_factory.mktemp("jobs")
    settings = make_settings(batch_pairs=2, epochs=2, micro_batch_tokens=60, checkpoint_steps=2)
    tied, untied = models["llama-tied"][1], models["qwen3"][1]

    def job(name: str, **changes: Any) -> dict[str, Any]:
        values = {
            "model": tied,
            "examples": make_examples(5),
            "settings": settings,
            "checkpoints": folder / name,
        }
        return {**values, **changes}

    once = replace(settings, epochs=1)
    wide = replace(once, batch_pairs=6, micro_batch_tokens=40, activation_checkpointing="selective")
    adapters = {}
    if find_spec("peft") is not None:
        adapters["lora"] = job(
            "lora", model=untied, examples=make_examples(9), settings=replace(wide, epochs=2, lora_rank=3)
        )
    return adapters | {
        "pairs": job("pairs"),
        # Nine examples in batches of six, one a micro-batch: the ranks have unequal numbers of micro-batches.
        "untied": job("untied", model=untied, examples=make_examples(9), settings=wide),
        "sft": job("sft", examples=make_examples(5, completions=1), objective="sft", settings=once),
        "interrupted": job("interrupted", stop_after=4),
        "resumed": job("resumed"),
        "poisoned": job("poisoned", poison="judge-1", objective="sft"),
        "damaged": job("damaged", objective="sft"),
    }


@pytest.fixture(scope="module")
def two(jobs: Jobs, worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All jobs on two ranks in one start. "resumed" goes on from a checkpoint of one rank, "damaged" finds half a file."""
    for name in ("resumed", "damaged"):
        worker.run(worker.Job(**{**jobs[name], "stop_after": 4}))
    file = next((jobs["damaged"]["checkpoints"] / "step-000004").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-2000])
    return worker.run_ranks(jobs, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one(jobs: Jobs, worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The same job on this process alone, undisturbed."""
    found: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in found:
            fields = {**jobs[name], "stop_after": None, "checkpoints": tmp_path_factory.mktemp(name)}
            found[name] = worker.run(worker.Job(**fields))
        return found[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(two: Outcomes, one: Callable[[str], Any], worker: ModuleType, name: str) -> None:
    wanted = one(name)
    assert wanted.steps
    for outcome in two[name]:
        assert not outcome["error"]
        assert outcome["reference"].keys() == wanted.reference.keys()
        for identity, values in wanted.reference.items():
            assert outcome["reference"][identity] == pytest.approx(values, rel=1e-5)
        assert [figures.keys() for figures in outcome["steps"]] == [
            figures.keys() for figures in wanted.steps
        ]
        worker.check_equal(outcome, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree(two: Outcomes, name: str) -> None:
    left, right = two[name]
    assert [{key: value for key, value in step.items() if key not in TIMING} for step in left["steps"]] == [
        {key: value for key, value in step.items() if key not in TIMING} for step in right["steps"]
    ]
    assert all(torch.equal(left["weights"][key], right["weights"][key]) for key in left["weights"])


def test_first_loss_is_ln_2_on_two_ranks(two: Outcomes) -> None:
    for name in ("pairs", "untied"):
        assert two[name][0]["steps"][0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)


def test_checkpoint_of_two_ranks_resumes_on_one(
    two: Outcomes, one: Callable[[str], Any], jobs: Jobs, worker: ModuleType
) -> None:
    assert [outcome["error"] for outcome in two["interrupted"]] == ["Interrupted: after step 4"] * 2
    resumed = worker.run(worker.Job(**{**jobs["interrupted"], "stop_after": None}))
    assert [figures["step"] for figures in resumed.steps] == [5, 6]
    worker.check_equal(vars(resumed), one("pairs"))


def test_checkpoint_of_one_rank_resumes_on_two(
    two: Outcomes, one: Callable[[str], Any], worker: ModuleType
) -> None:
    for outcome in two["resumed"]:
        assert [figures["step"] for figures in outcome["steps"]] == [5, 6]
        worker.check_equal(outcome, one("pairs"))


def test_divergence_on_one_rank_stops_both(two: Outcomes, jobs: Jobs, worker: ModuleType) -> None:
    left, right = two["poisoned"]
    data = worker.training_set(worker.Job(**jobs["poisoned"]))
    bad = next(
        batch
        for step in range(3)
        if "judge-1" in (batch := sorted(data.examples[index].identity for index in data.order.indices(step)))
    )
    for outcome in (left, right):
        assert outcome["error"].startswith("TrainingDiverged: the loss is nan")
        assert f"on the batch {', '.join(bad)}:" in outcome["error"]
    assert left["error"] == right["error"]
    assert all(torch.isfinite(weight).all() for weight in left["weights"].values())


def test_damaged_checkpoint_is_named_on_both_ranks(two: Outcomes, jobs: Jobs) -> None:
    newest = jobs["damaged"]["checkpoints"] / "step-000004"
    for outcome in two["damaged"]:
        assert outcome["error"].startswith(f"UserError: the checkpoint {newest} cannot be read (")
        assert not outcome["steps"]
    assert newest.is_dir()
