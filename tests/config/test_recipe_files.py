"""Recipes: strict reading, one clear sentence for a mistake, and nothing lost on the way to TOML and back."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.config import Iteration, ModelSettings, Recipe, TrainSettings
from metareward.errors import UserError
from metareward.recipe_files import (
    RENAMED,
    all_keys,
    check,
    differences,
    dump_recipe,
    find_recipe,
    flatten,
    load_recipe,
    recipe_from_tree,
)

VALID = replace(Recipe(), model=ModelSettings(name="some/model"))


def refusal(toml: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe_from_tree(tomllib.loads(toml), "mine.toml")
    message = str(caught.value)
    assert message.startswith("mine.toml: ")
    assert "\n" not in message
    return message.removeprefix("mine.toml: ")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (
            "[respond]\ntemprature = 0.5",
            "unknown setting respond.temprature; did you mean respond.temperature?",
        ),
        (
            "[train]\nlerning_rate = 1e-6",
            "unknown setting train.lerning_rate; did you mean train.learning_rate?",
        ),
        ("[respnd]\nsamples = 3", "unknown setting respnd; did you mean respond?"),
        ("[[iteration]]\nroh = 0.1", "unknown setting iteration.0.roh; did you mean iteration.0.rho?"),
        # Right name, wrong table.
        ("[train]\ntemplate = 'x'", "unknown setting train.template; did you mean judge.template?"),
        ("elo_ridge = 0.1", "unknown setting elo_ridge; did you mean meta_judge.elo_ridge?"),
        ("random_sed = 1", "unknown setting random_sed; did you mean random_seed?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(toml: str, said: str) -> None:
    assert refusal(toml) == said


def test_a_renamed_key_names_the_new_one() -> None:
    assert refusal("[sampler]\nmax_prefill_tokens = 8192") == (
        "sampler.max_prefill_tokens is now called sampler.max_step_tokens: rename it, and look whether the value still fits"
    )


def test_every_renamed_key_is_gone_and_its_new_name_is_there() -> None:
    for old, new in RENAMED.items():
        assert old not in all_keys()
        assert new in all_keys()


@pytest.mark.parametrize(
    ("toml", "setting"),
    [
        ("[respond]\nsamples = '7'", "respond.samples = '7'"),
        ("[respond]\nsamples = 7.0", "respond.samples = 7.0"),
        ("[respond]\nsamples = 0", "respond.samples = 0"),
        ("[respond]\ntop_p = 0", "respond.top_p = 0"),
        ("[respond]\ntop_p = 1.01", "respond.top_p = 1.01"),
        ("[respond]\ntemperature = -0.1", "respond.temperature = -0.1"),
        ("[respond]\ntemperature = inf", "respond.temperature = "),
        ("[judge]\nmin_p = 1.5", "judge.min_p = 1.5"),
        ("[sampler]\nkv_memory = -0.1", "sampler.kv_memory = -0.1"),
        ("[sampler]\nmax_step_tokens = 0", "sampler.max_step_tokens = 0"),
        ("[judge]\ntemperature = nan", "judge.temperature = "),
        ("[train]\nloss = 'kto'", "train.loss = 'kto'"),
        ("[train]\nbeta = 0", "train.beta = 0"),
        ("[train]\nlabel_smoothing = 0.5", "train.label_smoothing = 0.5"),
        ("[train]\nactivation_checkpointing = 1", "train.activation_checkpointing = 1"),
        ("[train]\ncompute_dtype = 'float16'", "train.compute_dtype = 'float16'"),
        # A cap of nothing at all would end in a ValueError hours later.
        ("[seed]\nmax_class_share = 0.0", "seed.max_class_share = 0.0"),
        ("[pairs]\nmax_score_class_share = 0", "pairs.max_score_class_share = 0"),
        ("[[iteration]]\nrho = 1.0", "iteration.0.rho = 1.0"),
        ("[model]\nname = 3", "model.name = 3"),
        ("respond = 3", "respond = 3"),
        ("[iteration]\nrho = 0.1", "iteration = "),
        ("random_seed = 1979-05-27", ""),
    ],
)
def test_wrong_types_and_ranges_name_the_setting(toml: str, setting: str) -> None:
    assert refusal(toml).startswith(setting)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"name": ""}}, "model.name is not set"),
        ({"iteration": []}, r"no \[\[iteration\]\]"),
        ({"respond": {"samples": 1}}, "respond.samples = 1"),
        ({"judge": {"samples": 1}}, "judge.samples = 1"),
        ({"train": {"loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing"),
        ({"train": {"loss": "sppo", "label_smoothing": 0.1}}, "label_smoothing"),
        (
            {"train": {"loss": "dpo_norm", "simpo_gamma": 0.5}},
            r"train\.simpo_gamma works with loss = \"simpo\" only",
        ),
        (
            {"train": {"lora_alpha": 16.0}},
            r"train\.lora_alpha works with adapters only, .* set train\.lora_rank",
        ),
        ({"train": {"lora_targets": "mlp"}}, r"train\.lora_targets works with adapters only"),
    ],
)
def test_combinations_that_cannot_work(change: dict[str, Any], said: str) -> None:
    tree = {"model": {"name": "some/model"}, **change}
    with pytest.raises(UserError, match=said):
        check(recipe_from_tree(tree, "mine.toml"))


@pytest.mark.parametrize(
    "train",
    [
        {"loss": "dpo_norm", "beta": 5.0, "label_smoothing": 0.1},
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1, "nll_weight": 0.2},
        {"loss": "sppo", "beta": 0.001},
        {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "attention"},
    ],
)
def test_settings_of_a_loss_go_with_it(train: dict[str, Any]) -> None:
    recipe = check(recipe_from_tree({"model": {"name": "some/model"}, "train": train}, "mine.toml"))
    assert {name: getattr(recipe.train, name) for name in train} == train


def test_one_judgment_is_enough_without_a_meta_judge() -> None:
    tree = {"model": {"name": "m/n"}, "judge": {"samples": 1}, "iteration": [{"meta_judge": False}]}
    assert check(recipe_from_tree(tree, "mine.toml")).judge.samples == 1


def test_values_given_past_the_file_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"settings: train\.beta = -1\.0"):
        check(replace(VALID, train=TrainSettings(beta=-1.0)))


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    tree = {"model": {"name": "model"}, "prompts": {"file": "p.jsonl"}, "judge": {"template": "j.txt"}}
    recipe = check(recipe_from_tree(tree, "x"))
    assert recipe.model.name == str(tmp_path / "model")
    assert recipe.prompts.file == str(tmp_path / "p.jsonl")
    assert recipe.judge.template == str(tmp_path / "j.txt")
    assert (recipe.seed.file, recipe.meta_judge.template) == ("starter:quality", "")
    assert check(VALID).model.name == "some/model"


SCALARS = {
    "bool": st.booleans(),
    "int": st.integers(1, 10**9),
    "float": st.floats(1e-9, 0.49),
    "str": st.text(max_size=9),
}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Valid recipes with any setting changed."""
    tree = asdict(Recipe())
    for section in tree:
        if not isinstance(tree[section], dict):
            continue
        for name, value in tree[section].items():
            kind = type(value).__name__
            if (
                kind in SCALARS
                and name
                not in (
                    "loss",
                    "lora_targets",
                    "action",
                    "compute_dtype",
                    "activation_checkpointing",
                    "dtype",
                    "page_size",
                )
                and draw(st.booleans())
            ):
                tree[section][name] = draw(SCALARS[kind])
    tree["model"]["chat_template_kwargs"] = draw(
        st.dictionaries(
            st.text(max_size=5), st.booleans() | st.integers(0, 9) | st.text(max_size=3), max_size=2
        )
    )
    tree["iteration"] = [{"rho": draw(SCALARS["float"])} for _ in range(draw(st.integers(1, 3)))]
    tree["random_seed"] = draw(st.integers(0, 2**31))
    return recipe_from_tree(tree, "drawn")


@given(recipe=recipes())
def test_dumped_and_loaded_is_the_same(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert not differences(recipe, load_recipe(path))
    # Every setting is written out, so that new defaults cannot change an old run.
    written = dict(flatten(tomllib.loads(path.read_text("utf-8"))))
    assert set(all_keys()) - {"model.chat_template_kwargs"} <= set(written)


def test_differences_leave_out_how_fast_and_how_loud() -> None:
    other = replace(
        VALID, sampler=replace(VALID.sampler, max_running=1), random_seed=9, iteration=(Iteration(rho=0.5),)
    )
    found = differences(VALID, other)
    assert "random_seed: 0 -> 9" in found
    assert "iteration.0.rho: 0.0 -> 0.5" in found
    assert not any(item.startswith("sampler") for item in found)
    assert not differences(VALID, VALID)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for content in (b"[respond\nsamples = 3", b"a = 1\na = 2", b"name = '\xff'"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"mine\.toml is not valid TOML") as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)


def test_a_recipe_is_found_by_path_or_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo.toml") == find_recipe("recipes/demo.toml")
    (tmp_path / "demo.toml").write_text("")
    assert find_recipe("demo.toml") == Path("demo.toml")
    # A mistyped path must not end in the packaged recipe of the same name.
    for name in ("absent.toml", str(tmp_path / "recipes" / "demo.toml"), "/demo.toml", "", str(tmp_path)):
        with pytest.raises(UserError, match=r"no recipe.*llama3-8b\.toml"):
            find_recipe(name)


def test_every_setting_is_documented() -> None:
    """A docstring, or a comment in its place, follows every field: the help and the recipe's reader live on them."""
    import ast
    import inspect

    import metareward.config as config

    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), node.name
        for item, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign) and node.name not in ("Recipe", "ModelSettings"):
                assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(item.target)}"
    assert {item.name for item in fields(Recipe)} >= {"model", "iteration"}
    assert get_args(config.Dtype) == ("bfloat16", "float32")
