"""`metareward assess responses`: scripted judges of known preference, and real sampling on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from metareward.assessment.annotations import read_annotations
from metareward.assessment.compare_responses import ResponseOptions, assess
from metareward.assessment.interval import Resampling
from metareward.assessment.models import LoadedModel, Subject
from metareward.assessment.prompt_set import read_prompt_set
from metareward.errors import UserError
from metareward.run.inputs import Prompt
from metareward.sampler.request import Completion, SamplingParams

pytest.importorskip("sklearn", reason="the length-controlled win rate needs scikit-learn")

TEMPLATE = "{instruction}\nA: {response_a}\nB: {response_b}\n"
PROMPTS = [Prompt(f"p{index}", f"Tell me about {index}.") for index in range(24)]


def options(**changes: Any) -> ResponseOptions:
    given: dict[str, Any] = {
        "responding": SamplingParams(max_new_tokens=12),
        "judging": SamplingParams(temperature=0.0, max_new_tokens=8),
        "judge_template": TEMPLATE,
        "seed": 0,
        "resampling": Resampling(60),
        "difficulty": None,
        **changes,
    }
    return ResponseOptions(**given)


@pytest.fixture
def subjects(tiny_world: Path) -> dict[str, Subject]:
    return {name: Subject(name, tiny_world / "model") for name in ("good", "bad", "same", "base", "judge")}


def script(monkeypatch: pytest.MonkeyPatch, verdict: str) -> list[str]:
    """Answers by model name; a judge that goes by quality, by position, or says nothing. Returns the identities it was asked."""
    asked: list[str] = []

    def complete(
        self: LoadedModel, prompts: dict[str, tuple[int, ...]], params: object, label: str, unit: str
    ) -> dict[str, Completion]:
        found = {}
        for name, prompt in prompts.items():
            words = json.loads(name)
            if "respond" in words:
                number = int(words[-1][1:])
                own = {"good": "gem", "bad": "junk", "base": "fair"}
                text = f"{own.get(self.subject.name, 'fair')} {'yes ' * (number % 5)}"
            else:
                asked.append(name)
                shown = self.chat.decode(prompt)
                a, b = (shown.index(key) for key in ("A:", "B:"))
                first, second = shown[a:b], shown[b:]
                rank = [
                    next(k for k, w in enumerate(("junk", "fair", "gem")) if w in text)
                    for text in (first, second)
                ]
                by_quality = "A" if rank[0] > rank[1] else "B"
                text = {"quality": f"Winner: Response {by_quality}", "first": "Winner: A", "silent": "Hm."}[
                    verdict
                ]
            found[name] = Completion(name, self.chat.encode_completion(text), True, [])
        return found

    monkeypatch.setattr(LoadedModel, "complete", complete)
    return asked


def run(subjects: dict[str, Subject], names: list[str], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return assess(
        [subjects[name] for name in names],
        subjects["base"],
        subjects["judge"],
        PROMPTS,
        options(**changes),
        tmp_path / "out.json",
        tmp_path / "annotations.json",
    )


def test_a_judge_that_knows_quality(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = script(monkeypatch, "quality")
    found = run(subjects, ["good", "bad", "same"], tmp_path)
    good, bad, same = found["models"]
    assert [item["win_rate"]["value"] for item in (good, bad, same)] == [1.0, 0.0, 0.5]
    assert [item["length_controlled"]["win_rate"]["value"] for item in (good, bad, same)] == [
        1.0,
        0.0,
        pytest.approx(0.5),
    ]
    # Half the time the better one is shown first; equal responses are not asked about.
    assert (good["first_position_wins"], good["readable"], good["verdicts"]) == (0.5, 1.0, 48)
    assert (same["equal_responses"], same["verdicts"], same["readable"]) == (24, 0, None)
    assert len(asked) == len(set(asked)) == 96
    assert json.loads((tmp_path / "out.json").read_text()) == found
    written = read_annotations(tmp_path / "annotations.json")
    assert {(item.generator_2, item.preference) for item in written} == {
        ("good", 1.0),
        ("bad", 0.0),
        ("same", 0.5),
    }
    assert all(item.output_1.startswith("fair") for item in written)
    shown = capsys.readouterr().out
    for text in ("length-controlled win rate", "good", "bad", "Responses against base, judged by judge"):
        assert text in shown
    assert "could be read" not in shown


def test_a_judge_that_takes_the_first_decides_nothing(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "first")
    (good,) = run(subjects, ["good"], tmp_path)["models"]
    assert (good["win_rate"]["value"], good["ties"], good["first_position_wins"]) == (0.5, 24, 1.0)


def test_a_judge_that_says_nothing_gives_no_win_rate(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    script(monkeypatch, "silent")
    (good,) = run(subjects, ["good"], tmp_path)["models"]
    assert (good["win_rate"]["value"], good["left_out"], good["readable"]) == (None, 24, 0.0)
    shown = capsys.readouterr().out
    assert "too few prompts" in shown
    assert "good: only 0% of the judge's verdicts could be read" in shown


def test_the_whole_path_samples_by_prompt_only(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """Real sampling: equal weights answer alike, so every comparison is of equal responses; another seed answers otherwise."""
    found = run(subjects, ["same"], tmp_path)["models"][0]
    assert found["equal_responses"] == 24
    first = [item.output_2 for item in read_annotations(tmp_path / "annotations.json")]
    run(subjects, ["same"], tmp_path, seed=1)
    second = [item.output_2 for item in read_annotations(tmp_path / "annotations.json")]
    assert first != second


def test_comparisons_of_another_model_are_asked(
    subjects: dict[str, Subject], tiny_world: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_world / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    found = run({**subjects, "good": Subject("good", other)}, ["good"], tmp_path)["models"][0]
    assert found["verdicts"] > 0
    assert found["prompts"] + found["left_out"] == 24


def test_what_does_not_fit(
    subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r'the prompt "p0" has \d+ tokens and at most 2 fit good'):
        assess(
            [subjects["good"]],
            subjects["good"],
            subjects["judge"],
            PROMPTS,
            options(responding=SamplingParams(max_new_tokens=510)),
            None,
            None,
        )
    script(monkeypatch, "quality")
    (good,) = run(subjects, ["good"], tmp_path, judging=SamplingParams(max_new_tokens=505))["models"]
    assert (good["left_out_too_long"], good["left_out"]) == (24, 24)


def test_prompt_sets(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "difficulty": 1}\n{"prompt": "b", "difficulty": -0.5, "prompt_id": "own"}\n'
    )
    prompts, difficulty = read_prompt_set(path, 0)
    assert difficulty == {prompts[0].prompt_id: 1.0, "own": -0.5}
    assert len(read_prompt_set(path, 1)[0]) == 1
    path.write_text('{"prompt": "a"}\n')
    assert read_prompt_set(path, 0)[1] is None
    for line, sentence in (
        ('{"prompt": "b", "difficulty": 2}', 'line 1 has no "difficulty" while others have'),
        ('{"prompt": "b", "difficulty": "hard"}', "line 2 needs a finite number"),
    ):
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(UserError, match=sentence):
            read_prompt_set(path, 0)
