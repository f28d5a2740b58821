"""A DPO step of the trainer against TRL's DPOTrainer: the same pairs, global batches and optimizer, in one run.

    python -m bench.dpo_step --json FILE --data DIR

First the oracle: a plain fp32 implementation (`bench.dpo_oracle`) gives loss and gradient norm of the first three
steps; ours in fp32 must agree to 1e-4 and in bf16, in the timed steps themselves, to 1 %. Then the peer's fastest
setting is looked for, and both sides take turns, one step each a round, so that a machine that slows down slows both.
The first step of each warms up and is not timed. Every side is a process of its own, whose peak memory is read from
Linux: `peak_bytes` is what the steps added to it (gradients, optimizer state, activations), `peak_whole_bytes` all of
it. Loading, reference log-probs and tokenization are timed on neither side.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from bench import workloads
from bench.dpo_job import Job, judge_pairs, make_job
from bench.dpo_oracle import deviations, worst
from bench.dpo_ours import serve_oracle, serve_ours
from bench.peer_dpo import NEEDED, PeerSetting, candidates, missing, serve_peer
from bench.record import ROOT, check_writable, environment, write_json
from bench.sides import Figures, Side
from metareward.cli import fail
from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.locate import locate_model

CHECKED_STEPS = 3
# Pairs a step while the peer's settings are tried: as many as the largest batch size among them.
TRIED_PAIRS = 4
LIMITS = {"fp32": 1e-4, "bf16": 1e-2}


class Disagrees(Exception):
    """The losses or gradient norms of the first steps are not the oracle's."""


def benchmark(
    *,
    json: Path,
    pairs: int = 64,
    batch_pairs: int = 16,
    rounds: int = 4,
    peer: bool = True,
    peer_batch: int | None = None,
    micro_batch_tokens: int = TrainSettings().micro_batch_tokens,
    activation_checkpointing: Literal["none", "selective", "full"] = "full",
    learning_rate: float = 1e-6,
    profile: bool = False,
    quick: bool = False,
    model: str = str(ROOT / "models" / "smollm2-135m-instruct"),
    data: Path = workloads.DATA,
    seed: int = 0,
) -> None:
    """Measure a DPO step of ours and of TRL on the CPU.

    Args:
        json: The file for the results.
        pairs: Preference pairs in the data.
        batch_pairs: Pairs an optimizer step, on both sides.
        rounds: Timed steps of each side, at least 2; the median counts.
        peer: Measure TRL too.
        peer_batch: TRL's pairs a forward pass; without it the fastest of several settings is looked for.
        micro_batch_tokens: Ours: tokens a forward pass (train.micro_batch_tokens).
        activation_checkpointing: Ours (train.activation_checkpointing).
        learning_rate: Constant, on both sides and in the oracle, with no warm-up: AdamW moves every weight by all of it at once.
        profile: Print where one more step of ours spends its time (torch.profiler).
        quick: A run of 4 pairs, to see that everything works; its figures say nothing.
        model: A model directory or hub id.
        data: The folder with the prompts and responses.
        seed: Of the order of the pairs.
    """
    if quick:
        pairs, batch_pairs, rounds, peer_batch = 4, 2, 2, 1
    checks = {"pairs": (pairs, batch_pairs), "batch-pairs": (batch_pairs, 1), "rounds": (rounds, 2)}
    checks["micro-batch-tokens"] = (micro_batch_tokens, 1)
    for name, (value, least) in checks.items():
        if value < least:
            raise UserError(f"--{name} is {value}: set {least} or more")
    if not learning_rate > 0.0:
        raise UserError(f"--learning-rate is {learning_rate}: set a positive number, such as 5e-6")
    if pairs % batch_pairs:
        # A smaller batch at an epoch's end would be another workload.
        raise UserError(f"--pairs {pairs} is no multiple of --batch-pairs {batch_pairs}: change one of them")
    if peer_batch is not None and (peer_batch < 1 or batch_pairs % peer_batch):
        raise UserError(
            f"--peer-batch {peer_batch} does not divide --batch-pairs {batch_pairs}: set a divisor"
        )
    check_writable(json)
    directory = locate_model(model)
    examples = judge_pairs(workloads.read_source(data, Chat.load(directory)), pairs)
    settings = TrainSettings(
        batch_pairs=batch_pairs,
        learning_rate=learning_rate,
        warmup_share=0.0,
        min_learning_rate_share=1.0,
        micro_batch_tokens=micro_batch_tokens,
        activation_checkpointing=activation_checkpointing,
        checkpoint_steps=10**9,
    )
    job = make_job(directory, examples, settings, steps=rounds + 2, seed=seed)
    reason = missing() if peer else "left out with --no-peer"
    settings_to_try = [] if reason else candidates(batch_pairs)
    if peer_batch is not None and not reason:
        settings_to_try = [PeerSetting(peer_batch)]
    record = {
        "model": directory.name,
        "pairs": pairs,
        "batch_pairs": batch_pairs,
        "settings": asdict(settings),
        **measure_all(job, settings_to_try, rounds=rounds, profile=profile),
        "peer_reason": reason,
        **environment(*NEEDED),
    }
    write_json(json, record)
    print_table(record)
    check_agreement(record["deviations"])


def measure_all(
    job: Job, peer_settings: Sequence[PeerSetting], *, rounds: int, profile: bool = False
) -> dict[str, Any]:
    """The oracle, the peer's best setting, then both sides in turns."""
    with Side("the oracle", serve_oracle, job) as side:
        oracle = side.ask(str(CHECKED_STEPS))["steps"]
    exact = with_dtype(job, "float32")
    with Side("ours in fp32", serve_ours, exact) as side:
        fp32 = [side.ask("step") for _ in range(CHECKED_STEPS)]
    off = {"fp32": deviations(fp32, oracle)}
    tell(f"ours in fp32 against the oracle: {worst(off['fp32']):.1e} off at most")
    check_agreement(off)
    tried = [try_peer(job, setting) for setting in peer_settings] if len(peer_settings) > 1 else []
    steps = 1 + rounds
    with Side("ours", serve_ours, with_dtype(job, "bfloat16")) as ours:
        mine, theirs = [ours.ask("step")], []
        if peer_settings:
            with Side("TRL", serve_peer, job, fastest(peer_settings, tried), steps) as side:
                theirs.append(side.ask("step"))
                for turn in range(rounds):
                    mine.append(ours.ask("step"))
                    theirs.append(side.ask("step"))
                    tell(
                        f"round {turn + 1}: ours {mine[-1]['seconds']:.1f} s, TRL {theirs[-1]['seconds']:.1f} s"
                    )
                peer_setting: Figures | None = side.started
        else:
            mine += [ours.ask("step") for _ in range(rounds)]
            peer_setting = None
        implementation = ours.started["implementation"]
        if profile:
            tell(f"\none more step, with the profiler's own cost:\n{ours.ask('profile')['profile']}")
    off["bf16"] = deviations(mine[:CHECKED_STEPS], oracle)
    if theirs:
        off["peer"] = deviations(theirs[:CHECKED_STEPS], oracle)
    return {
        **summary(mine, theirs, job.settings.batch_pairs, ours.started["no_mfu"]),
        "oracle": oracle,
        "deviations": off,
        "implementation": implementation,
        "peer_setting": peer_setting,
        "peer_tried": tried,
    }


def with_dtype(job: Job, dtype: str) -> Job:
    return replace(job, settings=replace(job.settings, compute_dtype=dtype))


def try_peer(job: Job, setting: PeerSetting) -> Figures:
    """Seconds of the second step with a setting, on a smaller global batch; the first, which warms up and makes the
    optimizer's state, is not timed."""
    batch = min(TRIED_PAIRS, job.settings.batch_pairs)
    small = replace(
        job, order=replace(job.order, batch=batch), settings=replace(job.settings, batch_pairs=batch)
    )
    with Side("TRL", serve_peer, small, setting, 2) as side:
        side.ask("step")
        found = {**asdict(setting), "seconds": side.ask("step")["seconds"]}
    tell(f"TRL, {asdict(setting)}: {found['seconds']:.1f} s a step")
    return found


def fastest(settings: Sequence[PeerSetting], tried: Sequence[Figures]) -> PeerSetting:
    if not tried:
        return settings[0]
    return min(zip(settings, tried, strict=True), key=lambda pair: pair[1]["seconds"])[0]


def summary(
    mine: Sequence[Figures], theirs: Sequence[Figures], batch_pairs: int, no_mfu: str
) -> dict[str, Any]:
    """The figures of the record; the first step of both sides counts for the peak alone. Tokens are those of the
    timed steps. no_mfu: why there is no MFU, where there is none."""
    rates = {
        name: statistics.median(step[name] for step in mine[1:]) if name in mine[-1] else None
        for name in ("tflops", "recomputed_tflops", "mfu")
    }
    rate = batch_pairs / statistics.median(step["seconds"] for step in mine[1:])
    peer_rate = batch_pairs / statistics.median(step["seconds"] for step in theirs[1:]) if theirs else None
    return {
        "pairs_per_s": rate,
        "peer_pairs_per_s": peer_rate,
        "ratio": rate / peer_rate if peer_rate else None,
        "peak_bytes": mine[-1]["peak_bytes"],
        "peer_peak_bytes": theirs[-1]["peak_bytes"] if theirs else None,
        "peak_whole_bytes": mine[-1]["peak_whole_bytes"],
        "peer_peak_whole_bytes": theirs[-1]["peak_whole_bytes"] if theirs else None,
        "peak_is": "VmHWM of the side's process; peak_bytes less its VmRSS before the first step",
        "tokens_computed": int(sum(step["tokens"] for step in mine[1:])),
        "tokens_unshared": int(sum(step["unshared_tokens"] for step in mine[1:])),
        "peer_tokens_computed": int(sum(step["tokens"] for step in theirs[1:])) if theirs else None,
        **rates,
        "mfu_reason": no_mfu if rates["mfu"] is None else None,
        "rounds": [step_figures(step) for step in mine],
        "peer_rounds": [step_figures(step) for step in theirs],
    }


def step_figures(step: Figures) -> Figures:
    names = (
        "seconds",
        "loss",
        "grad_norm",
        "tokens",
        "unshared_tokens",
        "tflops",
        "peak_bytes",
        "peak_whole_bytes",
    )
    return {name: step[name] for name in names if name in step}


def check_agreement(off: dict[str, list[Figures]]) -> None:
    """
    Raises:
        Disagrees: ours is further from the oracle than it may be.
    """
    for dtype, limit in LIMITS.items():
        if dtype in off and worst(off[dtype]) > limit:
            raise Disagrees(
                f"ours in {dtype} is {worst(off[dtype]):.2e} from the oracle, more than {limit:.0e}: {off[dtype]}"
            )


def print_table(record: dict[str, Any]) -> None:
    table = Table("", "pairs/s", "peak GB", "of the process", "tokens", "off from the oracle")
    computed = record["tokens_computed"]
    for side, prefix, off in (("ours", "", "bf16"), ("TRL", "peer_", "peer")):
        if record[f"{prefix}pairs_per_s"] is None:
            continue
        peaks = (record[f"{prefix}peak_bytes"], record[f"{prefix}peak_whole_bytes"])
        table.add_row(
            side,
            f"{record[f'{prefix}pairs_per_s']:.3f}",
            *("-" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks),
            f"{record[f'{prefix}tokens_computed']} ({record[f'{prefix}tokens_computed'] / computed:.2f}x)",
            f"{worst(record['deviations'][off]):.1e}",
        )
    console = Console(width=110)
    console.print(table)
    if record["ratio"] is not None:
        console.print(f"ratio {record['ratio']:.2f}; TRL: {record['peer_setting']}", highlight=False)
    else:
        console.print(f"TRL: {record['peer_reason']}", highlight=False)
    ops = ", ".join(f"{op}: {name}" for op, name in record["implementation"].items())
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    console.print(f"ours: {ops}\n{machine}", highlight=False)


def tell(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        tyro.cli(benchmark, prog="python -m bench.dpo_step", args=arguments)
    except (UserError, Disagrees) as error:
        fail(str(error))


if __name__ == "__main__":
    main()
