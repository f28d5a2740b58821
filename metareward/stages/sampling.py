"""What the three sampling stages share: from requests to a complete file, resumable request by request, on any number of ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from metareward.config import JudgeSettings, MetaJudgeSettings, RespondSettings
from metareward.run import ranks
from metareward.run.jsonl import Line, PartFile, part_files, read_parts, write_jsonl
from metareward.run.progress import progress_bar
from metareward.sampler.request import Completion, EngineStats, Request, SamplingParams
from metareward.stages.claims import Draws, Job, claim_size, cut_claims, first_draw
from metareward.stages.context import Context
from metareward.stages.logprob_difference import FirstFew, logprob_difference

__all__ = ["Job", "identity", "is_sampled", "sample_stage", "sampling_params"]


@dataclass
class Sampled:
    """What one rank did in one stage; the difference is rank 0's alone."""

    stats: EngineStats = field(default_factory=EngineStats)
    difference: dict[str, float] = field(default_factory=dict)
    implementations: dict[str, str] = field(default_factory=dict)


def sampling_params(settings: RespondSettings | JudgeSettings | MetaJudgeSettings) -> SamplingParams:
    """How a stage's tokens are drawn."""
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_new_tokens=settings.max_new_tokens,
    )


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
    spans = context.spans
    spans.mark("data")
    heads = [job.head for job in jobs]
    names = list(heads[0]) if heads else []
    done = {identity(iteration, stage, {name: line[name] for name in names}) for line in read_parts(final)}
    # Every rank must have read the parts before any rank appends to them.
    ranks.barrier()
    todo = [job for job in jobs if identity(iteration, stage, job.head) not in done]
    sampled = Sampled()
    if todo:
        sampled = sample(context, stage, iteration, policy, todo, params, final, body, len(jobs))
    spans.mark("wait")
    ranks.barrier()
    spans.mark("write")

    def merge() -> None:
        found = {
            identity(iteration, stage, {name: line[name] for name in names}): line
            for line in read_parts(final)
        }
        write_jsonl(final, finish([found[identity(iteration, stage, head)] for head in heads]))
        for path in part_files(final):
            path.unlink()

    ranks.on_first(merge)
    spans.mark("other")
    # The ranks of a group that shares a model do the same work: it counts once.
    sharing = context.recipe.sampler.tensor_parallel
    totals = add_stats(ranks.gather(sampled.stats)[::sharing])
    seconds = time.perf_counter() - began
    context.metrics.event(
        "stage",
        stage,
        iteration,
        seconds=seconds,
        requests=totals.requests,
        prompt_tokens=totals.prompt_tokens,
        prefill_tokens=totals.prefill_tokens,
        reused_tokens=totals.reused_tokens,
        new_tokens=totals.new_tokens,
        steps=totals.steps,
        preemptions=totals.preemptions,
        peak_pages=totals.peak_pages,
        unshared_pages=totals.unshared_pages,
        tokens_per_s=totals.new_tokens / seconds,
        prefill_seconds=totals.prefill_seconds,
        decode_seconds=totals.decode_seconds,
        sampling_seconds=totals.sampling_seconds,
        host_seconds=totals.host_seconds,
        ranks=ranks.world_size(),
        tensor_parallel=sharing,
        earlier_requests=len(jobs) - len(todo),
        implementations=sampled.implementations,
        **sampled.difference,
    )


def sample(
    context: Context,
    stage: str,
    iteration: int,
    policy: Path,
    todo: Sequence[Job],
    params: SamplingParams,
    final: Path,
    body: Callable[[Job, str, Completion], Line],
    total: int,
) -> Sampled:
    """This rank's part of `todo`, drawn as its engine has room; every finished request is appended to its part file at once.

    Ranks that share a model do one part together, in the same steps; the first of them counts and writes for all. On rank 0 it
    returns when all ranks have finished, so that the bar shows all of them.
    """
    spans = context.spans
    spans.mark("load")
    engine, chat = context.engine(policy), context.chat(policy)
    spans.mark("data")
    spans.note(model=engine.decoder.config.hf, dtype=str(engine.runner.dtype).removeprefix("torch."))
    group = engine.decoder.tensor_group
    models = ranks.world_size() // group.size
    draws = Draws(cut_claims(todo, claim_size(len(todo), models)), f"{iteration}/{stage}", group)
    finished = ranks.Counter(f"{iteration}/{stage}/finished")
    most = first_draw(len(todo), models, context.recipe.sampler.max_running)
    first_few = FirstFew()
    jobs: dict[str, Job] = {}

    def request(job: Job) -> Request:
        name = identity(iteration, stage, job.head)
        jobs[name] = job
        return Request(name, job.prompt)

    engine.stats.reset()
    part = PartFile(final, ranks.rank()) if group.is_first else None
    label, shown = f"iteration {iteration}: {stage}", ranks.is_first()
    # With rank 0 all that share its model, because scoring takes all of them.
    scores = ranks.rank() < group.size
    # Loading takes the ranks different times; who came first would draw more than its part.
    spans.mark("wait")
    ranks.barrier()
    try:
        with progress_bar(label, total, "requests", done=total - len(todo), shown=shown) as bar:

            def show(done: int) -> None:
                bar.set_postfix_str(rates(engine.stats, group.size), refresh=False)
                bar.update(total - len(todo) + done - bar.n)

            while draws.left:
                for completion in engine.generate(map(request, draws.jobs(most)), params):
                    spans.mark("write")
                    job = jobs.pop(completion.identity)
                    if scores:
                        first_few.offer(job.prompt, completion)
                    if part is not None:
                        part.append({**job.head, **body(job, chat.decode(completion.token_ids), completion)})
                        show(finished.add(1))
            spans.mark("check")
            difference = logprob_difference(engine.decoder, first_few.kept)
            # Without a bar to move, the barrier that follows is the better place to wait.
            spans.mark("wait")
            while shown and (done := finished.add(0)) < len(todo):
                ranks.check_peers()
                show(done)
                time.sleep(0.1)
            show(len(todo))
    finally:
        if part is not None:
            part.close()
    return Sampled(engine.stats, difference, engine.implementations())


def rates(stats: EngineStats, sharing: int) -> str:
    """What the bar tells beside requests and time left, of this rank (or the `sharing` ranks of its model) in the stage."""
    reused = stats.reused_tokens / max(stats.prompt_tokens, 1)
    unit = "a rank" if sharing == 1 else f"every {sharing} ranks"
    return f"{reused:.0%} of prompts reused, {stats.new_tokens / max(stats.seconds, 1e-9):.0f} tok/s {unit}"


def add_stats(all_ranks: Iterable[EngineStats]) -> EngineStats:
    """Counts added up; seconds are those of the slowest rank, since the others wait for it."""
    total = EngineStats()
    for stats in all_ranks:
        for item in fields(EngineStats):
            combine = max if item.name.endswith("seconds") else lambda a, b: a + b
            setattr(total, item.name, combine(getattr(total, item.name), getattr(stats, item.name)))
    return total
