"""`metareward profile` and `metareward plan`: where the time of a run went, and what a run will cost."""

from __future__ import annotations

import json as json_module
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from metareward.errors import UserError
from metareward.profiling.assumptions import Assumptions

if TYPE_CHECKING:
    from metareward.profiling.machine import Machine

DEFAULTS = Assumptions()
BUSY = 1.0
"""Processes that ran in the last minute, on average, from which `profile --machine` warns."""


def profile(
    run_dir: tyro.conf.Positional[Path | None] = None,
    *,
    machine: bool = False,
    recipe: str = "",
    machine_file: Path | None = None,
    trace: Path | None = None,
    json: Path | None = None,
) -> None:
    """Where a run's time went, stage by stage and phase by phase, against the limits of the machine.

    Prints seconds, requests, tokens, MFU, memory-bandwidth use, peak memory and rank imbalance of every stage, and what to
    improve first. Works while the run is still going. `--machine` measures the limits; do that first, on an idle machine.

    Args:
        run_dir: A folder that `metareward run` made.
        machine: Measure this machine's memory bandwidth and matrix rate, and keep them in the machine file.
        recipe: With --machine: also measure what share of these limits the sampler and the trainer reach with this
            recipe's model and settings, by short runs of both. `metareward plan` then assumes less.
        machine_file: Where the machine's figures are. Default: metareward/machine.json in the user's cache folder.
        trace: Also write the spans as a trace for chrome://tracing or ui.perfetto.dev.
        json: Also write all figures to this file.
    """
    from metareward.profiling import machine as machines
    from metareward.profiling.figures import all_figures
    from metareward.profiling.read import read_run
    from metareward.profiling.table import as_dictionary, print_profile
    from metareward.profiling.trace import write_trace
    from metareward.run.directory import open_existing
    from metareward.run.jsonl import check_writable, write_text

    if run_dir is None and not machine:
        raise UserError("give the folder of a run, or --machine to measure this machine")
    if recipe and not machine:
        raise UserError("--recipe says what to measure with --machine: add --machine, or leave it out")
    if run_dir is None and (trace is not None or json is not None):
        raise UserError("--trace and --json are about a run: give its folder")
    if json is not None:
        check_writable(json)
    path = machine_file or machines.default_file()
    if machine:
        measure_machine(path, recipe)
    if run_dir is None:
        return
    open_existing(run_dir)
    known = machines.load(path) if machine_file is not None or path.is_file() else None
    run = read_run(run_dir)
    figures = all_figures(run, known)
    print_profile(run, figures, known)
    if json is not None:
        write_text(json, json_module.dumps(as_dictionary(run, figures, known), indent=1) + "\n")
    if trace is not None:
        print(f"wrote {trace}, {write_trace(run_dir, trace)} slices")


def measure_machine(path: Path, recipe: str) -> None:
    """Measure, print, and write the machine file; what it knew of models on the same device stays."""
    from metareward.profiling import machine as machines
    from metareward.run import ranks

    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"other work has been running here (load {load:.1f}): rates come out too low; measure again when it is done"
        )
    found = machines.measure(ranks.device())
    if path.is_file():
        known = machines.load(path)
        if (known.device, known.threads) == (found.device, found.threads):
            found = replace(found, reached=known.reached)
    machines.save(found, path)
    print(
        f"{found.device}, {found.threads} threads: copy {found.copy / 1e9:,.1f} GB/s, triad {found.triad / 1e9:,.1f} GB/s, "
        f"products {found.matrix['bfloat16'] / 1e12:,.3g} TFLOP/s in bf16, {found.matrix['float32'] / 1e12:,.3g} in fp32"
    )
    sheet = found.sheet
    if sheet is not None:
        print(
            f"data sheet: {sheet.bandwidth / 1e9:,.0f} GB/s ({found.bandwidth / sheet.bandwidth:.0%} reached), "
            f"{sheet.bfloat16 / 1e12:,.4g} TFLOP/s in bf16 ({found.matrix['bfloat16'] / sheet.bfloat16:.0%} reached)"
        )
    elif found.kind == "cuda":
        print(f"no data sheet of {found.device} is known: MFU will be a share of what was measured")
    if recipe:
        found = calibrate_recipe(found, recipe)
        machines.save(found, path)
    print(f"wrote {path}")


def calibrate_recipe(found: Machine, recipe: str) -> Machine:
    """The machine with what a recipe's model reaches on it."""
    from metareward.model.locate import locate_model
    from metareward.profiling.calibrate import calibrate
    from metareward.recipe_files import check, find_recipe, load_recipe
    from metareward.run import ranks

    settings = check(load_recipe(find_recipe(recipe)))
    model = locate_model(settings.model.name)
    ranks.start_ranks()
    try:
        measured = calibrate(model, found, settings)
    finally:
        ranks.stop_ranks()
    values = ", ".join(
        f"{name} {value:.3g}" for name, value in measured.reached[str(model.absolute())].items()
    )
    print(f"reached by {model}: {values}")
    return measured


def plan(
    recipe: tyro.conf.Positional[str],
    *,
    machine: str = "",
    rates: Path | None = None,
    model: Path | None = None,
    gpus: int = 1,
    assume: Annotated[Assumptions, tyro.conf.arg(name="assume")] = DEFAULTS,
    json: Path | None = None,
) -> None:
    """What a recipe will cost: requests, tokens and hours by stage, memory a GPU, disk; and which assumption dominates.

    Prompts and labels are read and rendered; what models will write is assumed, or taken from a run. Nothing is downloaded.

    Args:
        recipe: A TOML file, or the name of a packaged one.
        machine: A file of `metareward profile --machine`, or the exact name of a GPU whose data sheet is known ("H100 80GB HBM3",
            "A100-SXM4-80GB" ...). Default: what was measured on this machine, if anything was.
        rates: A run whose text lengths, yields and rates take the place of assumptions.
        model: A folder with the model's config.json and tokenizer, where model.name is not on this machine.
        gpus: GPUs, or ranks on a CPU, that share the work.
        assume: Values to assume; they win over measured ones.
        json: Also write the plan to this file.
    """
    from metareward.profiling.plan_command import make_plan
    from metareward.profiling.plan_table import print_plan
    from metareward.profiling.plan_time import total_seconds
    from metareward.run.jsonl import check_writable, write_text

    if json is not None:
        check_writable(json)
    setting, plans, assumed, origins = make_plan(recipe, machine, rates, model, gpus, assume)
    print_plan(setting, plans, assumed, origins)
    if json is not None:
        stages = [{**asdict(item.work), "parts": item.parts, "seconds": item.seconds} for item in plans]
        record = {
            "stages": stages,
            "seconds": total_seconds(plans),
            "assumed": asdict(assumed),
            "origins": origins,
        }
        write_text(json, json_module.dumps(record, indent=1) + "\n")
