"""The recipes that come with the package: all load, and the 8B ones hold the paper's published values."""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict

import pytest

from metareward.config import Recipe
from metareward.recipe_files import (
    all_keys,
    check,
    differences,
    find_recipe,
    flatten,
    load_recipe,
    packaged_recipes,
)


def test_the_expected_recipes_are_packaged() -> None:
    assert packaged_recipes() == ["demo.toml", "llama3-8b.toml", "self-rewarding-llama3-8b.toml"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_valid(name: str) -> None:
    check(load_recipe(find_recipe(name)))


def test_the_paper_s_values() -> None:
    recipe = load_recipe(find_recipe("llama3-8b.toml"))
    assert recipe.model.name == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert recipe.prompts.per_iteration == 5000
    assert (recipe.respond.samples, recipe.respond.temperature, recipe.respond.top_p) == (7, 0.8, 0.95)
    assert (recipe.judge.samples, recipe.judge.temperature, recipe.judge.top_p) == (11, 0.8, 0.95)
    train = recipe.train
    assert (train.loss, train.beta, train.learning_rate, train.batch_pairs, train.epochs) == (
        "dpo",
        0.1,
        5e-6,
        32,
        10,
    )
    assert [item.rho for item in recipe.iteration] == [0.0, 0.32, 0.32, 0.4]
    assert [item.meta_judge for item in recipe.iteration] == [True, True, False, False]
    assert [item.max_chosen_characters for item in recipe.iteration] == [2500, 0, 0, 0]
    assert [item.max_chosen_judgment_characters for item in recipe.iteration][:2] == [1100, 1000]
    assert recipe.seed.enabled
    assert recipe.seed.meta_judge_examples == 0


def test_options_beyond_the_paper_are_off() -> None:
    for recipe in (Recipe(), load_recipe(find_recipe("llama3-8b.toml"))):
        meta, pairs = recipe.meta_judge, recipe.pairs
        assert (meta.hide_scores, meta.consistent_only, meta.skip_equal_scores) == (False, False, False)
        assert (pairs.max_score_class_share, pairs.max_judge_share) == (1.0, 1.0)
        assert recipe.train.label_smoothing == 0.0


def test_the_baseline_differs_in_the_meta_judge_only() -> None:
    paper = dict(flatten(asdict(load_recipe(find_recipe("llama3-8b.toml")))))
    baseline = dict(flatten(asdict(load_recipe(find_recipe("self-rewarding-llama3-8b.toml")))))
    unequal = {name for name in paper if paper[name] != baseline[name]}
    assert unequal == {
        "iteration.0.meta_judge",
        "iteration.1.meta_judge",
        # Without judge pairs these two have nothing to limit.
        "iteration.0.max_chosen_judgment_characters",
        "iteration.1.max_chosen_judgment_characters",
    }


@pytest.mark.parametrize("name", ["llama3-8b.toml", "self-rewarding-llama3-8b.toml"])
def test_every_value_is_marked_as_the_paper_s_or_ours(name: str) -> None:
    text = find_recipe(name).read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if re.match(r"\w+ = ", line)][2:]
    assert len(settings) > 40
    for line in settings:
        assert re.search(r"# \((paper|ours)", line), line
    skipped = {
        "model.chat_template_kwargs",
        "respond.top_k",
        "judge.top_k",
        "judge.template",
        "logging.tensorboard",
    }
    skipped |= {"respond.min_p", "judge.min_p", "meta_judge.min_p"}
    skipped |= {"logging.wandb_project", "logging.profile_steps", "logging.profile_after"}
    skipped |= {"logging.memory_snapshot"}
    skipped |= {"meta_judge.top_k", "meta_judge.template"}
    given = set(dict(flatten(tomllib.loads(text))))
    missing = {key for key in all_keys() if key not in given} - skipped
    assert not {key for key in missing if not key.startswith("meta_judge.")} - {"iteration"}


def test_the_default_recipe_is_the_paper_s() -> None:
    """Where the 8B recipe and the defaults disagree, both must be ours, never the paper's."""
    told = differences(Recipe(), load_recipe(find_recipe("llama3-8b.toml")))
    assert {item.split(":")[0] for item in told} <= {
        "model.name",
        "prompts.file",
        "seed.file",
        "seed.epochs",
        "seed.learning_rate",
    }
