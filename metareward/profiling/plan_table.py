"""A plan in the terminal: requests, tokens and time by stage, memory and disk, and what it all hangs on."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console

from metareward.profiling.assumptions import Assumptions
from metareward.profiling.plan_time import (
    GIB,
    STEP,
    Setting,
    StagePlan,
    disk_bytes,
    sampling_memory,
    sensitivities,
    total_seconds,
    training_memory,
)
from metareward.profiling.table import WIDTH, new_table, whole

SHOWN = 4


def print_plan(
    setting: Setting, plans: list[StagePlan], assumed: Assumptions, origins: dict[str, str]
) -> None:
    """origins: assumption -> where its value comes from, for those that are not defaults."""
    console = Console(width=WIDTH)
    timed = setting.machine is not None
    unit = "GPU" if setting.machine is not None and setting.machine.kind == "cuda" else "rank"
    names = ["iteration", "stage", "requests", "prompt tokens", "computed", "new tokens", "training tokens"]
    table = new_table("Plan", *names, *(["seconds", f"{unit}-hours", "share"] if timed else []))
    total = total_seconds(plans)
    for item in plans:
        work = item.work
        row = [
            str(work.iteration) if work.iteration else "",
            work.stage,
            whole(work.requests),
            whole(work.prompt_tokens),
            whole(work.prefill.rows),
            whole(work.new_tokens),
            whole(work.forward.rows),
        ]
        if timed:
            share = item.seconds / total if total else 0.0
            row += [f"{item.seconds:,.1f}", hours(item.seconds * setting.gpus), f"{share:.0%}"]
        table.add_row(*row)
    if timed:
        table.add_section()
        table.add_row("", "all", *[""] * 5, f"{total:,.1f}", hours(total * setting.gpus), "")
    console.print(table)
    for sentence in sentences(setting, plans, assumed, origins):
        console.print(sentence, highlight=False, soft_wrap=True)


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3g}"


def sentences(
    setting: Setting, plans: list[StagePlan], assumed: Assumptions, origins: dict[str, str]
) -> list[str]:
    """Memory, disk, machine, values and what dominates."""
    weights, cache = sampling_memory(setting)
    states, peak = training_memory(setting, plans)
    kept, temporary = disk_bytes(setting, plans)
    found = [
        f"Memory a rank, sampling: {weights / GIB:.3g} GiB of weights and up to {cache / GIB:.3g} GiB of cache (it takes "
        f"what is free); training: at most about {peak / GIB:.3g} GiB, {states / GIB:.3g} of it weights, gradients and moments.",
        f"Disk: {kept / GIB:.3g} GiB in the end, {temporary / GIB:.3g} GiB more for checkpoints while a stage trains.",
    ]
    machine, sharing = setting.machine, setting.recipe.sampler.tensor_parallel
    if sharing > 1:
        found.append(
            f"sampler.tensor_parallel = {sharing}: the time of its all-reduces, two a layer in every step, is not counted."
        )
    if machine is None:
        found.append(
            "No time, because no machine is known: measure this one (`metareward profile --machine`), or name one "
            "(--machine 'H100 80GB HBM3')."
        )
    else:
        source = "data sheet" if machine.measured == "data sheet" else "measured"
        found.append(
            f"Machine: {machine.device} ({source}), {machine.bandwidth / 1e9:,.4g} GB/s, "
            f"{machine.rate('bfloat16') / 1e12:,.3g} TFLOP/s in bf16, {machine.rate('float32') / 1e12:,.3g} in fp32; "
            f"{setting.gpus} at once."
        )
    values = ", ".join(
        f"{item.name} {getattr(assumed, item.name):.3g} ({origins.get(item.name, 'default')})"
        for item in fields(Assumptions)
    )
    found.append(f"Assumed: {values}.")
    what = "time" if machine is not None else "number of tokens"
    ranked = sensitivities(setting, assumed)
    first = ranked[0]
    rest = ", ".join(f"{name} ({change:.0%})" for name, change in ranked[1:SHOWN])
    found.append(
        f"What dominates: {first[0]} ({origins.get(first[0], 'default')}); if it is off by {STEP:.0%}, the {what} is off by up "
        f"to {first[1]:.0%}. Then {rest}. Set them with --assume.NAME VALUE."
    )
    return found
