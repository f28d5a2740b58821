"""What the three sampling stages share: from requests to a complete file, resumable request by request, on any number of ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from metareward_kernels import dispatch

from metareward.run import ranks
from metareward.run.jsonl import Line, PartFile, part_files, read_parts, write_jsonl
from metareward.run.progress import progress_bar
from metareward.sampler.request import Completion, EngineStats, Request, SamplingParams
from metareward.stages.context import Context


@dataclass(frozen=True)
class Job:
    """One completion wanted: the fields that identify its line, and the prompt's token ids."""

    head: dict[str, Any]
    prompt: tuple[int, ...]


def identity(iteration: int, stage: str, head: dict[str, Any]) -> str:
    """The request's name: what its random numbers are keyed by, whatever the order, the batch or the rank."""
    return json.dumps([iteration, stage, *head.values()], ensure_ascii=False)


def is_sampled(final: Path) -> bool:
    """Whether a sampling stage is done; what a kill after its last rename left beside the file is removed. A collective."""

    def look() -> bool:
        done = final.is_file()
        for path in part_files(final) if done else ():
            path.unlink()
        return done

    return ranks.on_first(look)


def sample_stage(
    context: Context,
    *,
    stage: str,
    iteration: int,
    policy: Path,
    jobs: Sequence[Job],
    params: SamplingParams,
    final: Path,
    body: Callable[[Job, str, Completion], Line],
    finish: Callable[[list[Line]], list[Line]] = lambda lines: lines,
) -> None:
    """Complete every job and write `final`, one line a job in the order of `jobs`.

    `body(job, text, completion)` makes the fields after the head; `finish(lines)` sees all lines before they are written. Lines of
    earlier, interrupted starts are kept. A collective.
    """
    began = time.perf_counter()
    heads = [job.head for job in jobs]
    names = list(heads[0]) if heads else []
    done = {identity(iteration, stage, {name: line[name] for name in names}) for line in read_parts(final)}
    # Every rank must have read the parts before any rank appends to them.
    ranks.barrier()
    todo = [job for job in jobs if identity(iteration, stage, job.head) not in done]
    stats = EngineStats()
    if todo:
        mine = share(todo)
        stats = sample(context, stage, iteration, policy, mine, params, final, body, len(todo), len(jobs))
    ranks.barrier()

    def merge() -> None:
        found = {
            identity(iteration, stage, {name: line[name] for name in names}): line
            for line in read_parts(final)
        }
        write_jsonl(final, finish([found[identity(iteration, stage, head)] for head in heads]))
        for path in part_files(final):
            path.unlink()

    ranks.on_first(merge)
    totals = add_stats(ranks.gather(stats))
    seconds = time.perf_counter() - began
    context.metrics.event(
        "stage",
        stage,
        iteration,
        seconds=seconds,
        requests=totals.requests,
        prompt_tokens=totals.prompt_tokens,
        prefill_tokens=totals.prefill_tokens,
        new_tokens=totals.new_tokens,
        tokens_per_s=totals.new_tokens / seconds,
        prefill_seconds=totals.prefill_seconds,
        decode_seconds=totals.decode_seconds,
        sampling_seconds=totals.sampling_seconds,
        host_seconds=totals.host_seconds,
        ranks=ranks.world_size(),
        earlier_requests=len(jobs) - len(todo),
        implementations=dispatch.report(),
    )


def sample(
    context: Context,
    stage: str,
    iteration: int,
    policy: Path,
    jobs: Sequence[Job],
    params: SamplingParams,
    final: Path,
    body: Callable[[Job, str, Completion], Line],
    todo: int,
    total: int,
) -> EngineStats:
    """This rank's jobs through its engine, every finished one appended to its part file at once."""
    engine, chat = context.engine(policy), context.chat(policy)
    by_identity = {identity(iteration, stage, job.head): job for job in jobs}
    requests = (Request(name, job.prompt) for name, job in by_identity.items())
    engine.stats.reset()
    part = PartFile(final, ranks.rank())
    label = f"iteration {iteration}: {stage}"
    shown = ranks.is_first()
    try:
        # The bar counts rank 0's share scaled to all ranks: the others are about as far.
        with progress_bar(label, total, "requests", done=total - todo, shown=shown) as bar:
            for finished, completion in enumerate(engine.generate(requests, params), 1):
                job = by_identity[completion.identity]
                part.append({**job.head, **body(job, chat.decode(completion.token_ids), completion)})
                rate = engine.stats.new_tokens / max(engine.stats.seconds, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tok/s a rank", refresh=False)
                bar.update(round(todo * finished / len(jobs)) - round(todo * (finished - 1) / len(jobs)))
    finally:
        part.close()
    return engine.stats


def share(jobs: Sequence[Job]) -> list[Job]:
    """This rank's jobs: groups with equal prompts go to the ranks in turn, so that a prompt is prefilled on one rank only."""
    groups: Iterator[Iterable[Job]] = (list(group) for _, group in groupby(jobs, key=lambda job: job.prompt))
    return [
        job for turn, group in enumerate(groups) if turn % ranks.world_size() == ranks.rank() for job in group
    ]


def add_stats(all_ranks: Iterable[EngineStats]) -> EngineStats:
    """Counts added up; seconds are those of the slowest rank, since the others wait for it."""
    total = EngineStats()
    for stats in all_ranks:
        for item in fields(EngineStats):
            combine = max if item.name.endswith("seconds") else lambda a, b: a + b
            setattr(total, item.name, combine(getattr(total, item.name), getattr(stats, item.name)))
    return total
