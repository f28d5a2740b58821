"""The stage profile of real work in this process: its seconds are the wall time's."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest

from metareward.loop import run, run_stage
from metareward.profiling.figures import all_figures
from metareward.profiling.read import read_run
from metareward.recipe_files import load_recipe
from metareward.run import ranks
from metareward.run.metrics import read_metrics


def test_stage_seconds_add_up_to_the_wall_time(tiny_world: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_world / "recipe.toml")
    recipe = replace(recipe, seed=replace(recipe.seed, epochs=2))
    assert tomllib.loads((tiny_world / "recipe.toml").read_text())["seed"]["epochs"] == 30
    root = tmp_path / "run"
    wall = 0.0
    ranks.start_ranks()
    try:
        for work in (
            lambda: run(recipe, root, stop_after=0),
            lambda: run_stage(recipe, root, "respond", 1),
        ):
            began = perf_counter()
            work()
            wall += perf_counter() - began
    finally:
        ranks.stop_ranks()
    time = read_run(root)
    assert [attempt.ended for attempt in time.attempts] == ["finished", "finished"]
    stages = {stage.stage: stage for stage in time.stages}
    assert set(stages) == {"start", "seed", "respond"}
    # Loose, for a machine that others use too: what is meant is that no stage and no phase is forgotten.
    assert sum(stage.seconds for stage in time.stages) == pytest.approx(wall, rel=0.1, abs=0.5)
    for stage in time.stages:
        assert sum(stage.mean_phases.values()) == pytest.approx(stage.seconds, rel=1e-3, abs=1e-3)
    for name in ("seed", "respond"):
        assert stages[name].mean_phases["other"] < 0.1 * stages[name].seconds + 0.2
    # What the spans counted is what the stage itself says.
    events = {event["stage"]: event for event in read_metrics(root) if event["event"] == "stage"}
    figures = {item.time.stage: item for item in all_figures(time, None)}
    respond, event = figures["respond"], events["respond"]
    assert (respond.requests, respond.prompt_tokens, respond.new_tokens) == (
        event["requests"],
        event["prompt_tokens"],
        event["new_tokens"],
    )
    assert respond.reused_tokens == event["reused_tokens"]
    assert respond.time.steps == event["steps"]
    assert figures["seed"].tokens == events["seed"]["tokens"]
    assert figures["seed"].time.count("passes") > 0
