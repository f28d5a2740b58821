"""A run read into figures, worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metareward.errors import UserError
from metareward.report.assessment_charts import Rows, in_words, rows_by_figure
from metareward.report.assessments import Figure, read_assessments
from metareward.report.chart import span
from metareward.report.data import labels_of, quantiles, read_run
from metareward.report.drawing import LINE_POINTS, ramp, thinned
from metareward.report.terminal import curve

MakeRun = Callable[..., Path]


def test_figures_of_a_run(run: Path) -> None:
    found = read_run(run, "run")
    assert found.finished
    assert [item.number for item in found.iterations] == [1, 2]
    assert found.seconds == 700 + (10 + 10 + 10 + 30) + (20 + 20 + 20 + 30)
    assert found.implementations == {"op": "cpp"}
    assert found.ranks == 2
    first, second = found.iterations
    assert first.judgments is not None
    # 4, 5 and 1 for each of three prompts.
    assert first.judgments.histogram == (0, 3, 0, 0, 3, 3)
    assert first.judgments.entropy == pytest.approx(math.log(3))
    assert first.comparisons is not None
    assert second.comparisons is not None
    # Judgment 1 has the higher score; in iteration 1 it wins in both orders, in iteration 2 the second place wins.
    assert first.comparisons.higher_score_preference == 1.0
    assert second.comparisons.higher_score_preference == 0.5
    assert second.comparisons.first_preference == 0.0
    assert first.elo_gaps == pytest.approx((3.0,) * 5)
    assert second.elo_gaps == pytest.approx((5.0,) * 5)
    assert [step["step"] for step in first.steps] == [1, 2, 3, 4]
    assert [event["stage"] for event in second.guard] == ["judge"]


def test_pairs_are_followed_from_selection_to_training(run: Path) -> None:
    pairs = read_run(run, "run").iterations[0].pairs
    assert (pairs["actor"].kept, pairs["actor"].dropped) == (
        2,
        {"equal_scores": 2, "too_long_in_training": 1},
    )
    # Of three, one was trained on; nothing else tells why, so it was the cap on their share.
    assert (pairs["judge"].kept, pairs["judge"].dropped) == (1, {"judge_share_cap": 2})


def test_a_run_that_has_only_begun(tmp_path: Path, made: MakeRun) -> None:
    found = read_run(made(tmp_path / "begun", iterations=0), "begun")
    assert not found.finished
    assert found.iterations == []
    assert len(found.seed_steps) == 3


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory"):
        read_run(tmp_path, "x")


def test_assessments_are_read_by_their_form(run: Path, assess: Callable[[Path, str, Any], None]) -> None:
    interval = {"low": 0.4, "high": 0.6, "confidence": 0.95}
    assess(
        run,
        "b.json",
        {
            "model": "m",
            "win_rate": {"value": 0.5, "interval": interval},
            "models": [
                {"name": "seed", "labels": {"sampled": {"spearman": 0.25, "kendall": {"value": None}}}},
                {"name": "m1", "baseline": "m0", "length_controlled": {"win_rate": 0.75}},
                {"nameless": 1},
            ],
            "flag": True,
            "histogram": [1, 2],
        },
    )
    assess(run, "a.json", [1, 2])
    (run / "assessments" / "c.json").write_text("{torn")
    (found,), unread = read_assessments(run / "assessments")
    assert unread == ["a.json", "c.json"]
    assert found.about == {"model": "m"}
    assert found.figures == [
        Figure("", "win_rate", 0.5, 0.4, 0.6),
        Figure("seed", "labels / sampled / spearman", 0.25),
        Figure("seed", "labels / sampled / kendall", None),
        Figure("m1 against m0", "length_controlled / win_rate", 0.75),
    ]
    assert [figure.is_win_rate for figure in found.figures] == [True, False, False, True]
    assert [figure.is_agreement for figure in found.figures] == [False, True, False, False]
    assert found.figures[1].full_name == "seed / labels / sampled / spearman"


def test_a_list_at_the_top_and_a_file_a_model(run: Path, assess: Callable[[Path, str, Any], None]) -> None:
    assess(run, "annotations.json", [{"name": "m1", "win_rate": 0.5}, {"name": "m2", "win_rate": 0.6}])
    assess(run, "iteration-1.json", {"spearman": 0.1})
    assess(run, "iteration-2.json", {"spearman": 0.2})
    found = read_run(run, "run")
    assert rows_by_figure(found, lambda figure: figure.is_win_rate) == {
        "annotations: win rate": Rows(0.5, [("m1", (0.5, None, None)), ("m2", (0.6, None, None))])
    }
    assert rows_by_figure(found, lambda figure: figure.is_agreement) == {
        "rank correlation": Rows(
            0.0, [("iteration-1", (0.1, None, None)), ("iteration-2", (0.2, None, None))]
        )
    }
    assert in_words("labels / sampled / pairwise") == "pairs put in people's order (labels, sampled scores)"


def test_no_assessments(tmp_path: Path) -> None:
    assert read_assessments(tmp_path / "nothing") == ([], [])


def test_runs_of_one_name_are_told_apart() -> None:
    assert labels_of([Path("/a/demo")]) == ["demo"]
    assert labels_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert labels_of([Path("/a/demo"), Path("/b/demo")]) == ["a/demo", "b/demo"]
    assert labels_of([Path("/a/demo"), Path("/a/demo")]) == ["demo (1)", "demo (2)"]


def test_small_helpers() -> None:
    assert quantiles([]) is None
    assert quantiles([1, 2, 3, 4, 5]) == pytest.approx((1.2, 2, 3, 4, 4.8))
    assert span([]) is None
    assert span([2.0, 2.0]) == pytest.approx((1.88, 2.12))
    assert span([0.0]) == (-1.0, 1.0)
    assert len(set(ramp(5))) == 5
    assert ramp(1) == ramp(9)[-1:]
    places, values = thinned(list(range(10_000)), [1.0] * 10_000)
    assert len(places) <= LINE_POINTS
    assert set(values) == {1.0}
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    assert curve([0.0, 1.0]) == "0.0000 ▁█ 1.0000"
    assert curve([1.0, 1.0]) == "1.0000 ▁▁ 1.0000"
    assert curve([float("nan")]) == "not finite"
    assert len(curve([float(index) for index in range(5000)]).split()[1]) <= 48


def test_a_damaged_file_is_named(run: Path) -> None:
    (run / "iteration-1" / "judgments.jsonl").write_text(json.dumps({"prompt_id": "a"}) + "\n{torn\n")
    with pytest.raises(UserError, match=r"judgments\.jsonl, line 2 is not valid JSON"):
        read_run(run, "run")
