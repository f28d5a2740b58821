"""Stage 4, first half: the meta-judge compares judgments of one response a prompt, in both orders (section 2.2)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from metareward_kernels import request_key

from metareward.preference.comparisons import comparison_orders
from metareward.preference.variance import most_varied
from metareward.roles.meta_judge import meta_judge_messages, parse_winner
from metareward.roles.templates import load_template
from metareward.run.jsonl import Line, read_jsonl
from metareward.sampler.request import Completion
from metareward.stages.context import Context
from metareward.stages.sampling import Job, is_sampled, sample_stage, sampling_params

Judgments = dict[str, dict[int, dict[int, Line]]]
"""prompt_id -> response_id -> judgment_id -> line"""


def comparable(judgments: list[Line]) -> Judgments:
    """Judgments that may enter a pair: finished, with a readable score."""
    found: Judgments = defaultdict(lambda: defaultdict(dict))
    for line in judgments:
        if line["finished"] and line["score"] is not None:
            found[line["prompt_id"]][line["response_id"]][line["judgment_id"]] = line
    return found


def choose_response(
    by_response: dict[int, dict[int, Line]], seed: int, iteration: int, prompt_id: str
) -> int | None:
    """The response whose judgments' scores vary most; ties by a draw that depends on nothing but the arguments."""
    scores = {response: [line["score"] for line in lines.values()] for response, lines in by_response.items()}
    key = request_key(seed, f"most varied/{iteration}/{prompt_id}")
    draw = np.random.default_rng(key % 2**64).random()
    return most_varied(scores, draw)


def compare(context: Context, iteration: int) -> None:
    """judgments.jsonl -> comparisons.jsonl. A meta-judge prompt that does not fit the context is left out and counted."""
    files, recipe = context.files(iteration), context.recipe
    settings = recipe.meta_judge
    if is_sampled(files.comparisons):
        return
    context.spans.mark("data")
    policy = context.policy(iteration)
    chat, limit = context.chat(policy), context.max_context(policy) - settings.max_new_tokens
    template = load_template("meta_judge", Path(settings.template) if settings.template else None)
    instructions = {line["prompt_id"]: line["prompt"] for line in read_jsonl(files.prompts)}
    responses = {
        (line["prompt_id"], line["response_id"]): line["text"] for line in read_jsonl(files.responses)
    }
    judgments = comparable(read_jsonl(files.judgments))
    jobs: list[Job] = []
    too_long = 0
    for prompt_id, instruction in instructions.items():
        response_id = choose_response(judgments[prompt_id], recipe.random_seed, iteration, prompt_id)
        if response_id is None:
            continue
        lines = judgments[prompt_id][response_id]
        scores = {name: line["score"] for name, line in lines.items()} if settings.skip_equal_scores else None
        for first, second in comparison_orders(list(lines), skip_equal_scores=scores):
            messages = meta_judge_messages(
                template,
                instruction,
                responses[prompt_id, response_id],
                lines[first]["text"],
                lines[second]["text"],
                hide_scores=settings.hide_scores,
            )
            prompt = tuple(chat.render(messages))
            if len(prompt) > limit:
                too_long += 1
                continue
            jobs.append(
                Job(
                    {"prompt_id": prompt_id, "response_id": response_id, "first": first, "second": second},
                    prompt,
                )
            )
    context.metrics.event("left_out", "compare", iteration, prompts_too_long=too_long)
    sample_stage(
        context,
        stage="compare",
        iteration=iteration,
        policy=policy,
        jobs=jobs,
        params=sampling_params(settings),
        final=files.comparisons,
        body=comparison_line,
    )


def comparison_line(job: Job, text: str, completion: Completion) -> Line:
    return {"text": text, "finished": completion.finished, "winner": parse_winner(text)}
