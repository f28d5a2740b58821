"""`metareward assess judge` from end to end on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metareward.assessment.judge import assess
from metareward.errors import UserError


@pytest.fixture
def data(tiny_world: Path, tmp_path: Path) -> Path:
    """Eight labelled responses; the packaged judge prompt needs a longer context than the tiny model's, so words are few."""
    lines = (tiny_world / "quality.jsonl").read_text().splitlines()[:8]
    (tmp_path / "quality.jsonl").write_text("\n".join(lines))
    return tmp_path / "quality.jsonl"


def judge(tiny_world: Path, data: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"samples": 2, "limit": 0, "max_new_tokens": 8, "seed": 0, "out": None, **options}
    return assess(str(tiny_world / "model"), data, *given.values())


@pytest.fixture
def short_rubric(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metareward.roles.templates import load_template

    template = load_template("judge", tiny_world / "judge.txt")
    monkeypatch.setattr("metareward.assessment.judge.load_template", lambda role: template)


@pytest.mark.usefixtures("short_rubric")
def test_figures_are_whole_and_the_same_again(tiny_world: Path, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "figures.json"
    figures = judge(tiny_world, data, out=out)
    assert json.loads(out.read_text()) == figures
    assert (figures["responses"], figures["judgments"], figures["left_out_too_long"]) == (8, 16, 0)
    # Every judgment has an expected score, readable or not.
    assert figures["expected"]["scored"] == 8
    assert figures["expected"]["spearman"] is not None
    assert 0.0 <= figures["parse_rate"] <= 1.0
    assert sum(figures["score_histogram"].values()) == round(figures["parse_rate"] * 16)
    assert "Spearman" in capsys.readouterr().out
    again = judge(tiny_world, data)
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert judge(tiny_world, data, limit=3)["responses"] == 3


def test_nothing_fits(tiny_world: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"no judge prompt of .* fits the model's context of 512"):
        judge(tiny_world, data, max_new_tokens=500)


def test_numbers_that_make_no_sense(tiny_world: Path, data: Path) -> None:
    for options in ({"samples": 0}, {"limit": -1}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="--samples"):
            judge(tiny_world, data, **options)
