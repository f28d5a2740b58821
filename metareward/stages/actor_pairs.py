"""Stage 3: one pair of responses a prompt, by mean score under length control (section 2.1)."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from metareward.preference.drops import DropReason
from metareward.preference.length_control import Scored, select_actor_pair
from metareward.run import ranks
from metareward.run.figures import scores_by_response
from metareward.run.jsonl import Line, read_jsonl, write_jsonl
from metareward.stages.context import Context


def select_actor_pairs(context: Context, iteration: int) -> None:
    """responses.jsonl, judgments.jsonl -> actor_pairs.jsonl."""
    context.spans.mark("data" if ranks.is_first() else "wait")
    ranks.on_first(lambda: write_actor_pairs(context, iteration))


def write_actor_pairs(context: Context, iteration: int) -> None:
    began = time.perf_counter()
    files, settings = context.files(iteration), context.recipe.iteration[iteration - 1]
    # Looked up here, on rank 0: another rank may look so late that the file is there already.
    if files.actor_pairs.is_file():
        return
    scores = scores_by_response(read_jsonl(files.judgments))
    responses: dict[str, list[Line]] = defaultdict(list)
    for line in read_jsonl(files.responses):
        responses[line["prompt_id"]].append(line)
    pairs: list[Line] = []
    dropped: Counter[str] = Counter()
    for prompt_id, lines in responses.items():
        # Unfinished responses and duplicates were not judged, so they have no scores.
        candidates = [
            Scored(line["response_id"], mean(found), len(line["text"]))
            for line in lines
            if (found := scores.get((prompt_id, line["response_id"])))
        ]
        pair = select_actor_pair(candidates, settings.rho, settings.max_chosen_characters or None)
        if isinstance(pair, DropReason):
            dropped[str(pair)] += 1
            continue
        pairs.append(
            {
                "prompt_id": prompt_id,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "chosen_score": pair.chosen_score,
                "rejected_score": pair.rejected_score,
            }
        )
    # Before the file, because after it a kill would lose the figures for good.
    context.metrics.event("pairs", "actor_pairs", iteration, kept=len(pairs), dropped=dict(dropped))
    write_jsonl(files.actor_pairs, pairs)
    context.metrics.event(
        "stage", "actor_pairs", iteration, seconds=time.perf_counter() - began, requests=len(responses)
    )


def mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
