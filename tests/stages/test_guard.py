"""The collapse guard on made-up files: what is measured, and what each action does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metareward.config import GuardSettings, Iteration, LoggingSettings, ModelSettings, Recipe
from metareward.errors import UserError
from metareward.run.directory import RunDirectory
from metareward.run.jsonl import read_jsonl, write_jsonl
from metareward.run.metrics import Metrics, read_metrics
from metareward.stages.context import Context
from metareward.stages.guard import guard
from metareward.stages.judge_pairs import select_judge_pairs

HEALTHY, STUCK = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), (5.0, 5.0, 5.0, 5.0, 5.0, None)


def context(
    root: Path, scores: tuple[float | None, ...], guard: dict[str, Any], judge: bool = True
) -> Context:
    """Two iterations of one prompt with one response: HEALTHY scores first, then `scores`; the meta-judge of iteration 2 always
    takes the judgment with the higher score, or the first of equals."""
    recipe = replace(
        Recipe(),
        model=ModelSettings(name="x"),
        guard=GuardSettings(**{"min_observations": 1, **guard}),
        iteration=(Iteration(), Iteration(meta_judge=judge)),
    )
    run = RunDirectory(root)
    run.open(recipe)
    for number, values in ((1, HEALTHY), (2, scores)):
        files = run.iteration(number)
        files.folder.mkdir()
        head = {"prompt_id": "a", "response_id": 0}
        write_jsonl(
            files.judgments,
            [
                {**head, "judgment_id": index, "text": "t" * (index + 1), "token_ids": [index]}
                | {"score": value, "finished": True}
                for index, value in enumerate(values)
            ],
        )
        readable = {index: value for index, value in enumerate(values) if value is not None}
        write_jsonl(
            files.comparisons,
            [
                {**head, "first": first, "second": second, "text": "", "finished": True}
                | {"winner": "first" if readable[first] >= readable[second] else "second"}
                for first in readable
                for second in readable
                if first != second
            ],
        )
    return Context(run, recipe, Metrics(root, LoggingSettings(), active=True))


def events(found: Context) -> list[dict[str, Any]]:
    return [event for event in read_metrics(found.run.root) if event["event"] == "guard"]


def test_a_healthy_judge_passes_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = context(tmp_path / "run", HEALTHY, {"action": "stop"})
    guard(found, 2, "judge")
    (event,) = events(found)
    assert (event["passed"], event["parse_rate"], event["mean_drift"]) == ([], 1.0, 0.0)
    assert event["observations"] == {"parse_rate": 6, "score_entropy": 6, "mean_drift": 6}
    assert not caplog.messages


def test_a_judge_that_says_5_to_everything_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = context(tmp_path / "run", STUCK, {"min_parse_rate": 0.8})
    with caplog.at_level(logging.WARNING, "metareward"):
        guard(found, 2, "judge")
    (event,) = events(found)
    assert event["action"] == "warn"
    assert event["score_entropy"] == 0
    assert event["mean_drift"] == 2.5
    assert [item["name"] for item in event["passed"]] == ["score_entropy", "mean_drift"]
    (told,) = caplog.messages
    assert told.startswith(
        "iteration 2: the entropy of 5 scores is only 0.00 nat (guard.min_score_entropy = 0.5); "
    )
    assert told.endswith('the run goes on, as guard.action = "warn" says')


def test_a_meta_judge_that_goes_by_the_score_stops_the_run(tmp_path: Path) -> None:
    found = context(tmp_path / "run", HEALTHY, {"action": "stop"})
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"higher score in 100\.0% of 30 comparisons.*--guard\.action warn"
        ):
            guard(found, 2, "compare")
    # Half of the higher scores are shown first.
    assert events(found)[-1]["position_preference"] == 0.5
    assert events(found)[-1]["passed"][0]["setting"] == "max_higher_score_preference"
    relaxed = replace(found, recipe=replace(found.recipe, guard=GuardSettings(action="warn")))
    guard(relaxed, 2, "compare")


@pytest.mark.parametrize("action", ["warn", "drop_judge_pairs"])
def test_judge_pairs_are_dropped_and_counted_where_the_action_says_so(
    tmp_path: Path, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = context(tmp_path / "run", HEALTHY, {"action": action})
    with caplog.at_level(logging.WARNING, "metareward"):
        guard(found, 2, "compare")
    select_judge_pairs(found, 2)
    pairs = read_jsonl(found.files(2).judge_pairs)
    (event,) = (item for item in read_metrics(found.run.root) if item["event"] == "pairs")
    if action == "warn":
        assert (len(pairs), event["kept"], event["dropped"]) == (1, 1, {})
    else:
        assert (pairs, event["kept"], event["dropped"]) == ([], 0, {"collapse_guard": 1})
        assert caplog.messages[0].endswith(
            'this iteration trains without judge pairs, as guard.action = "drop_judge_pairs" says'
        )


def test_the_judge_s_figures_drop_judge_pairs_too(tmp_path: Path) -> None:
    found = context(
        tmp_path / "run", STUCK, {"action": "drop_judge_pairs", "max_higher_score_preference": 1.0}
    )
    select_judge_pairs(found, 2)
    assert read_jsonl(found.files(2).judge_pairs) == []


def test_without_judge_pairs_there_is_nothing_to_drop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = context(tmp_path / "run", STUCK, {"action": "drop_judge_pairs"}, judge=False)
    with caplog.at_level(logging.WARNING, "metareward"):
        guard(found, 2, "judge")
    assert caplog.messages[0].endswith("this iteration has no judge pairs to drop, so the run goes on")


def test_the_guard_s_settings_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    found = context(tmp_path / "run", HEALTHY, {"action": "stop"})
    found.run.open(replace(found.recipe, guard=GuardSettings(action="warn", min_parse_rate=0.5)))
    assert 'action = "warn"' in found.run.recipe.read_text()


def test_other_stages_have_no_limit(tmp_path: Path) -> None:
    found = context(tmp_path / "run", STUCK, {"action": "stop"})
    guard(found, 2, "respond")
    assert events(found) == []
