"""AlpacaEval's annotations.json read back, written, and summed up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from metareward.assessment.annotations import (
    Annotation,
    add_difficulty,
    assess_file,
    read_annotations,
    write_annotations,
)
from metareward.assessment.interval import Resampling
from metareward.errors import UserError

pytest.importorskip("sklearn", reason="the length-controlled win rate needs scikit-learn")


def entry(**fields: object) -> dict[str, object]:
    return {
        "instruction": "i",
        "output_1": "base",
        "generator_1": "b",
        "output_2": "own",
        "generator_2": "m",
        "annotator": "judge",
        "preference": 1.25,
        **fields,
    }


def test_preferences_are_read_as_alpaca_eval_means_them(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    values = [1, 2.0, 1.5, 0, 0.0, None, 1.9998]
    path.write_text(json.dumps([entry(preference=value, raw_completion={"x": 1}) for value in values]))
    found = read_annotations(path)
    assert [item.preference for item in found] == [0.0, 1.0, 0.5, 0.5, 0.5, None, pytest.approx(0.9998)]
    assert [item.index for item in found] == list(range(7))
    # pandas writes a missing number as NaN in some versions.
    path.write_text(json.dumps([entry(preference=float("nan"))]))
    assert read_annotations(path)[0].preference is None


def test_written_and_read_again(tmp_path: Path) -> None:
    items = [
        Annotation("hé", "a\n", "🙂", "b", "m", "judge", 0.5, 0.25, 0),
        Annotation("i", "a", "b", "b", "m", "judge", None, -1.0, 1),
        Annotation("i", "a", "b", "b", "other", "judge", 1.0, 2.0, 0),
    ]
    write_annotations(tmp_path / "a.json", items)
    assert read_annotations(tmp_path / "a.json") == items


def made_up(path: Path, length_effect: float, prompts: int = 900) -> float:
    """Annotations of a model that writes longer; returns its true win rate at equal lengths."""
    rng = np.random.default_rng(1)
    own, base = rng.integers(600, 1600, prompts), rng.integers(200, 1200, prompts)
    gap = own - base
    p = 1 / (1 + np.exp(-(-0.5 + length_effect * np.tanh(gap / gap.std(ddof=1)))))
    lines = [
        entry(
            instruction=f"i{i}",
            output_1="x" * base[i],
            output_2="y" * own[i],
            preference=1 + int(rng.random() < p[i]),
        )
        for i in range(prompts)
    ]
    path.write_text(json.dumps(lines))
    return float(1 / (1 + np.exp(0.5)))


def test_a_known_win_rate_behind_a_length_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = made_up(tmp_path / "a.json", 1.5)
    (found,) = assess_file(tmp_path / "a.json", None, Resampling(200, 0.99), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [found]
    interval = found["length_controlled"]["win_rate"]["interval"]
    assert interval["low"] < truth < interval["high"]
    assert found["win_rate"]["interval"]["low"] > truth
    assert (found["name"], found["baseline"], found["annotator"], found["prompts"]) == (
        "m",
        "b",
        "judge",
        900,
    )
    shown = capsys.readouterr().out
    for text in ("length-controlled win rate", "Against b, judged by judge", f"{interval['low']:.3f}"):
        assert text in shown


def test_models_and_annotators_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        entry(generator_2="x", preference=2),
        entry(generator_2="y", preference=1),
        entry(annotator="other", preference=None),
    ]
    (tmp_path / "a.json").write_text(json.dumps(lines))
    found = assess_file(tmp_path / "a.json", None, Resampling(50), None)
    assert [(item["name"], item["annotator"], item["win_rate"]["value"]) for item in found] == [
        ("x", "judge", 1.0),
        ("y", "judge", 0.0),
        ("m", "other", None),
    ]
    assert "too few prompts" in capsys.readouterr().out


def test_difficulties_by_index(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry(), entry(generator_2="y"), entry()]))
    items = read_annotations(tmp_path / "a.json")
    csv = tmp_path / "difficulty.csv"
    csv.write_text(",instruction_difficulty\n0,0.5\n1,-1.25\n")
    assert [item.difficulty for item in add_difficulty(items, csv)] == [0.5, 0.5, -1.25]
    csv.write_text("index,instruction_difficulty\n0,0.5\n")
    with pytest.raises(UserError, match="has no difficulty for index 1"):
        add_difficulty(items, csv)
    csv.write_text("index,instruction_difficulty\n0,hard\n")
    with pytest.raises(UserError, match="line 2 is not an index and a difficulty"):
        add_difficulty(items, csv)
    with pytest.raises(UserError, match="cannot read"):
        add_difficulty(items, tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("{}", "is not a JSON list with entries"),
        ("[]", "is not a JSON list with entries"),
        ("[1]", "entry 1 is not an object"),
        (json.dumps([entry(), entry(output_2=None)]), 'entry 2 needs a string in "output_2"'),
        (json.dumps([entry(preference=2.5)]), "has the preference 2.5"),
        (json.dumps([entry(preference="first")]), "give a finite number"),
        (json.dumps([entry(instruction_difficulty="hard")]), "\"instruction_difficulty\" is 'hard'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value)
