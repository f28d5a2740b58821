"""The tables at the end of a run, on a hand-made run directory whose figures are worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metareward.config import Iteration, LoggingSettings, Recipe
from metareward.errors import UserError
from metareward.run.directory import RunDirectory
from metareward.run.jsonl import write_jsonl
from metareward.run.metrics import Metrics, read_metrics
from metareward.run.summary import iteration_figures, print_summary, stage_figures


def response(
    prompt_id: str, response_id: int, text: str, finished: bool = True, duplicate: int | None = None
) -> dict:
    head = {"prompt_id": prompt_id, "response_id": response_id}
    return {**head, "text": text, "finished": finished, "duplicate_of": duplicate}


def judgment(prompt_id: str, response_id: int, judgment_id: int, score: float | None) -> dict:
    head = {"prompt_id": prompt_id, "response_id": response_id, "judgment_id": judgment_id}
    return {**head, "text": "four", "finished": True, "score": score}


def comparison(first: int, second: int, winner: str | None) -> dict:
    return {
        "prompt_id": "a",
        "response_id": 0,
        "first": first,
        "second": second,
        "text": "",
        "winner": winner,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.open(replace(Recipe(), iteration=(Iteration(), Iteration())))
    files = run.iteration(1)
    files.folder.mkdir()
    write_jsonl(
        files.responses,
        [
            response("a", 0, "xx"),
            response("a", 1, "xxxx"),
            response("a", 2, "xx", duplicate=0),
            response("b", 0, "x" * 12, finished=False),
            response("b", 1, "x" * 10),
        ],
    )
    write_jsonl(
        files.judgments,
        [
            judgment("a", 0, 0, 5.0),
            judgment("a", 0, 1, 3.0),
            judgment("a", 1, 0, 4.0),
            judgment("a", 1, 1, 4.0),
            judgment("b", 1, 0, 4.75),
            judgment("b", 1, 1, None),
        ],
    )
    write_jsonl(
        files.comparisons,
        [
            comparison(0, 1, "first"),
            comparison(1, 0, "second"),
            comparison(0, 1, "second"),
            comparison(1, 0, None),
        ],
    )
    metrics = Metrics(run.root, LoggingSettings(), active=True)
    metrics.event(
        "stage", "judge", 1, seconds=2.0, requests=4, new_tokens=100, prompt_tokens=80, prefill_tokens=20
    )
    metrics.event(
        "stage", "judge", 1, seconds=3.0, requests=2, new_tokens=50, prompt_tokens=20, prefill_tokens=5
    )
    for stage, mean, largest, tokens in (("respond", 0.001, 0.5, 300), ("compare", 0.005, 0.25, 100)):
        metrics.event(
            "difference",
            stage,
            1,
            logprob_difference_mean=mean,
            logprob_difference_max=largest,
            logprob_difference_tokens=tokens,
        )
    metrics.event("stage", "train", 1, seconds=1.0, requests=1, tokens=9)
    metrics.event("pairs", "actor_pairs", 1, kept=9, dropped={})
    metrics.event("pairs", "actor_pairs", 1, kept=1, dropped={"equal_scores": 1, "chosen_too_long": 2})
    for step, loss in ((1, 0.6931), (2, 0.9), (2, 0.5)):
        metrics.event("step", "train", 1, step=step, loss=loss, accuracy=step / 2, margin=0.1 * step)
    metrics.close()
    return run


def test_figures_of_an_iteration(run: RunDirectory) -> None:
    figures = iteration_figures(run, 1, read_metrics(run.root))
    entropy = 2 / 5 * math.log(5 / 2) * 2 + 1 / 5 * math.log(5)
    expected: dict[str, Any] = {
        "responses": "5 (1 unfinished, 1 duplicates)",
        "response length, characters": "6",
        "judgments": "6",
        "parse rate": "83.3%",
        "judgment length, characters": "4",
        "score mean": "4.15",
        # 4.75 counts as a 5.
        "scores 0 1 2 3 4 5": "0 0 0 1 2 2",
        "score entropy, nat": f"{entropy:.2f}",
        # Both responses of a have the mean 4; b has one scored response only.
        "tie rate": "100.0%",
        "actor pairs kept": "1",
        "  dropped": "2 chosen_too_long, 1 equal_scores",
        "comparisons": "4",
        "readable winners": "75.0%",
        "position preference (first)": "33.3%",
        "  of equal scores": "none",
        # Judgment 0 gave 5, judgment 1 gave 3: 0 won twice of three.
        "higher-score preference": "66.7%",
        "DPO steps": "2",
        "DPO loss, first -> last step": "0.6931 -> 0.5000",
        "DPO accuracy, first -> last step": "0.5000 -> 1.0000",
        "DPO margin, first -> last step": "0.1000 -> 0.2000",
        # Weighted with the tokens.
        "sampler - trainer log-prob, nat": "0.002 mean, 0.5 max",
    }
    assert figures == expected


def test_an_interrupted_stage_is_added_up(run: RunDirectory) -> None:
    judge, train = stage_figures(read_metrics(run.root))
    assert judge == {
        "iteration": 1,
        "stage": "judge",
        "seconds": 5.0,
        "requests": 6,
        "tokens": 150,
        "prompt_tokens": 100,
        "prefill_tokens": 25,
    }
    assert (train["stage"], train["tokens"]) == ("train", 9)


def test_the_tables_are_printed(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run.root)
    shown = capsys.readouterr().out
    for text in ("judge", "150", "30", "25%", "83.3%", "0.6931 -> 0.5000", "iteration 1"):
        assert text in shown
    assert "iteration 2" not in shown


def test_a_run_without_anything_yet_prints_an_empty_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDirectory(tmp_path).open(Recipe())
    print_summary(tmp_path)
    assert "Stages" in capsys.readouterr().out


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        print_summary(tmp_path)
