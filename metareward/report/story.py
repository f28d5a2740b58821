"""One prompt's whole story, read from a run: answers, judgments, the pair chosen and why, comparisons, Elo."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from metareward.config import Recipe
from metareward.errors import UserError
from metareward.preference.battle import Verdict, battle_matrix, position_weights
from metareward.preference.drops import DropReason
from metareward.preference.elo import elo_scores
from metareward.preference.length_control import Scored, select_actor_pair
from metareward.run.directory import IterationFiles, RunDirectory, open_existing
from metareward.run.figures import scores_by_response, verdicts_of
from metareward.run.jsonl import Line, read_jsonl

WHY_NOT = {
    DropReason.TOO_FEW_SCORED: "fewer than two answers have a readable score",
    DropReason.EQUAL_SCORES: "the best and the worst score are equal",
    DropReason.SAME_RESPONSE: "one answer would be chosen and rejected",
    DropReason.NOT_BETTER: "the chosen answer would not score above the rejected one",
    DropReason.CHOSEN_TOO_LONG: "the chosen answer is longer than max_chosen_characters",
}


@dataclass(frozen=True)
class Story:
    """What one iteration did with one prompt. `scores`: response_id -> its readable scores. `actor_pair` and `judge_pair` are
    None where there is none; `reason` says why the pair of answers is as it is. `elo`: judgment_id -> Elo of the judgments that
    were compared, all of the answer `compared`."""

    number: int
    prompt: str
    responses: list[Line]
    scores: dict[int, list[float]]
    judgments: dict[int, list[Line]]
    actor_pair: Line | None
    reason: str
    compared: int | None
    comparisons: list[Line]
    elo: dict[int, float]
    judge_pair: Line | None


def read_story(root: Path, prompt_id: str, iteration: int) -> list[Story]:
    """The story of a prompt, an entry an iteration that had it; `iteration` 0 means all.

    Raises:
        UserError: no run there, no such iteration, or no such prompt, with the nearest ids that exist.
    """
    run, recipe = open_existing(root)
    count = len(recipe.iteration)
    if not 0 <= iteration <= count:
        raise UserError(f"{root} has iterations 1 to {count}, not {iteration}: set --iteration, or 0 for all")
    numbers = [iteration] if iteration else range(1, count + 1)
    ready = [number for number in numbers if run.iteration(number).prompts.is_file()]
    if not ready:
        raise UserError(f"{root} has no prompts yet: run it until an iteration has begun")
    prompts = {
        number: {line["prompt_id"]: line["prompt"] for line in read_jsonl(run.iteration(number).prompts)}
        for number in ready
    }
    found = [
        story(run, recipe, number, prompt_id, prompts[number][prompt_id])
        for number in ready
        if prompt_id in prompts[number]
    ]
    if not found:
        raise UserError(unknown(prompt_id, sorted(set().union(*prompts.values())), run.iteration(ready[0])))
    return found


def unknown(prompt_id: str, known: list[str], files: IterationFiles) -> str:
    near = difflib.get_close_matches(prompt_id, known, n=3, cutoff=0.3) or known[:3]
    return f"no iteration has the prompt {prompt_id!r}: try {', '.join(near)}, or look into {files.prompts}"


def story(run: RunDirectory, recipe: Recipe, number: int, prompt_id: str, prompt: str) -> Story:
    files = run.iteration(number)
    responses = of_prompt(files.responses, prompt_id)
    judgments: dict[int, list[Line]] = {line["response_id"]: [] for line in responses}
    for line in of_prompt(files.judgments, prompt_id):
        judgments[line["response_id"]].append(line)
    scores = {
        response_id: found
        for (_, response_id), found in scores_by_response(
            line for lines in judgments.values() for line in lines
        ).items()
    }
    comparisons = of_prompt(files.comparisons, prompt_id)
    compared = comparisons[0]["response_id"] if comparisons else None
    actor_pair = next(iter(of_prompt(files.actor_pairs, prompt_id)), None)
    return Story(
        number=number,
        prompt=prompt,
        responses=responses,
        scores=scores,
        judgments=judgments,
        actor_pair=actor_pair,
        reason=why(responses, scores, recipe, number) if files.actor_pairs.is_file() else "not selected yet",
        compared=compared,
        comparisons=comparisons,
        elo={} if compared is None else elo_of(files, recipe, prompt_id, compared, judgments[compared]),
        judge_pair=next(iter(of_prompt(files.judge_pairs, prompt_id)), None),
    )


def of_prompt(path: Path, prompt_id: str) -> list[Line]:
    """The lines of a prompt; none where the file is not there yet."""
    if not path.is_file():
        return []
    return [line for line in read_jsonl(path, without=["token_ids"]) if line["prompt_id"] == prompt_id]


def why(responses: list[Line], scores: dict[int, list[float]], recipe: Recipe, number: int) -> str:
    """Why the pair of answers is as it is, from the same rule that selected it."""
    settings = recipe.iteration[number - 1]
    candidates = [
        Scored(line["response_id"], sum(found) / len(found), len(line["text"]))
        for line in responses
        if (found := scores.get(line["response_id"]))
    ]
    pair = select_actor_pair(candidates, settings.rho, settings.max_chosen_characters or None)
    if isinstance(pair, DropReason):
        return f"no pair: {WHY_NOT[pair]}"
    best, worst = max(item.score for item in candidates), min(item.score for item in candidates)
    reach = settings.rho * (best - worst)
    lengths = {item.response_id: item.length for item in candidates}
    return (
        f"answer {pair.chosen} is chosen: the shortest ({lengths[pair.chosen]} characters) of those that score "
        f"{best - reach:.2f} to {best:.2f}; answer {pair.rejected} is rejected: the longest "
        f"({lengths[pair.rejected]} characters) of those that score {worst:.2f} to {worst + reach:.2f} (rho = {settings.rho:g})"
    )


def elo_of(
    files: IterationFiles, recipe: Recipe, prompt_id: str, response_id: int, judgments: list[Line]
) -> dict[int, float]:
    """Elo of the compared judgments, as the judge pairs stage computes it: the position weights are those of the iteration."""
    verdicts = verdicts_of(read_jsonl(files.comparisons), recipe.meta_judge.consistent_only)
    w1, w2 = position_weights(verdict for group in verdicts.values() for verdict in group)
    own: list[Verdict] = verdicts[prompt_id, response_id]
    usable = {line["judgment_id"] for line in judgments if line["finished"] and line["score"] is not None}
    ids = sorted(usable & {name for verdict in own for name in (verdict.first, verdict.second)})
    elo = elo_scores(battle_matrix(ids, own, w1, w2), recipe.meta_judge.elo_ridge)
    return {name: float(value) for name, value in zip(ids, elo, strict=True)}
