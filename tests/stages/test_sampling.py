"""A sampling stage in this process: one complete file in the order of the jobs, resumable, with its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metareward.config import LoggingSettings, Recipe
from metareward.errors import UserError
from metareward.recipe_files import load_recipe
from metareward.run import ranks
from metareward.run.directory import RunDirectory
from metareward.run.jsonl import Line, PartFile, read_jsonl
from metareward.run.metrics import Metrics, read_metrics
from metareward.run.summary import logprob_figures
from metareward.sampler.request import Completion
from metareward.stages.context import Context
from metareward.stages.sampling import Job, sample_stage, sampling_params

SAMPLES = 3


@pytest.fixture
def recipe(tiny_world: Path) -> Recipe:
    return load_recipe(tiny_world / "recipe.toml")


def run_stage(root: Path, recipe: Recipe, jobs: list[Job], new_tokens: int = 12) -> tuple[Path, Any]:
    """Sample the jobs into `root`; returns the file and the stage's event."""
    context = Context(RunDirectory(root), recipe, Metrics(root, LoggingSettings(), active=True))
    final = root / "responses.jsonl"

    def body(job: Job, text: str, completion: Completion) -> Line:
        return {"token_ids": completion.token_ids, "finished": completion.finished}

    sample_stage(
        context,
        stage="respond",
        iteration=1,
        policy=Path(recipe.model.name),
        jobs=jobs,
        params=sampling_params(replace(recipe.respond, max_new_tokens=new_tokens)),
        final=final,
        body=body,
    )
    return final, read_metrics(root)[-1]


@pytest.fixture
def jobs() -> list[Job]:
    """Prompts in an order that is not that of their tokens, some of which begin alike."""
    prompts = [(9, *range(20, 60)), (5, 6, 7), (9, *range(20, 61)), (5, 6), (0, *range(30, 70))]
    return [
        Job({"prompt_id": f"p{index}", "response_id": sample}, prompt)
        for index, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]


def test_the_file_is_in_the_order_of_the_jobs_and_the_event_counts(
    tmp_path: Path, recipe: Recipe, jobs: list[Job]
) -> None:
    final, event = run_stage(tmp_path, recipe, jobs)
    lines = read_jsonl(final)
    assert [{name: line[name] for name in job.head} for job, line in zip(jobs, lines, strict=True)] == [
        job.head for job in jobs
    ]
    assert (event["requests"], event["earlier_requests"]) == (len(jobs), 0)
    assert event["prompt_tokens"] == sum(len(job.prompt) for job in jobs)
    # A prompt is computed once for all its samples.
    assert event["prefill_tokens"] <= event["prompt_tokens"] / SAMPLES
    assert event["reused_tokens"] == event["prompt_tokens"] - event["prefill_tokens"]
    assert event["new_tokens"] == sum(len(line["token_ids"]) for line in lines)
    assert not list(tmp_path.glob("*.part-*"))


def test_what_an_earlier_start_finished_is_kept_and_the_rest_does_not_change(
    tmp_path: Path, recipe: Recipe, jobs: list[Job]
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    first, _ = run_stage(whole, recipe, jobs)
    # Two ranks of an earlier start, of which one was killed in the middle of a line.
    lines = read_jsonl(first)
    for rank, kept in ((0, lines[4:6]), (3, lines[9:10])):
        part = PartFile(again / "responses.jsonl", rank)
        for line in kept:
            part.append(line)
        part.close()
    with (again / "responses.jsonl.part-3").open("a") as file:
        file.write('{"prompt_id": "p0", "resp')
    final, event = run_stage(again, recipe, jobs)
    assert (event["earlier_requests"], event["requests"]) == (3, len(jobs) - 3)
    assert final.read_bytes() == first.read_bytes()


def test_more_ranks_than_one_draw_from_one_counter(
    tmp_path: Path, recipe: Recipe, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of two, of which rank 0 has drawn the first two claims: this rank does the others and nothing else."""
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    real = ranks.Counter

    class Shared(real):  # type: ignore[misc, valid-type]
        def __init__(self, name: str) -> None:
            super().__init__(name)
            if name.endswith("claims"):
                self.add(2)

    monkeypatch.setattr("metareward.stages.claims.Counter", Shared)
    # What rank 0 draws, first in the order of the tokens, is in its part already when rank 0 puts the file together.
    first = sorted(jobs, key=lambda job: job.prompt)[: 2 * SAMPLES]

    def as_rank_0(action: Any) -> Any:
        part = PartFile(tmp_path / "responses.jsonl", 0)
        for job in first:
            part.append({**job.head, "token_ids": [1], "finished": True})
        part.close()
        return action()

    monkeypatch.setattr(ranks, "on_first", as_rank_0)
    final, event = run_stage(tmp_path, recipe, jobs)
    assert event["requests"] == len(jobs) - len(first)
    assert len(read_jsonl(final)) == len(jobs)


def test_the_difference_of_sampler_and_trainer_is_reported(
    tmp_path: Path, recipe: Recipe, finishing_jobs: list[Job]
) -> None:
    _, event = run_stage(tmp_path, recipe, finishing_jobs, new_tokens=200)
    # A model of random weights stops somewhere within 200 tokens in some of many samples.
    assert event["logprob_difference_tokens"] > 20
    assert 0 < event["logprob_difference_mean"] <= 1e-4
    assert event["logprob_difference_mean"] <= event["logprob_difference_max"] <= 1e-3
    (shown,) = logprob_figures([event], 1).values()
    assert f"{event['logprob_difference_mean']:.2g} mean" in shown


@pytest.fixture
def finishing_jobs() -> list[Job]:
    return [
        Job({"prompt_id": f"p{index}", "response_id": sample}, (0, *range(20 + index, 60)))
        for index in range(4)
        for sample in range(12)
    ]


def test_nothing_to_do_makes_an_empty_file(tmp_path: Path, recipe: Recipe) -> None:
    final, event = run_stage(tmp_path, recipe, [])
    assert read_jsonl(final) == []
    assert event["requests"] == 0
    assert "logprob_difference_mean" not in event


def test_a_bad_request_is_said_and_what_was_finished_stays(
    tmp_path: Path, recipe: Recipe, jobs: list[Job]
) -> None:
    jobs.append(Job({"prompt_id": "bad", "response_id": 0}, (10**6,)))
    with pytest.raises(UserError, match="bad"):
        run_stage(tmp_path, recipe, jobs)
    assert not (tmp_path / "responses.jsonl").exists()
