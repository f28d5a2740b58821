"""`metareward show`: one prompt's whole story, in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from metareward.errors import UserError
from metareward.report.story import read_story
from metareward.report.terminal import print_report, print_story
from metareward.run.jsonl import read_jsonl, write_jsonl


def test_what_is_told(run: Path) -> None:
    first, second = read_story(run, "p1", 0)
    assert (first.number, second.number) == (1, 2)
    assert first.scores == {0: [4.0, 5.0], 1: [1.0]}
    assert first.reason.startswith("answer 0 is chosen: the shortest (")
    assert "that score 4.50 to 4.50; answer 1 is rejected" in first.reason
    assert first.compared == 0
    # In iteration 1 judgment 1 won both comparisons; in iteration 2 the second place won both, so the two are even.
    assert first.elo[1] > 1 > -1 > first.elo[0]
    assert second.elo == pytest.approx({0: 0.0, 1: 0.0}, abs=1e-9)


def test_a_prompt_without_a_pair_says_why(run: Path) -> None:
    path = run / "iteration-1" / "judgments.jsonl"
    write_jsonl(path, [{**line, "score": 3.0} for line in read_jsonl(path)])
    (found,) = read_story(run, "p0", 1)
    assert found.reason == "no pair: the best and the worst score are equal"


def test_it_is_printed_as_plain_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_story(run, "p0", 2, comparison_texts=True)
    shown = capsys.readouterr().out
    assert "[red]markup[/red]" in shown
    assert "\x1b" not in shown
    assert "·[2J" in shown
    for text in (
        "answer 0 (chosen): mean score 4.50",
        "answer 1 (rejected)",
        "judgment 1: unreadable",
        "unfinished",
    ):
        assert text in shown
    assert "the same as answer 0" in shown
    assert "1 before 0: judgment 0 wins" in shown
    assert "iteration 1 " not in shown


def test_an_unfinished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("judgments", "actor_pairs", "comparisons", "judge_pairs"):
        (run / "iteration-1" / f"{name}.jsonl").unlink()
    print_story(run, "p0", 1, comparison_texts=False)
    shown = capsys.readouterr().out
    assert "not selected yet" in shown
    assert "No judgments of this prompt were compared" in shown


def test_mistakes_are_answered(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no iteration has the prompt 'q1': try p1, .*iteration-1/prompts\.jsonl"
    ):
        read_story(run, "q1", 0)
    with pytest.raises(UserError, match=r"has iterations 1 to 2, not 3"):
        read_story(run, "p1", 3)
    with pytest.raises(UserError, match=r"is not a run directory"):
        read_story(tmp_path, "p1", 0)
    for name in ("iteration-1", "iteration-2"):
        (run / name / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no prompts yet"):
        read_story(run, "p1", 0)


def test_the_report_in_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "assessments").mkdir()
    (run / "assessments" / "judge.json").write_text('{"spearman": {"value": 0.31, "low": 0.2, "high": 0.4}}')
    print_report([run])
    shown = capsys.readouterr().out
    for text in (
        "higher-score preference",
        "3.00  3.00  3.00  3.00  3.00",
        "best and worst score equal",
        "0.6931 █",
        "0.200 to 0.400",
        "warning: iteration 2: the entropy of 60 scores",
    ):
        assert text in shown
