"""The run directory: which recipe it belongs to, and what may stand in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from metareward.config import Iteration, LoggingSettings, Recipe, RespondSettings, SamplerSettings
from metareward.errors import UserError
from metareward.recipe_files import load_recipe
from metareward.run.directory import RunDirectory, open_existing

RECIPE = replace(Recipe(), random_seed=3)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run directory of RECIPE in which work has begun."""
    run = RunDirectory(tmp_path / "runs" / "one")
    run.open(RECIPE)
    run.iteration(1).folder.mkdir()
    return run


def test_the_recipe_is_kept_and_the_same_one_may_go_on(run: RunDirectory) -> None:
    assert open_existing(run.root) == (run, RECIPE)
    before = run.recipe.stat().st_mtime_ns
    run.open(RECIPE)
    assert run.recipe.stat().st_mtime_ns == before
    assert {path.name for path in run.root.iterdir()} == {"recipe.toml", "iteration-1"}


def test_another_recipe_is_refused_with_the_differing_settings(run: RunDirectory) -> None:
    other = replace(
        RECIPE,
        random_seed=4,
        respond=RespondSettings(samples=3),
        iteration=(Iteration(rho=0.1), *RECIPE.iteration[1:]),
    )
    before = run.recipe.read_bytes()
    with pytest.raises(UserError) as caught:
        run.open(other)
    message = str(caught.value)
    for part in (
        str(run.root),
        "random_seed: 3 -> 4",
        "respond.samples: 7 -> 3",
        "iteration.0.rho: 0.0 -> 0.1",
    ):
        assert part in message
    assert "temperature" not in message
    assert run.recipe.read_bytes() == before


def test_another_number_of_iterations_is_refused(run: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"iteration\.3\.rho: 0\.4 -> 'absent'"):
        run.open(replace(RECIPE, iteration=RECIPE.iteration[:3]))


def test_sampler_and_logging_may_differ(run: RunDirectory) -> None:
    other = replace(RECIPE, sampler=SamplerSettings(max_running=3), logging=LoggingSettings(tensorboard=True))
    run.open(other)
    assert load_recipe(run.recipe) == other


def test_a_recipe_that_made_nothing_gives_way(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open(RECIPE)
    (run.root / "metrics.jsonl").write_text("")
    run.open(replace(RECIPE, random_seed=4))
    assert load_recipe(run.recipe).random_seed == 4
    run.seed.folder.mkdir()
    with pytest.raises(UserError, match="random_seed: 4 -> 3"):
        run.open(RECIPE)


def test_a_kill_while_the_recipe_was_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml.tmp").write_text("random_se")
    run = RunDirectory(tmp_path)
    run.open(RECIPE)
    assert load_recipe(run.recipe) == RECIPE
    assert not (tmp_path / "recipe.toml.tmp").exists()


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty and has no recipe\.toml"):
        RunDirectory(tmp_path).open(RECIPE)
    with pytest.raises(UserError, match="not a run directory"):
        open_existing(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        open_existing(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for root in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(UserError, match="give another --run-dir"):
            RunDirectory(root).open(RECIPE)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    files = run.iteration(2)
    names = {
        str(path.relative_to(tmp_path))
        for path in (
            files.responses,
            files.judgments,
            files.actor_pairs,
            files.comparisons,
            files.judge_pairs,
        )
    }
    assert names == {
        f"iteration-2/{name}.jsonl"
        for name in ("responses", "judgments", "actor_pairs", "comparisons", "judge_pairs")
    }
    assert (files.model, run.seed.model) == (tmp_path / "iteration-2/model", tmp_path / "seed/model")
