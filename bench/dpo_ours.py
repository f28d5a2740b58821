"""Our side of the DPO benchmark: `metareward.training.trainer.train`, one step at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

import torch
from metareward_kernels import dispatch
from metareward_kernels.head_chunk import runs_compiled

from bench.dpo_job import Job
from bench.dpo_oracle import oracle_steps
from bench.sides import peak_since, reply, start_peak, wait_for_device
from metareward.model.data_sheets import no_mfu
from metareward.model.decoder import Decoder
from metareward.run import ranks
from metareward.training.head_weight import head_weight
from metareward.training.objectives import pair_objective
from metareward.training.sharded import load_sharded, reshard
from metareward.training.trainer import TrainingSet, logprobs_of, train

ROWS = 30


class Enough(Exception):
    """No further step is wanted."""


def implementations(decoder: Decoder) -> dict[str, str]:
    """What the ops of a step run with, for the decoder's weights in their compute dtype."""
    weight = head_weight(decoder)
    compiled = runs_compiled(weight)
    reshard(decoder)
    # Without the compiled kernel `linear_preference` is PyTorch's products around `head_rows`.
    head = (
        "cpp" if compiled else f"torch, head_rows: {dispatch.implementation('head_rows', weight.device.type)}"
    )
    attention = dispatch.implementation("segment_attention", weight.device.type)
    return {"linear_preference": head, "segment_attention": attention}


def serve_oracle(connection: Connection, job: Job) -> None:
    reply(connection, {})
    while (command := connection.recv()) != "stop":
        reply(connection, {"steps": oracle_steps(job, int(command))})


def serve_ours(connection: Connection, job: Job, device_type: str = "cpu") -> None:
    """A "step" is one of the trainer's own; "profile" is one under torch.profiler, with its table.

    The trainer runs through; the callback it calls after every step waits until the next is asked for. `whole_seconds` are
    those from the command to the end of all the step's work, on a GPU too.
    """
    device = torch.device(device_type)
    ranks.start_ranks()
    decoder = load_sharded(job.model, job.settings, device, ranks.world_size())
    data = TrainingSet(job.examples, job.order, job.settings.micro_batch_tokens)
    reference = {
        identity: (values[0], values[1])
        for identity, values in logprobs_of(decoder, data, device, lambda done: None).items()
    }
    reply(
        connection,
        {"implementation": implementations(decoder), "no_mfu": no_mfu(device, job.settings.compute_dtype)},
    )
    profiler: torch.profiler.profile | None = None
    before: int | None = None
    began = 0.0

    def await_command() -> None:
        nonlocal profiler, began
        command = connection.recv()
        began = perf_counter()
        if command == "stop":
            raise Enough
        if command == "profile":
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            profiler.start()

    def on_step(step: int, steps: int, figures: Mapping[str, float]) -> None:
        nonlocal profiler
        wait_for_device(device_type)
        seconds = perf_counter() - began
        table = None
        if profiler is not None:
            profiler.stop()
            table = profiler.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=60
            )
            profiler = None
        peaks = peak_since(before, device_type)
        reply(connection, {**figures, "whole_seconds": seconds, **peaks, "profile": table})
        await_command()

    with tempfile.TemporaryDirectory() as folder:
        try:
            before = start_peak(device_type)
            await_command()
            objective = pair_objective(job.settings, reference)
            train(decoder, data, objective, job.settings, Path(folder), device, on_step)
        except Enough:
            pass
        finally:
            ranks.stop_ranks()
