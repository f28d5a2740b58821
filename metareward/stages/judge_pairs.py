"""Stage 4, second half: one pair of judgments a prompt, by Elo from the battle matrix (section 2.2, equations 2 to 4)."""

from __future__ import annotations

import time
from collections import Counter

from metareward.preference.battle import Verdict, battle_matrix, position_weights
from metareward.preference.caps import cap_score_class
from metareward.preference.drops import DropReason
from metareward.preference.elo import elo_scores
from metareward.preference.judgment_pair import JudgePair, select_judgment_pair
from metareward.run import ranks
from metareward.run.figures import Key, verdicts_of
from metareward.run.jsonl import Line, read_jsonl, write_jsonl
from metareward.stages.compare import comparable
from metareward.stages.context import Context
from metareward.stages.guard import drops_judge_pairs


def select_judge_pairs(context: Context, iteration: int) -> None:
    """judgments.jsonl, comparisons.jsonl -> judge_pairs.jsonl."""
    context.spans.mark("data" if ranks.is_first() else "wait")
    ranks.on_first(lambda: write_judge_pairs(context, iteration))


def write_judge_pairs(context: Context, iteration: int) -> None:
    began = time.perf_counter()
    files, recipe = context.files(iteration), context.recipe
    # Looked up here, on rank 0: another rank may look so late that the file is there already.
    if files.judge_pairs.is_file():
        return
    limit = recipe.iteration[iteration - 1].max_chosen_judgment_characters or None
    judgments = comparable(read_jsonl(files.judgments))
    verdicts = verdicts_of(read_jsonl(files.comparisons), recipe.meta_judge.consistent_only)
    # One pair of weights for the iteration: the preference for a position is the model's, not a prompt's.
    w1, w2 = position_weights(verdict for group in verdicts.values() for verdict in group)
    selected: dict[Key, JudgePair] = {}
    dropped: Counter[str] = Counter()
    for (prompt_id, response_id), group in verdicts.items():
        pair = judgment_pair(judgments[prompt_id][response_id], group, w1, w2, limit, context)
        if isinstance(pair, DropReason):
            dropped[str(pair)] += 1
        else:
            selected[prompt_id, response_id] = pair
    keys = list(selected)
    kept = cap_score_class(
        [selected[key].chosen_score for key in keys],
        recipe.pairs.max_score_class_share,
        seed=recipe.random_seed,
    )
    if len(kept) < len(keys):
        dropped["score_class_cap"] = len(keys) - len(kept)
    if drops_judge_pairs(context, iteration):
        dropped["collapse_guard"], kept = len(kept), []
    pairs = [pair_line(keys[index], selected[keys[index]]) for index in kept]
    # Before the file, because after it a kill would lose the figures for good.
    context.metrics.event(
        "pairs",
        "judge_pairs",
        iteration,
        kept=len(pairs),
        dropped=dict(dropped),
        first_weight=w1,
        second_weight=w2,
    )
    write_jsonl(files.judge_pairs, pairs)
    context.metrics.event(
        "stage", "judge_pairs", iteration, seconds=time.perf_counter() - began, requests=len(verdicts)
    )


def judgment_pair(
    judgments: dict[int, Line],
    verdicts: list[Verdict],
    w1: float,
    w2: float,
    limit: int | None,
    context: Context,
) -> JudgePair | DropReason:
    """The best and the worst judgment of one response."""
    settings = context.recipe.meta_judge
    # Only judgments that were compared: an option or the context's length can leave some out.
    compared = {name for verdict in verdicts for name in (verdict.first, verdict.second)}
    ids = sorted(compared & judgments.keys())
    elo = elo_scores(battle_matrix(ids, verdicts, w1, w2), settings.elo_ridge)
    return select_judgment_pair(
        ids,
        elo=elo,
        scores=[judgments[name]["score"] for name in ids],
        lengths=[len(judgments[name]["text"]) for name in ids],
        decided=sum(verdict.winner is not None for verdict in verdicts),
        max_chosen_length=limit,
        drop_equal_scores=settings.skip_equal_scores,
    )


def pair_line(key: Key, pair: JudgePair) -> Line:
    return {
        "prompt_id": key[0],
        "response_id": key[1],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_elo": pair.chosen_elo,
        "rejected_elo": pair.rejected_elo,
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
    }
