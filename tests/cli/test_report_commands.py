"""`metareward report` and `metareward show` on the command line, and the report at a run's end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from metareward.cli import main
from metareward.commands_report import report_after_run
from metareward.config import Recipe
from metareward.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunDirectory(tmp_path / "run").open(replace(Recipe(), random_seed=1))
    return tmp_path / "run"


def test_a_report_is_written_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    main(["report", str(run)])
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out
    main(["report", str(run), "--out", str(run / "other.html")])
    assert (run / "other.html").read_bytes() == (run / "report.html").read_bytes()


def test_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run), "--text"])
    assert "Stages" in capsys.readouterr().out
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report"], "metareward report needs a run"),
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["report", "nowhere", "--text"], "nowhere is not a run directory"),
        (
            ["report", "nowhere", "--text", "--out", "x.html"],
            "--text prints and --out writes: give one of them",
        ),
        (["show", "nowhere", "p"], "nowhere is not a run directory"),
    ],
)
def test_mistakes(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert len(shown.strip().splitlines()) == 1


def test_show_before_there_are_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(run), "p1"])
    assert "has no prompts yet" in capsys.readouterr().err


def test_a_report_that_fails_does_not_fail_the_run(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    # Valid JSON that is not what a stage writes.
    (run / "metrics.jsonl").write_text('{"event": "stage"}\n')
    with caplog.at_level(logging.WARNING, "metareward"):
        report_after_run(run)
    (told,) = caplog.messages
    assert told.startswith("no report was written (KeyError:")
    assert "the run itself is complete" in told


def test_without_matplotlib_the_run_s_end_says_what_to_install(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "metareward"):
        report_after_run(run)
    (told,) = caplog.messages
    assert "pip install 'metareward[report]'" in told
