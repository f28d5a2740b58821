"""A made-up run of two iterations whose texts try to break out of the page and of the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metareward.config import Iteration, LoggingSettings, ModelSettings, Recipe
from metareward.run.directory import RunDirectory
from metareward.run.jsonl import Line, write_jsonl
from metareward.run.metrics import Metrics

NASTY = '<script>alert(1)</script> "quoted" & [red]markup[/red] \x1b[2J {{ 7 * 7 }} $x^2$ </style>'
WINNERS = {1: "first", 2: "second"}

MakeRun = Callable[..., Path]


def make_run(
    root: Path, *, iterations: int = 2, text: str = NASTY, prompts: int = 3, judge: bool = True
) -> Path:
    """Prompts p0, p1, ...: answer 0 of each scores 4 and 5, answer 1 scores 1 and cannot be read, answer 2 repeats answer 0, answer
    3 is unfinished. The judgments of answer 0 are compared in both orders."""
    run = RunDirectory(root)
    run.open(
        replace(
            Recipe(),
            model=ModelSettings(name=f"/models/{text[:8]}"),
            iteration=tuple(Iteration(meta_judge=judge) for _ in range(2)),
        )
    )
    metrics = Metrics(root, LoggingSettings(), active=True)
    for step in range(1, 4):
        metrics.event("step", "seed", 0, step=step, loss=4.0 / step)
    metrics.event("stage", "seed", 0, seconds=700.0, requests=9, tokens=900)
    for number in range(1, iterations + 1):
        write_iteration(run, metrics, number, text, prompts, judge)
    if iterations == 2:
        metrics.event("finished", "run", 2)
    metrics.close()
    return root


def write_iteration(
    run: RunDirectory, metrics: Metrics, number: int, text: str, prompts: int, judge: bool
) -> None:
    files = run.iteration(number)
    files.folder.mkdir()
    ids = [f"p{index}" for index in range(prompts)]
    write_jsonl(files.prompts, [{"prompt_id": name, "prompt": f"{text} {name}?"} for name in ids])
    responses: list[Line] = []
    judgments: list[Line] = []
    comparisons: list[Line] = []
    for name in ids:
        for response, finished, duplicate in (
            (0, True, None),
            (1, True, None),
            (2, True, 0),
            (3, False, None),
        ):
            head = {"prompt_id": name, "response_id": response}
            body = {"text": f"{text} answer {response}" * number, "token_ids": [1], "finished": finished}
            responses.append({**head, **body, "duplicate_of": duplicate})
        for response, scores in ((0, (4.0, 5.0)), (1, (1.0, None))):
            for index, score in enumerate(scores):
                head = {"prompt_id": name, "response_id": response, "judgment_id": index}
                body = {
                    "text": f"{text} judgment {index}",
                    "token_ids": [1],
                    "finished": True,
                    "score": score,
                }
                judgments.append({**head, **body})
        for first, second, winner in ((0, 1, "second"), (1, 0, WINNERS[number])):
            head = {"prompt_id": name, "response_id": 0, "first": first, "second": second}
            comparisons.append({**head, "text": f"{text} winner", "finished": True, "winner": winner})
    write_jsonl(files.responses, responses)
    write_jsonl(files.judgments, judgments)
    pairs = [{"prompt_id": name, "chosen": 0, "rejected": 1} for name in ids]
    write_jsonl(files.actor_pairs, [{**pair, "chosen_score": 4.5, "rejected_score": 1.0} for pair in pairs])
    metrics.event("pairs", "actor_pairs", number, kept=prompts, dropped={"equal_scores": 2})
    for stage in ("respond", "judge", *(["compare"] if judge else [])):
        metrics.event("stage", stage, number, seconds=10.0 * number, requests=4, new_tokens=200, ranks=1)
    used = {"actor": prompts - 1, "actor_too_long": 1}
    if judge:
        write_jsonl(files.comparisons, comparisons)
        elo = {"chosen": 1, "rejected": 0, "chosen_elo": 2.0 * number, "rejected_elo": -1.0}
        write_jsonl(
            files.judge_pairs,
            [
                {"prompt_id": name, "response_id": 0, **elo, "chosen_score": 5.0, "rejected_score": 4.0}
                for name in ids
            ],
        )
        metrics.event("pairs", "judge_pairs", number, kept=prompts, dropped={})
        used |= {"judge": prompts - 2}
    passed = [
        {
            "name": "score_entropy",
            "value": 0.1,
            "limit": 0.5,
            "observations": 60,
            "setting": "min_score_entropy",
        }
    ]
    metrics.event("guard", "judge", number, passed=passed if number == 2 else [], action="warn")
    metrics.event("preference_set", "train", number, **used)
    for step in range(1, 5):
        loss = math.log(2) / step
        metrics.event("step", "train", number, step=step, loss=loss, accuracy=step / 4, margin=0.1 * step)
    metrics.event(
        "stage", "train", number, seconds=30.0, requests=4, tokens=300, implementations={"op": "cpp"}, ranks=2
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def assess() -> Callable[[Path, str, Any], None]:
    """assess(run, name, tree): put an assessment's file into a run."""

    def write(root: Path, name: str, tree: Any) -> None:
        (root / "assessments").mkdir(exist_ok=True)
        (root / "assessments" / name).write_text(json.dumps(tree))

    return write


@pytest.fixture(scope="session")
def made() -> MakeRun:
    return make_run
