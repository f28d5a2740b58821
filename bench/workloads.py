"""The sampling workloads of an iteration at a size that a benchmark can run: respond, judge, compare.

Prompts are rendered from real instructions and responses by the templates and the chat template that a run
uses, so lengths and sharing are a run's own. Everything is a pure function of the data files and the
tokenizer. Sampling settings are the recipe's defaults, except that every request gets the same number of new
tokens, with no stop ids: both sides of a comparison then compute exactly as much.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, permutations
from pathlib import Path

from bench.judgments import different_judgments
from metareward.config import JudgeSettings, MetaJudgeSettings, Recipe, RespondSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.roles.actor import actor_messages
from metareward.roles.judge import judge_messages
from metareward.roles.meta_judge import meta_judge_messages
from metareward.roles.templates import load_template
from metareward.run.inputs import read_prompts, read_quality
from metareward.sampler import Request, SamplingParams

QUALITY, PROMPTS = "oasst2_quality.train.jsonl", "vicuna_prompts.jsonl"
# Where a development checkout has its data, beside it.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
JUDGE_TOKENS = (350, 500)
RESPOND_TOKENS = (34, 48)
# Whole responses around the mean length in the data, 190 tokens.
COMPARED_TOKENS = (150, 250)
SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|(?=\n)|\Z)\s*", re.DOTALL)


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are to run: those with a common prefix are neighbours."""

    name: str
    requests: tuple[Request, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Source:
    """What the prompts are made from.

    responses: instruction -> different responses to it, in file order.
    prompts: instructions for the actor, no two alike.
    """

    chat: Chat
    responses: dict[str, list[str]]
    prompts: list[str]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin alike with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unshared_tokens(run: Workload) -> int:
    """Prompt tokens left when every common prefix is counted once: the least that prefill could compute."""
    total, previous = 0, tuple[int, ...]()
    for prompt in sorted({request.prompt for request in run.requests}):
        total += len(prompt) - common_length(previous, prompt)
        previous = prompt
    return total


def read_source(data: Path, chat: Chat) -> Source:
    """Read the data files of a folder.

    Raises:
        UserError: a file is not there.
    """
    for name in (QUALITY, PROMPTS):
        if not (data / name).is_file():
            raise UserError(
                f"the benchmark's data file {name} is not in {data}: give the folder that holds {QUALITY} "
                f"(lines of prompt, response, quality) and {PROMPTS} (lines of prompt) with --data DIR"
            )
    responses: dict[str, list[str]] = {}
    for line in read_quality(str(data / QUALITY)):
        responses.setdefault(line.prompt, []).append(line.response)
    prompts = [line.prompt for line in read_prompts(str(data / PROMPTS))]
    return Source(chat, responses, list(dict.fromkeys([*prompts, *responses])))


def respond(source: Source, *, prompts: int = 64, samples: int = 7, new_tokens: int = 128) -> Workload:
    """`samples` requests for each of so many different short prompts."""
    low, high = RESPOND_TOKENS
    rendered = (tuple(source.chat.render(actor_messages(prompt))) for prompt in source.prompts)
    short = list(dict.fromkeys(prompt for prompt in rendered if low <= len(prompt) <= high))
    named = ((f"p{index}", prompt) for index, prompt in enumerate(short[:prompts]))
    check_enough("respond", len(short), prompts, f"prompts of {low} to {high} tokens")
    return workload("respond", named, samples, Recipe().respond, new_tokens)


def judge(
    source: Source, *, instructions: int = 3, responses: int = 8, samples: int = 11, new_tokens: int = 128
) -> Workload:
    """`samples` judgments of each of `responses` responses to each of `instructions` instructions."""
    template = load_template("judge")

    def render(instruction: str, response: str) -> tuple[int, ...]:
        return tuple(source.chat.render(judge_messages(template, instruction, response)))

    found: list[list[tuple[int, ...]]] = []
    for instruction, texts in source.responses.items():
        # A long instruction would leave a response no room worth reading.
        if len(found) < instructions and len(render(instruction, "")) <= 0.9 * JUDGE_TOKENS[0]:
            prompts = list(islice(excerpts(texts, partial(render, instruction)), responses))
            found += [prompts] if len(prompts) == responses else []
    check_enough("judge", len(found), instructions, f"instructions with text for {responses} responses")
    named = ((f"i{i}/r{r}", prompt) for i, prompts in enumerate(found) for r, prompt in enumerate(prompts))
    return workload("judge", named, samples, Recipe().judge, new_tokens)


def excerpts(texts: list[str], render: Callable[[str], tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Different prompts of JUDGE_TOKENS tokens, each `render` of a run of whole sentences from one of the texts;
    one of each text comes before the second of any."""
    low, high = JUDGE_TOKENS
    # The least lengths asked for are spread over the window: judged responses are not all equally long.
    least = cycle(range(low, high - 30, 37))
    waiting = list(texts)
    seen: set[tuple[int, ...]] = set()
    while waiting:
        rests = []
        for text in waiting:
            wanted, end = next(least), 0
            prompt: tuple[int, ...] = ()
            for sentence in SENTENCE.finditer(text):
                end = sentence.end()
                prompt = render(text[:end].strip())
                if len(prompt) >= wanted:
                    break
            if low <= len(prompt) <= high and prompt not in seen:
                seen.add(prompt)
                yield prompt
            rests += [text[end:]] if text[end:].strip() else []
        waiting = rests


def compare(source: Source, *, responses: int = 6, judgments: int = 11, new_tokens: int = 64) -> Workload:
    """For one response to each of `responses` instructions, every ordered pair of its `judgments` judgments."""
    chat, template = source.chat, load_template("meta_judge")
    low, high = COMPARED_TOKENS
    # One token of a completion ends the turn. An instruction longer than its response carries a text of its own.
    fitting = (
        (instruction, text)
        for instruction, texts in source.responses.items()
        for text in texts[:1]
        if low <= len(chat.encode_completion(text)) - 1 <= high and len(text) > len(instruction)
    )
    chosen = list(islice(fitting, responses))
    check_enough("compare", len(chosen), responses, f"first responses of {low} to {high} tokens")

    def named() -> Iterator[tuple[str, tuple[int, ...]]]:
        for index, (instruction, response) in enumerate(chosen):
            texts = different_judgments(response, judgments, chat)
            for (a, first), (b, second) in permutations(enumerate(texts), 2):
                messages = meta_judge_messages(template, instruction, response, first, second)
                yield f"r{index}/{a}-{b}", tuple(chat.render(messages))

    return workload("compare", named(), 1, Recipe().meta_judge, new_tokens)


def check_enough(name: str, found: int, wanted: int, what: str, setting: str = "--scale") -> None:
    if found < wanted:
        raise UserError(
            f"the workload {name} needs {wanted} {what} and the data has {found}: lower {setting} or give "
            "more data with --data DIR"
        )


def workload(
    name: str,
    prompts: Iterable[tuple[str, tuple[int, ...]]],
    samples: int,
    settings: RespondSettings | JudgeSettings | MetaJudgeSettings,
    new_tokens: int,
) -> Workload:
    """Every prompt `samples` times, ordered by its tokens as the stages order theirs."""
    ordered = sorted(prompts, key=lambda item: item[1])
    requests = tuple(
        Request(f"{name}/{identity}/{sample}", prompt)
        for identity, prompt in ordered
        for sample in range(samples)
    )
    params = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=new_tokens,
    )
    return Workload(name, requests, params)
