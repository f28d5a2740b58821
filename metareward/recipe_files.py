"""Recipes between TOML files and dataclasses: reading, checking, comparing, writing.

pydantic checks types and ranges; what it finds is told as one sentence a mistake, and an unknown key is answered with the
nearest known one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from metareward.config import EXECUTION_SETTINGS, Iteration, Recipe, TrainSettings
from metareward.errors import UserError

STARTER = "starter:"
RENAMED = {"sampler.max_prefill_tokens": "sampler.max_step_tokens"}
"""Old names of settings, for a clear answer to old recipes."""


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("metareward") / "recipes"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))


def find_recipe(name: str) -> Path:
    """The recipe file a user means: a path, or the name of a packaged one (`demo.toml`, `recipes/demo.toml`)."""
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("recipes")) and path.name in packaged_recipes():
        return Path(str(resources.files("metareward") / "recipes" / path.name))
    raise UserError(
        f"there is no recipe {name}: give the path of a TOML file, or one of {', '.join(packaged_recipes())}"
    )


def load_recipe(path: Path) -> Recipe:
    """Read and check a TOML recipe; see `check` for the errors."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    return recipe_from_tree(tree, str(path))


def recipe_from_tree(tree: dict[str, Any], origin: str) -> Recipe:
    """A Recipe from nested dictionaries, types and ranges checked.

    Raises:
        UserError: naming the setting, the origin and the mend, for the first mistake found.
    """
    try:
        # Through JSON, because strict mode accepts a JSON array as a tuple but not a Python list.
        return TypeAdapter(Recipe).validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(describe(item) for item in error.errors()[:3])) from None
    except TypeError as error:
        raise UserError(
            f"{origin}: {error}; use numbers, strings, booleans, arrays and tables only"
        ) from None


def describe(error: Any) -> str:
    """One of pydantic's findings as a sentence."""
    location = ".".join(str(part) for part in error["loc"])
    if location in RENAMED:
        return (
            f"{location} is now called {RENAMED[location]}: rename it, and look whether the value still fits"
        )
    if error["type"] == "unexpected_keyword_argument":
        parent = ".".join(str(part) for part in error["loc"][:-1])
        key = str(error["loc"][-1])
        known = known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        elsewhere = [name for name in all_keys() if name.split(".")[-1] == key]
        hint = (
            elsewhere[0]
            if elsewhere
            else ".".join(part for part in (parent, near[0] if near else "") if part)
        )
        return f"unknown setting {location}; did you mean {hint}?"
    return f"{location} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in the table at `location`."""
    table: Any = Recipe()
    for part in location:
        table = Iteration() if isinstance(part, int) else getattr(table, part)
    return [item.name for item in fields(table)] if is_dataclass(table) else []


def all_keys() -> list[str]:
    """Dotted names of all settings outside the iterations."""
    return [f"{section.name}.{name}" for section in fields(Recipe) for name in known_keys((section.name,))]


def check(recipe: Recipe) -> Recipe:
    """What no single setting shows: combinations that could not work. Returns the recipe with its paths made absolute.

    Raises:
        UserError: one sentence that names the setting to change.
    """
    recipe = recipe_from_tree(asdict(recipe), "settings")
    if not recipe.model.name:
        raise UserError("model.name is not set: give a model directory or a hub id (--model.name DIR)")
    if not recipe.iteration:
        raise UserError("the recipe has no [[iteration]]: add one table an iteration")
    if recipe.respond.samples < 2:
        raise UserError(
            "respond.samples = 1 leaves nothing to compare: a preference pair needs at least 2 responses"
        )
    if recipe.judge.samples < 2 and any(item.meta_judge for item in recipe.iteration):
        raise UserError(
            "judge.samples = 1 leaves the meta-judge nothing to compare: set it to 2 or more, "
            "or meta_judge = false in every [[iteration]]"
        )
    if recipe.train.label_smoothing and recipe.train.loss not in ("dpo", "dpo_norm", "simpo"):
        raise UserError(
            f'train.label_smoothing works with loss = "dpo", "dpo_norm" and "simpo" only, not "{recipe.train.loss}": '
            f"set it to 0"
        )
    if recipe.train.simpo_gamma and recipe.train.loss != "simpo":
        raise UserError(
            f'train.simpo_gamma works with loss = "simpo" only, not "{recipe.train.loss}": set it to 0'
        )
    for name in ("lora_alpha", "lora_targets"):
        if not recipe.train.lora_rank and getattr(recipe.train, name) != getattr(TrainSettings(), name):
            raise UserError(
                f"train.{name} works with adapters only, and train.lora_rank = 0 has none: set train.lora_rank, or leave "
                f"train.{name} out"
            )
    return replace(
        recipe,
        model=replace(recipe.model, name=absolute_if_there(recipe.model.name)),
        prompts=replace(recipe.prompts, file=absolute(recipe.prompts.file)),
        seed=replace(recipe.seed, file=absolute(recipe.seed.file)),
        judge=replace(recipe.judge, template=absolute(recipe.judge.template)),
        meta_judge=replace(recipe.meta_judge, template=absolute(recipe.meta_judge.template)),
    )


def absolute(path: str) -> str:
    """Absolute form of a path given relative to the current directory; names of packaged files stay."""
    return path if not path or path.startswith(STARTER) else str(Path(path).expanduser().absolute())


def absolute_if_there(name: str) -> str:
    """Like `absolute`, but a name that is no directory here may be a hub id and stays as it is."""
    return str(Path(name).expanduser().absolute()) if Path(name).expanduser().is_dir() else name


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Settings that differ in what they compute, as "name: old -> new"."""
    left, right = dict(flatten(asdict(old))), dict(flatten(asdict(new)))
    names = [name for name in {**left, **right} if not {name, name.split(".")[0]} & set(EXECUTION_SETTINGS)]
    return [
        f"{name}: {left.get(name, 'absent')!r} -> {right.get(name, 'absent')!r}"
        for name in names
        if left.get(name) != right.get(name)
    ]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of nested dictionaries and sequences."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(tree, (list, tuple)) and tree:
        for index, value in enumerate(tree):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, tree


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every setting written out."""
    return tomli_w.dumps(json.loads(json.dumps(asdict(recipe))), multiline_strings=False)
