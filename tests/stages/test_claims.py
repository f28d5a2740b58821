"""Claims cover every job once, keep what shares a prompt together, and ranks that draw them miss and double none."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from metareward.stages.claims import (
    LARGEST_GROUP,
    Draws,
    Job,
    claim_size,
    cut_claims,
    first_draw,
    related,
)

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


def jobs_of(prompt_list: list[tuple[int, ...]]) -> list[Job]:
    return [Job({"index": index}, prompt) for index, prompt in enumerate(prompt_list)]


@given(st.lists(prompts, max_size=60), st.integers(1, 20))
def test_claims_are_the_jobs_in_the_stable_order_of_their_prompts(
    listed: list[tuple[int, ...]], size: int
) -> None:
    jobs = jobs_of(listed)
    claims = cut_claims(jobs, size)
    flat = [job for claim in claims for job in claim]
    assert flat == sorted(jobs, key=lambda job: (job.prompt, job.head["index"]))
    for claim in claims:
        assert 1 <= len(claim) <= size or (
            len(claim) <= LARGEST_GROUP and len({job.prompt for job in claim}) == 1
        )
        assert all(related(left.prompt, right.prompt) for left, right in pairwise(claim))


def test_the_samples_of_a_prompt_stay_together_whatever_the_size() -> None:
    jobs = jobs_of([(prompt, 7, 7) for _ in range(11) for prompt in range(5)])
    for size in (1, 10, 16, 60):
        for prompt in range(5):
            holding = [
                claim
                for claim in cut_claims(jobs, size)
                if any(job.prompt == (prompt, 7, 7) for job in claim)
            ]
            assert len(holding) == 1


def test_a_single_prompt_with_many_samples_still_reaches_all_ranks() -> None:
    claims = cut_claims(jobs_of([(1, 2, 3)] * 1000), claim_size(1000, 4))
    assert len(claims) >= 4 * 4


def test_the_comparisons_of_a_response_share_a_few_claims() -> None:
    # 110 prompts that begin alike, in order of their first judgment, for each of 6 responses.
    prompt_list = [
        (0, *[response] * 50, *[first] * 20, *[second] * 20)
        for response in range(6)
        for first in range(11)
        for second in range(11)
        if first != second
    ]
    claims = cut_claims(jobs_of(prompt_list), claim_size(len(prompt_list), 2))
    assert all(len({job.prompt[1] for job in claim}) == 1 for claim in claims)
    assert 2 * 4 <= len(claims) <= 24


def test_a_stage_that_fits_at_once_is_divided_evenly_and_a_longer_one_by_room() -> None:
    assert first_draw(100, 4, 64) == 25
    assert first_draw(10, 4, 64) == 3
    assert first_draw(1000, 4, 64) == math.inf
    assert first_draw(100, 1, 64) == math.inf


@given(st.lists(prompts, max_size=40), st.lists(st.integers(0, 2), max_size=80), st.integers(1, 9))
def test_ranks_that_draw_in_any_order_do_every_job_once(
    listed: list[tuple[int, ...]], turns: list[int], most: int
) -> None:
    jobs = jobs_of(listed)
    claims = cut_claims(jobs, 4)
    ranks = [Draws(claims, "test") for _ in range(3)]
    for draws in ranks[1:]:
        draws.counter = ranks[0].counter
    open_draws = [draws.jobs(most) for draws in ranks]
    done: list[Job] = []

    def step(rank: int) -> None:
        job = next(open_draws[rank], None)
        if job is not None:
            done.append(job)
        elif ranks[rank].left:
            open_draws[rank] = ranks[rank].jobs(most)

    for rank in turns:
        step(rank)
    for rank in range(3):
        while ranks[rank].left:
            step(rank)
        done.extend(open_draws[rank])
    assert sorted(job.head["index"] for job in done) == list(range(len(jobs)))
