"""Help reads well everywhere, and the commands that need no model work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metareward.cli import GROUPS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ("arXiv 2407.19594", "run", "stage", "summary", "recipes", "assess", "export", "import")),
        (("run",), ("go on with it from wherever", "torchrun --nproc-per-node 8", "--run-dir", "TOML")),
        (
            ("run", "demo.toml"),
            ("--respond.temperature", "responses a prompt. (paper)", "--train.beta", "0.1"),
        ),
        (("stage",), ("one stage of an existing run directory", "actor_pairs", "--iteration")),
        (("summary",), ("tables of a run",)),
        (("recipes",), ("packaged recipes",)),
        (("assess",), ("judgments against people", "judge", "responses", "annotations")),
        (("assess", "judge"), ("Spearman", "expected score", "--data", "--samples")),
        (("assess", "responses"), ("both orders", "length-controlled", "--baseline", "--judge", "--prompts")),
        (("assess", "annotations"), ("annotations.json", "--difficulty")),
        (("export",), ("pairs", "answers")),
        (("export", "answers"), ("alpaca-eval", "arena-hard", "mt-bench", "--questions", "--out")),
        (("export", "pairs"), ("DPOTrainer", "--format", "--out")),
        (("import",), ("gguf",)),
        (("import", "gguf"), ("GGUF", "--packaged")),
    ],
)
def test_help(metareward, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    ended = metareward(*words, "--help")
    assert ended.code == 0
    assert not ended.err
    shown = " ".join(ended.out.replace("│", " ").split())
    for text in said:
        assert text in shown, text


def test_no_words_show_the_help(metareward) -> None:
    for words in ((), *((group,) for group in GROUPS)):
        ended = metareward(*words)
        assert ended.code == 0
        assert "usage: metareward" in ended.out


def test_the_recipe_s_values_are_the_defaults_of_the_help(metareward) -> None:
    shown = " ".join(metareward("run", "demo.toml", "--help").out.replace("│", " ").split())
    assert "--prompts.per-iteration INT" in shown
    assert "(default: 16)" in shown


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("stage", "dance", "somewhere"),
        ("summary",),
        ("run", "demo.toml"),
        ("run", "demo.toml", "--run-dir", "x", "--respond.temprature", "1"),
        ("run", "demo.toml", "--run-dir", "x", "--respond.samples", "many"),
    ],
)
def test_a_wrong_word_is_refused_without_a_traceback(metareward, words, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = metareward(*words)
    assert ended.code == 2
    assert "Traceback" not in ended.err + ended.out
    assert ended.err
    assert not list(tmp_path.iterdir())
    if "--respond.temprature" in words:
        assert "--respond.temperature" in ended.err


def test_recipes_are_listed_and_printed(metareward) -> None:
    assert metareward("recipes").out.split() == [
        "demo.toml",
        "llama3-8b.toml",
        "self-rewarding-llama3-8b.toml",
    ]
    assert "[[iteration]]" in metareward("recipes", "llama3-8b.toml").out


def test_pairs_are_selected_summed_up_and_exported(metareward, made_run: Path, tmp_path: Path) -> None:
    assert metareward("stage", "actor_pairs", made_run).code == 0
    pair = json.loads((made_run / "iteration-1/actor_pairs.jsonl").read_text())
    assert pair == {"prompt_id": "p0", "chosen": 0, "rejected": 1, "chosen_score": 4.0, "rejected_score": 2.0}
    # Once more changes nothing.
    assert metareward("stage", "actor_pairs", made_run).code == 0
    shown = metareward("summary", made_run)
    assert shown.code == 0
    assert "actor pairs kept" in shown.out
    assert metareward("export", "pairs", made_run, "--out", tmp_path / "pairs.jsonl").code == 0
    line = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert line["prompt"] == [{"role": "user", "content": "Tell me about tea."}]
    assert line["chosen"] == [{"role": "assistant", "content": "It helps."}]
    assert line["rejected"] == [{"role": "assistant", "content": "No."}]
