"""Four gloo processes against one, in one group and as two groups of two, and checkpoints between 1, 2 and 4 of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.training.examples import Example
from metareward.training.sharded import check_shard_within, load_sharded

Jobs = dict[str, dict[str, Any]]
Outcomes = dict[str, list[dict[str, Any]]]
# What a job goes on from.
RESUMED = {"two-on-four": "two", "two-on-hybrid": "two", "hybrid-on-four": "hybrid-stopped"}


@pytest.fixture(scope="module")
def jobs(
    models: dict[str, tuple[Any, Path]],
    make_settings: Callable[..., TrainSettings],
    make_examples: Callable[..., list[Example]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Jobs:
    """Nine examples in batches of four: in the last step of an epoch three of four ranks have nothing to do."""
    folder = tmp_path_factory.mktemp("jobs")
    settings = make_settings(batch_pairs=4, epochs=2, micro_batch_tokens=60, checkpoint_steps=2)
    hybrid = replace(settings, shard_within=2)

    def job(name: str, **changes: Any) -> dict[str, Any]:
        values = {
            "model": models["llama-tied"][1],
            "examples": make_examples(9),
            "settings": settings,
            "checkpoints": folder / name,
        }
        return {**values, **changes}

    untied = {"model": models["qwen3"][1]}
    return {
        "four": job("four"),
        "four-untied": job("four-untied", **untied, settings=replace(settings, epochs=1)),
        "hybrid": job("hybrid", settings=hybrid),
        "hybrid-untied": job("hybrid-untied", **untied, settings=replace(hybrid, epochs=1)),
        "hybrid-stopped": job("hybrid-stopped", settings=hybrid, stop_after=4),
        "two-on-four": job("two-on-four"),
        "two-on-hybrid": job("two-on-hybrid", settings=hybrid),
        "hybrid-on-four": job("hybrid-stopped"),
        "copies": job("copies", settings=replace(settings, epochs=1, shard_within=1)),
    }


@pytest.fixture(scope="module")
def four(jobs: Jobs, worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All jobs on four ranks in one start; two of them go on from what two ranks left."""
    two = {"two": {**jobs["two-on-four"], "stop_after": 4}}
    outcomes = worker.run_ranks(two, tmp_path_factory.mktemp("two"), 2)["two"]
    assert [outcome["error"] for outcome in outcomes] == ["Interrupted: after step 4"] * 2
    shutil.copytree(jobs["two-on-four"]["checkpoints"], jobs["two-on-hybrid"]["checkpoints"])
    return worker.run_ranks(jobs, tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def one(jobs: Jobs, worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The same job on this process alone, undisturbed."""
    found: dict[tuple[Path, int], Any] = {}

    def run(name: str) -> Any:
        fields = jobs[name]
        settings = replace(fields["settings"], shard_within=0)
        key = (fields["model"], settings.epochs)
        if key not in found:
            folder = tmp_path_factory.mktemp(name)
            changed = {**fields, "settings": settings, "stop_after": None, "checkpoints": folder}
            found[key] = worker.run(worker.Job(**changed))
        return found[key]

    return run


@pytest.mark.parametrize("name", ["four", "four-untied", "hybrid", "hybrid-untied", "copies"])
def test_four_ranks_equal_one(
    four: Outcomes, one: Callable[[str], Any], worker: ModuleType, name: str
) -> None:
    wanted = one(name)
    for outcome in four[name]:
        assert not outcome["error"]
        assert (
            len(outcome["steps"])
            == len(wanted.steps)
            == 3 * (1 if "untied" in name or name == "copies" else 2)
        )
        worker.check_equal(outcome, wanted)
        for identity, values in wanted.reference.items():
            assert outcome["reference"][identity] == pytest.approx(values, rel=1e-5)
    assert four[name][0]["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", RESUMED)
def test_checkpoints_between_numbers_of_ranks(
    four: Outcomes, one: Callable[[str], Any], worker: ModuleType, name: str
) -> None:
    for outcome in four[name]:
        assert not outcome["error"]
        assert [figures["step"] for figures in outcome["steps"]] == [5, 6]
        worker.check_equal(outcome, one("four"))


def test_checkpoint_of_two_groups_resumes_on_one_process(
    four: Outcomes, one: Callable[[str], Any], jobs: Jobs, worker: ModuleType
) -> None:
    assert [outcome["error"] for outcome in four["hybrid-stopped"]] == ["Interrupted: after step 4"] * 4
    fields = {**jobs["four"], "checkpoints": jobs["hybrid-stopped"]["checkpoints"]}
    resumed = worker.run(worker.Job(**fields))
    assert [figures["step"] for figures in resumed.steps] == [5, 6]
    worker.check_equal(vars(resumed), one("four"))


def test_what_a_rank_holds(four: Outcomes) -> None:
    """All weights are on every group once; the parts within it may differ by a row of each matrix."""
    whole = sum(weight.numel() for weight in four["four"][0]["weights"].values())
    assert sum(outcome["held"] for outcome in four["four"]) == whole
    held = [outcome["held"] for outcome in four["hybrid"]]
    assert held[:2] == held[2:]
    assert sum(held[:2]) == whole
    assert [outcome["held"] for outcome in four["copies"]] == [whole] * 4


@pytest.mark.parametrize(
    ("shard_within", "world_size", "words"),
    [
        (
            3,
            4,
            r"^train.shard_within = 3 does not divide 4 processes: set it to 0 \(all of them\) or one of 1, 2, or",
        ),
        (8, 4, r"8 does not divide 4 processes"),
        (
            2,
            1,
            r"2 does not divide 1 process: set it to 0 \(all of them\), or change the number of processes$",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(shard_within: int, world_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_shard_within(shard_within, world_size)


def test_groups_that_fit_are_taken() -> None:
    for shard_within, world_size in ((0, 1), (0, 7), (1, 1), (1, 4), (2, 4), (4, 4), (8, 64)):
        check_shard_within(shard_within, world_size)


def test_loading_refuses_them_too(
    models: dict[str, tuple[Any, Path]], make_settings: Callable[..., TrainSettings]
) -> None:
    with pytest.raises(UserError, match=r"train.shard_within = 2"):
        load_sharded(models["qwen3"][1], make_settings(shard_within=2), torch.device("cpu"), 1)
