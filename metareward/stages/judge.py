"""Stage 2: the judge scores every response N times (section 2.1, the judge prompt of figure 2 in our own words)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from metareward.roles.judge import judge_messages, parse_score
from metareward.roles.templates import load_template
from metareward.run.jsonl import Line, read_jsonl
from metareward.sampler.request import Completion
from metareward.stages.context import Context
from metareward.stages.sampling import Job, is_sampled, sample_stage, sampling_params


def usable(responses: Iterable[Line]) -> list[Line]:
    """Responses that may enter a pair: finished and not a duplicate. The others are not judged."""
    return [line for line in responses if line["finished"] and line["duplicate_of"] is None]


def judge_template(context: Context) -> str:
    path = context.recipe.judge.template
    return load_template("judge", Path(path) if path else None)


def judge(context: Context, iteration: int) -> None:
    """responses.jsonl -> judgments.jsonl. A judge prompt that does not fit the context is left out and counted."""
    files, settings = context.files(iteration), context.recipe.judge
    if is_sampled(files.judgments):
        return
    context.spans.mark("data")
    policy = context.policy(iteration)
    chat, limit = context.chat(policy), context.max_context(policy) - settings.max_new_tokens
    template = judge_template(context)
    instructions = {line["prompt_id"]: line["prompt"] for line in read_jsonl(files.prompts)}
    jobs: list[Job] = []
    too_long = 0
    for line in usable(read_jsonl(files.responses)):
        prompt = tuple(chat.render(judge_messages(template, instructions[line["prompt_id"]], line["text"])))
        if len(prompt) > limit:
            too_long += 1
            continue
        head = {"prompt_id": line["prompt_id"], "response_id": line["response_id"]}
        jobs += [Job({**head, "judgment_id": index}, prompt) for index in range(settings.samples)]
    context.metrics.event("left_out", "judge", iteration, prompts_too_long=too_long)
    sample_stage(
        context,
        stage="judge",
        iteration=iteration,
        policy=policy,
        jobs=jobs,
        params=sampling_params(settings),
        final=files.judgments,
        body=judgment_line,
    )


def judgment_line(job: Job, text: str, completion: Completion) -> Line:
    return {
        "text": text,
        "token_ids": completion.token_ids,
        "finished": completion.finished,
        "score": parse_score(text),
    }
