"""The sampler against transformers' `generate`, on the three sampling workloads of an iteration, in one run.

    python -m bench.sampler --json FILE [--workload judge compare respond] [--rounds 3]

Rounds alternate between both sides, so that a machine that slows down slows both; the reported figure is the
median. Every round of ours is a new engine with an empty cache; loading a model is not timed on either side, an
engine's construction is not either. What the file holds: `summary` below for each workload, all raw
measurements, machine, versions and commit.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bench import workloads
from bench.peer_generate import Measurement, Peer, best_batch, plan, tokens_per_s
from bench.record import ROOT, check_writable, environment, write_json
from bench.workloads import Source, Workload
from metareward.cli import fail
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.decoder import Decoder
from metareward.model.hf_files import load_decoder
from metareward.model.locate import locate_model
from metareward.sampler import Engine
from metareward.stages.context import sampling_dtype

Name = Literal["judge", "compare", "respond"]
LINEAR = 4


def benchmark(
    *,
    json: Path,
    workload: tuple[Name, ...] = ("judge", "compare", "respond"),
    rounds: int = 3,
    scale: int = 1,
    linear: bool = False,
    peer: bool = True,
    profile: bool = False,
    model: str = str(ROOT / "models" / "smollm2-135m-instruct"),
    data: Path = workloads.DATA,
    max_running: int = 264,
    device: Literal["cpu", "cuda"] = "cpu",
    seed: int = 0,
) -> None:
    """Measure the sampler and transformers' generate on the same requests.

    Args:
        json: The file for the results; it is there after the first round, and complete after the last.
        workload: Which to run.
        rounds: How often each side is measured; the median counts.
        scale: So many times the requests: more prompts of the same kind.
        linear: Also measure ours at four times the scale, to see whether the cost grows with the requests alone.
        peer: Measure transformers' generate too.
        profile: Print where one more round of ours spends its time (torch.profiler).
        model: A model directory or hub id.
        data: The folder with the prompts and responses.
        max_running: Sequences that ours decodes together.
        device: Where both sides run.
        seed: Of the sampling.
    """
    for name, value in (("rounds", rounds), ("scale", scale), ("max_running", max_running)):
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: set 1 or more")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and there is no CUDA device: leave it out")
    if not workload:
        raise UserError("--workload names nothing: give judge, compare or respond, or leave it out")
    check_writable(json)
    directory = locate_model(model)
    chat = Chat.load(directory)
    source = workloads.read_source(data, chat)
    chosen = list(dict.fromkeys(workload))
    runs = [build(name, source, scale) for name in chosen]
    long_runs = [build(name, source, scale * LINEAR) for name in chosen] if linear else []
    dtype = sampling_dtype("auto", torch.device(device))
    results = measure_all(
        load_decoder(directory, dtype=dtype, device=device),
        Peer(directory, chat.stop_ids, device) if peer else None,
        runs,
        long_runs=long_runs,
        rounds=rounds,
        max_running=max_running,
        seed=seed,
        header={"model": directory.name, "scale": scale, "max_running": max_running, **environment()},
        path=json,
        profile=profile,
    )
    print_table(results)


def build(name: Name, source: Source, scale: int) -> Workload:
    """A workload of the published size, times `scale`."""
    if name == "judge":
        return workloads.judge(source, instructions=3 * scale)
    if name == "compare":
        return workloads.compare(source, responses=6 * scale)
    return workloads.respond(source, prompts=64 * scale)


def measure_all(
    decoder: Decoder,
    peer: Peer | None,
    runs: Sequence[Workload],
    *,
    long_runs: Sequence[Workload] = (),
    rounds: int,
    max_running: int,
    seed: int,
    header: dict[str, Any],
    path: Path,
    profile: bool = False,
) -> dict[str, Any]:
    """Both sides, round by round; the record is written anew after every round and returned at the end."""
    ours: dict[str, list[Measurement]] = {run.name: [] for run in runs}
    ours_long: dict[str, list[Measurement]] = {run.name: [] for run in long_runs}
    theirs: dict[str, list[Measurement]] = {run.name: [] for run in runs}
    for run in runs[:1]:
        few = replace(run, requests=run.requests[:4], params=replace(run.params, max_new_tokens=4))
        measure(decoder, few, max_running=max_running, seed=seed)
        if peer is not None:
            peer.warm_up(run)
    record: dict[str, Any] = {}
    for turn in range(rounds):
        for index, run in enumerate(runs):
            ours[run.name].append(measure(decoder, run, max_running=max_running, seed=seed + turn))
            tell(run.name, turn, "ours", ours[run.name][-1])
            if long_runs:
                longer = measure(decoder, long_runs[index], max_running=max_running, seed=seed + turn)
                ours_long[run.name].append(longer)
                tell(run.name, turn, f"ours, {LINEAR} times the requests", longer)
            for dtype, batch in plan(theirs[run.name]) if peer is not None else ():
                assert peer is not None
                found = peer.measure(run, dtype, batch, turn=turn, turns=rounds, seed=seed)
                theirs[run.name].append(found)
                tell(run.name, turn, f"transformers {dtype}, batch of {found['batch']}", found)
        record = {
            **header,
            "rounds": turn + 1,
            "workloads": {
                run.name: summary(ours[run.name], theirs[run.name], ours_long.get(run.name, []))
                for run in runs
            },
        }
        write_json(path, record)
    for run in runs if profile else ():
        print_profile(decoder, run, max_running=max_running, seed=seed)
    return record


def measure(decoder: Decoder, run: Workload, *, max_running: int, seed: int) -> Measurement:
    """One round of ours: a new engine, every request, wall time from the first request to the last token."""
    gc.collect()
    engine = Engine(decoder, stop_ids=(), seed=seed, max_running=max_running)
    start = perf_counter()
    lengths = [len(completion.token_ids) for completion in engine.generate(run.requests, run.params)]
    seconds = perf_counter() - start
    expected = [run.params.max_new_tokens] * len(run.requests)
    if lengths != expected:
        raise RuntimeError(
            f"{run.name}: the engine gave {sum(lengths)} tokens in {len(lengths)} completions, not "
            f"{sum(expected)} in {len(expected)}"
        )
    return {
        "requests": len(lengths),
        "least_prefill_tokens": workloads.unshared_tokens(run),
        "seconds": seconds,
        "tokens_per_s": sum(lengths) / seconds,
        "dtype": str(next(decoder.parameters()).dtype).removeprefix("torch."),
        "implementation": engine.implementations(),
        "stats": asdict(engine.stats),
    }


def summary(
    ours: Sequence[Measurement], theirs: Sequence[Measurement], ours_long: Sequence[Measurement]
) -> dict[str, Any]:
    """The figures of one workload. Those of ours are all from its median round, except for raw rounds."""
    middle = median_round(ours)
    stats = middle["stats"]
    parts = ("prefill", "decode", "sampling", "host")
    bf16 = tokens_per_s(theirs, "bf16") if theirs else None
    fp32 = tokens_per_s(theirs, "fp32") if theirs else None
    found: dict[str, Any] = {
        "tokens_per_s": middle["tokens_per_s"],
        "peer_tokens_per_s": bf16,
        "peer_fp32_tokens_per_s": fp32,
        "ratio": middle["tokens_per_s"] / bf16 if bf16 else None,
        "ratio_fp32": middle["tokens_per_s"] / fp32 if fp32 else None,
        "requests": middle["requests"],
        "new_tokens": stats["new_tokens"],
        "prompt_tokens": stats["prompt_tokens"],
        "prefill_tokens": stats["prefill_tokens"],
        "least_prefill_tokens": middle["least_prefill_tokens"],
        "peak_kv_pages": stats["peak_pages"],
        "unshared_kv_pages": stats["unshared_pages"],
        "dtype": middle["dtype"],
        "implementation": middle["implementation"],
        "seconds": {"wall": middle["seconds"], **{part: stats[f"{part}_seconds"] for part in parts}},
        "rounds": list(ours),
        "peer_rounds": list(theirs),
        "peer_batch": {dtype: best_batch(theirs, dtype) for dtype in ("bf16", "fp32")} if theirs else None,
    }
    if ours_long:
        long_rate = median_round(ours_long)["tokens_per_s"]
        found["linear"] = {
            "times": LINEAR,
            "tokens_per_s": long_rate,
            "ratio": long_rate / middle["tokens_per_s"],
            "rounds": list(ours_long),
        }
    return found


def median_round(rounds: Sequence[Measurement]) -> Measurement:
    """The round in the middle by tokens/s; of two in the middle, the slower."""
    middle = statistics.median_low(found["tokens_per_s"] for found in rounds)
    return next(found for found in rounds if found["tokens_per_s"] == middle)


def print_profile(decoder: Decoder, run: Workload, *, max_running: int, seed: int) -> None:
    """Where one round's time goes, by operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as events:
        measure(decoder, run, max_running=max_running, seed=seed)
    print(f"\n{run.name}, with the profiler's own cost:")
    print(
        events.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50, max_src_column_width=0
        )
    )


def tell(name: str, turn: int, side: str, found: Measurement) -> None:
    print(
        f"{name}, round {turn + 1}, {side}: {found['tokens_per_s']:.1f} tok/s ({found['seconds']:.1f} s)",
        flush=True,
    )


def print_table(record: dict[str, Any]) -> None:
    """One row a workload. `prefilled` is the share of the prompts' tokens, `pages` the share of unshared ones; the
    ratio is to the peer in bf16."""
    headings = ("workload", "tok/s", "peer bf16", "peer fp32", "ratio", "prefilled", "pages", "prefill s")
    linear = any("linear" in found for found in record["workloads"].values())
    table = Table(*headings, "decode s", "sampling s", "host s", *([f"x{LINEAR} tok/s"] if linear else []))
    for name, found in record["workloads"].items():
        seconds = found["seconds"]
        row = [
            name,
            f"{found['tokens_per_s']:.0f}",
            *(shown(found[key], ".0f") for key in ("peer_tokens_per_s", "peer_fp32_tokens_per_s")),
            shown(found["ratio"], ".1f"),
            share(found["prefill_tokens"], found["prompt_tokens"]),
            share(found["peak_kv_pages"], found["unshared_kv_pages"]),
            *(f"{seconds[part]:.1f}" for part in ("prefill", "decode", "sampling", "host")),
        ]
        if linear:
            row.append(f"{found['linear']['tokens_per_s']:.0f} ({found['linear']['ratio']:.0%})")
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    ops = ", ".join(f"{op}: {name}" for op, name in found["implementation"].items())
    where = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    console.print(
        f"ours in {found['dtype']} ({ops}); peer: generate of transformers\n{where}", highlight=False
    )


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("torch", "transformers", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        tyro.cli(benchmark, prog="python -m bench.sampler", args=arguments)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
