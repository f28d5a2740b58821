"""Has a model judge responses, and compare its own judgments; the figures are `judge.figures_of`'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from metareward.assessment.comparison_bias import Comparison
from metareward.assessment.expected_score import expected_scores, score_cue, score_place
from metareward.assessment.interval import Resampling
from metareward.assessment.judge_data import Judged
from metareward.assessment.models import LoadedModel
from metareward.preference.bias import ScoredVerdict
from metareward.roles.judge import judge_messages, parse_score
from metareward.roles.meta_judge import meta_judge_messages, parse_winner
from metareward.run import ranks
from metareward.run.progress import progress_bar
from metareward.sampler.request import SamplingParams


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge is assessed: `samples` judgments a response, then `comparisons` pairs of its judgments, each in both orders."""

    samples: int
    seed: int
    judging: SamplingParams
    judge_template: str
    comparisons: int
    comparing: SamplingParams
    meta_judge_template: str
    hide_scores: bool
    resampling: Resampling


@dataclass(frozen=True)
class Judgment:
    """One sampled judgment; `expected` is the expected score at its place of the score."""

    sample: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    score: float | None
    expected: float


@dataclass(frozen=True)
class JudgedResponse:
    """A response with its judgments; `judgments` is None where the judge's prompt did not fit the context."""

    response: Judged
    judgments: list[Judgment] | None

    @property
    def sampled_mean(self) -> float | None:
        """Mean of the readable scores, as a run scores a response (section 2.1)."""
        return mean([item.score for item in self.judgments or [] if item.score is not None])

    @property
    def expected_mean(self) -> float | None:
        return mean([item.expected for item in self.judgments or []])


def judge_responses(
    model: LoadedModel, responses: Sequence[Judged], options: JudgeOptions
) -> list[JudgedResponse]:
    """Sample `options.samples` judgments of every response whose prompt fits; in the order of `responses`."""
    room = model.max_context - options.judging.max_new_tokens
    rendered: dict[int, tuple[int, ...]] = {}
    for index, item in enumerate(responses):
        prompt = tuple(model.chat.render(judge_messages(options.judge_template, item.prompt, item.response)))
        if len(prompt) <= room:
            rendered[index] = prompt
    names = {
        (index, sample): identity(responses[index], sample)
        for index in rendered
        for sample in range(options.samples)
    }
    completions = model.complete(
        {name: rendered[index] for (index, _), name in names.items()},
        options.judging,
        f"{model.subject.name}: judge",
        "judgments",
    )
    cue = score_cue(model.chat)
    found: list[JudgedResponse] = []
    with progress_bar(f"{model.subject.name}: expected score", len(responses), "responses") as bar:
        for index, item in enumerate(responses):
            bar.update()
            if index not in rendered:
                found.append(JudgedResponse(item, None))
                continue
            sampled = [completions[names[index, sample]] for sample in range(options.samples)]
            texts = [model.chat.decode(completion.token_ids) for completion in sampled]
            places = [
                score_place(model.chat, cue, text, completion.token_ids)
                for text, completion in zip(texts, sampled, strict=True)
            ]
            expected = expected_scores(model.engine.decoder, rendered[index], places, ranks.device())
            found.append(
                JudgedResponse(
                    item,
                    [
                        Judgment(
                            sample,
                            texts[sample],
                            tuple(sampled[sample].token_ids),
                            sampled[sample].finished,
                            parse_score(texts[sample]),
                            expected[sample],
                        )
                        for sample in range(options.samples)
                    ],
                )
            )
    return found


def identity(response: Judged, *rest: int | str) -> str:
    """What a request's random numbers are keyed by."""
    head = ["assess judge", response.source, response.prompt_id, response.response_id]
    return json.dumps([*head, *rest], ensure_ascii=False)


@dataclass(frozen=True)
class JudgmentPair:
    """Two judgments of one response, each finished and with a score, as a run compares them (section 2.2)."""

    judged: JudgedResponse
    one: Judgment
    two: Judgment


def draw_pairs(judged: Sequence[JudgedResponse], count: int, seed: int) -> list[JudgmentPair]:
    """At most `count` pairs of judgments: one of every response before a second of any, by lots that depend on identities only."""
    ranked: list[tuple[int, bytes, JudgmentPair]] = []
    for item in judged:
        comparable = [one for one in item.judgments or [] if one.finished and one.score is not None]
        pairs = [JudgmentPair(item, one, two) for one, two in combinations(comparable, 2)]
        lots = sorted((lot(seed, pair), index) for index, pair in enumerate(pairs))
        ranked += [(turn, drawn, pairs[index]) for turn, (drawn, index) in enumerate(lots)]
    ranked.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in ranked[:count]]


def lot(seed: int, pair: JudgmentPair) -> bytes:
    name = identity(pair.judged.response, pair.one.sample, pair.two.sample)
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def compare_judgments(
    model: LoadedModel, pairs: Sequence[JudgmentPair], options: JudgeOptions
) -> tuple[list[Comparison], int]:
    """The meta-judge's verdicts on every pair in both orders, and how many pairs did not fit the context."""
    room = model.max_context - options.comparing.max_new_tokens
    prompts: dict[str, tuple[int, ...]] = {}
    fitting: list[tuple[JudgmentPair, tuple[str, str]]] = []
    for pair in pairs:
        response = pair.judged.response
        rendered = []
        for first, second in ((pair.one, pair.two), (pair.two, pair.one)):
            messages = meta_judge_messages(
                options.meta_judge_template,
                response.prompt,
                response.response,
                first.text,
                second.text,
                hide_scores=options.hide_scores,
            )
            name = identity(response, "compare", first.sample, second.sample)
            rendered.append((name, tuple(model.chat.render(messages))))
        # One order alone would be a biased half of the pair.
        if all(len(prompt) <= room for _, prompt in rendered):
            prompts.update(rendered)
            fitting.append((pair, (rendered[0][0], rendered[1][0])))
    completions = model.complete(prompts, options.comparing, f"{model.subject.name}: compare", "comparisons")
    found = []
    for pair, orders in fitting:
        response = pair.judged.response
        for turned, name in enumerate(orders):
            first, second = (pair.two, pair.one) if turned else (pair.one, pair.two)
            assert first.score is not None
            assert second.score is not None
            winner = parse_winner(model.chat.decode(completions[name].token_ids))
            found.append(
                Comparison(
                    response.prompt_id,
                    identity(response, pair.one.sample, pair.two.sample),
                    ScoredVerdict(winner, first.score, second.score),
                    bool(turned),
                )
            )
    return found, len(pairs) - len(fitting)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
