"""Everything `metareward plan` reads: recipe, model, machine, a run's rates; put together in one order of precedence.

A value given on the command line wins over a run's, a run's over what `profile --machine --recipe` measured, that over defaults.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from metareward.config import Recipe
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.hf_files import read_config
from metareward.model.tensor_parallel import check_tensor_parallel
from metareward.profiling import machine as machines
from metareward.profiling.assumptions import REACHED, UPPER, Assumptions, with_values
from metareward.profiling.machine import Machine
from metareward.profiling.measured import check_useful, measured_values
from metareward.profiling.plan_lengths import measure_lengths
from metareward.profiling.plan_time import Setting, StagePlan, plan
from metareward.recipe_files import check, find_recipe, load_recipe
from metareward.stages.context import sampling_dtype
from metareward.training.examples import check_batch


def make_plan(
    name: str, machine: str, rates: Path | None, model: Path | None, gpus: int, given: Assumptions
) -> tuple[Setting, list[StagePlan], Assumptions, dict[str, str]]:
    """The setting, the plan by stage, the values it stands on, and where those come from that are not defaults.

    Raises:
        UserError: a file is missing or wrong, the model is not on this machine, a value is out of range, a batch does not divide
            over the GPUs, nor does sampler.tensor_parallel.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give 1 or more")
    check_given(given)
    recipe = check(load_recipe(find_recipe(name)))
    check_batch(recipe.train.batch_pairs, gpus, "train.batch_pairs")
    if recipe.seed.enabled:
        check_batch(recipe.seed.batch_examples, gpus, "seed.batch_examples")
    folder = local_model(recipe, model)
    check_tensor_parallel(recipe.sampler.tensor_parallel, gpus, read_config(folder))
    known = find_machine(machine)
    device = torch.device("cpu" if known is None else known.kind)
    setting = Setting(
        recipe,
        read_config(folder),
        measure_lengths(recipe, Chat.load(folder, recipe.model.chat_template_kwargs)),
        gpus,
        str(sampling_dtype(recipe.sampler.dtype, device)).removeprefix("torch."),
        known,
    )
    assumed, origins = gather(given, known, folder, rates)
    return setting, plan(setting, assumed), assumed, origins


def check_given(given: Assumptions) -> None:
    for item in fields(Assumptions):
        value = getattr(given, item.name)
        if not 0.0 < value <= UPPER.get(item.name, float("inf")):
            raise UserError(
                f"--assume.{item.name.replace('_', '-')} {value} is out of range: give a number above 0"
                + (", at most 1" if item.name in UPPER else "")
            )


def local_model(recipe: Recipe, model: Path | None) -> Path:
    """The folder whose config.json and tokenizer the plan reads."""
    folder = model or Path(recipe.model.name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a model folder on this machine, and a plan downloads nothing: give one that has the model's "
            "config.json and tokenizer with --model"
        )
    return folder.absolute()


def find_machine(name: str) -> Machine | None:
    """A file, a GPU of the table, or what was measured on this machine; None where nothing was."""
    if name:
        return machines.load(Path(name)) if Path(name).exists() else machines.from_data_sheet(name)
    path = machines.default_file()
    return machines.load(path) if path.is_file() else None


def gather(
    given: Assumptions, machine: Machine | None, model: Path, rates: Path | None
) -> tuple[Assumptions, dict[str, str]]:
    """The values of a plan and the origins of those that are not defaults."""
    defaults = Assumptions()
    assumed, origins = defaults, {}
    sources: list[tuple[str, dict[str, float]]] = []
    if machine is not None and str(model) in machine.reached:
        reached = machine.reached[str(model)]
        sources.append(
            ("measured here", {REACHED[key]: value for key, value in reached.items() if key in REACHED})
        )
    if rates is not None:
        values = measured_values(rates, machine)
        check_useful(values, rates)
        sources.append((f"measured in {rates.name}", values))
    changed = {
        item.name: getattr(given, item.name)
        for item in fields(Assumptions)
        if getattr(given, item.name) != getattr(defaults, item.name)
    }
    sources.append(("given", changed))
    for origin, values in sources:
        assumed = with_values(assumed, values)
        origins.update(dict.fromkeys(values, origin))
    return assumed, origins
