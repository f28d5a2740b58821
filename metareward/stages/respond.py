"""Stage 1: the actor writes K responses to every prompt of the iteration (section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable

from metareward.config import Recipe
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.roles.actor import actor_messages
from metareward.run import ranks
from metareward.run.inputs import draw_prompts, read_prompts
from metareward.run.jsonl import Line, read_jsonl, write_jsonl
from metareward.sampler.request import Completion
from metareward.stages.context import Context
from metareward.stages.sampling import Job, is_sampled, sample_stage, sampling_params


def choose_prompts(context: Context, iteration: int) -> None:
    """prompts.jsonl: what this iteration answers, fixed here so that later edits of the pool cannot mix two sets."""
    final = context.files(iteration).prompts

    def write() -> None:
        if final.is_file():
            return
        recipe = context.recipe
        pool = read_prompts(recipe.prompts.file)
        drawn = draw_prompts(pool, recipe.prompts.per_iteration, iteration, recipe.random_seed)
        final.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(final, ({"prompt_id": item.prompt_id, "prompt": item.prompt} for item in drawn))

    ranks.on_first(write)


def respond(context: Context, iteration: int) -> None:
    """prompts.jsonl -> responses.jsonl.

    A response equal to an earlier one of its prompt keeps its line, with `duplicate_of`, and is not judged.

    Raises:
        UserError: a prompt does not fit the model's context, before anything is sampled.
    """
    files, settings = context.files(iteration), context.recipe.respond
    if is_sampled(files.responses):
        return
    context.spans.mark("data")
    choose_prompts(context, iteration)
    policy = context.policy(iteration)
    lines = ((line["prompt_id"], line["prompt"]) for line in read_jsonl(files.prompts))
    rendered = render_prompts(context.chat(policy), lines, context.max_context(policy), context.recipe)
    jobs = [
        Job({"prompt_id": prompt_id, "response_id": index}, prompt)
        for prompt_id, prompt in rendered.items()
        for index in range(settings.samples)
    ]
    sample_stage(
        context,
        stage="respond",
        iteration=iteration,
        policy=policy,
        jobs=jobs,
        params=sampling_params(settings),
        final=files.responses,
        body=response_line,
        finish=mark_duplicates,
    )


def render_prompts(
    chat: Chat, prompts: Iterable[tuple[str, str]], max_context: int, recipe: Recipe
) -> dict[str, tuple[int, ...]]:
    """prompt_id -> token ids.

    Raises:
        UserError: a prompt does not fit the model's context beside its response.
    """
    limit = max_context - recipe.respond.max_new_tokens
    rendered: dict[str, tuple[int, ...]] = {}
    for prompt_id, text in prompts:
        prompt = tuple(chat.render(actor_messages(text)))
        if len(prompt) > limit:
            raise UserError(
                f'the prompt "{prompt_id}" has {len(prompt)} tokens and at most {limit} fit beside respond.max_new_tokens = '
                f"{recipe.respond.max_new_tokens}: shorten or remove it in {recipe.prompts.file}, or lower "
                f"respond.max_new_tokens, then start a new run"
            )
        rendered[prompt_id] = prompt
    return rendered


def response_line(job: Job, text: str, completion: Completion) -> Line:
    return {"text": text, "token_ids": completion.token_ids, "finished": completion.finished}


def mark_duplicates(lines: list[Line]) -> list[Line]:
    """Adds `duplicate_of`: the first response of the same prompt with the same text, or None."""
    first: dict[tuple[str, str], int] = {}
    marked = []
    for line in lines:
        original = first.setdefault((line["prompt_id"], line["text"]), line["response_id"])
        marked.append({**line, "duplicate_of": None if original == line["response_id"] else original})
    return marked
