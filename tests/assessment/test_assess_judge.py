"""`metareward assess judge` from end to end on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from metareward.assessment.judge import assess
from metareward.assessment.judge_data import Judged, read_judge_data
from metareward.assessment.judge_options import options_and_subjects
from metareward.assessment.judging import JudgedResponse, Judgment, draw_pairs
from metareward.assessment.models import LoadedModel, run_subjects
from metareward.errors import UserError
from metareward.sampler.request import Completion


@pytest.fixture
def data(tiny_world: Path, tmp_path: Path) -> Path:
    """Twelve labelled responses to two prompts."""
    lines = (tiny_world / "quality.jsonl").read_text().splitlines()[:12]
    (tmp_path / "quality.jsonl").write_text("\n".join(lines))
    return tmp_path / "quality.jsonl"


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    pairs = [
        {"prompt": f"Explain {topic}.", "chosen": "yes yes", "rejected": f"no {index}"}
        for index, topic in enumerate(("tea", "rain", "maps"))
    ]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path / "preferences.jsonl"


def judge(
    tiny_world: Path, labels: Path | None, preferences: Path | None = None, **options: Any
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": str(tiny_world / "model"),
        "run_dir": None,
        "samples": 2,
        "comparisons": 0,
        "max_new_tokens": 8,
        "judge_template": tiny_world / "judge.txt",
        "meta_judge_template": tiny_world / "meta_judge.txt",
        "hide_scores": None,
        "resamples": 40,
        "seed": 0,
        "limit": 0,
        "out": None,
        **options,
    }
    limit, out = given.pop("limit"), given.pop("out")
    found = read_judge_data(labels, preferences, limit)
    model, run_dir = given.pop("model"), given.pop("run_dir")
    subjects, wanted = options_and_subjects(model, run_dir, **given)
    return assess(subjects, found, wanted, out, {"data": str(labels)})


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "models": [{**item, "seconds": 0} for item in found["models"]]}


def test_figures_are_whole_and_the_same_again(
    tiny_world: Path, data: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    found = judge(tiny_world, data, preferences, out=out)
    assert json.loads(out.read_text()) == found
    (figures,) = found["models"]
    assert (found["responses"], figures["judgments"], figures["left_out_too_long"]) == (18, 36, 0)
    # Every judgment has an expected score, readable or not.
    assert figures["labels"]["expected"]["scored"] == 12
    spearman = figures["labels"]["expected"]["spearman"]
    assert spearman["interval"]["low"] <= spearman["value"] <= spearman["interval"]["high"]
    assert figures["labels"]["expected"]["length"]["score"]["value"] is not None
    accuracy = figures["preferences"]["expected"]
    assert (accuracy["pairs"], accuracy["scored"]) == (3, 3)
    assert 0.0 <= accuracy["accuracy"]["value"] <= 1.0
    assert 0.0 <= figures["parse_rate"] <= 1.0
    assert sum(figures["score_histogram"].values()) == round(figures["parse_rate"] * 36)
    assert figures["meta_judge"] is None
    shown = capsys.readouterr().out
    assert "Spearman" in shown
    assert f"[{spearman['interval']['low']:.3f}," in shown
    assert without_seconds(judge(tiny_world, data, preferences)) == without_seconds(found)


def test_samples_do_not_depend_on_what_else_is_judged(
    tiny_world: Path, data: Path, preferences: Path
) -> None:
    alone = judge(tiny_world, data)["models"][0]
    beside = judge(tiny_world, data, preferences)["models"][0]
    assert alone["labels"]["sampled"] == beside["labels"]["sampled"]
    assert alone["preferences"] is None
    turned = data.with_name("turned.jsonl")
    turned.write_text("\n".join(reversed(data.read_text().splitlines())))
    again = judge(tiny_world, turned)["models"][0]
    assert again["score_histogram"] == alone["score_histogram"]
    assert judge(tiny_world, None, preferences)["models"][0]["labels"] is None
    assert judge(tiny_world, data, limit=3)["responses"] == 3


@pytest.fixture
def made_run(tiny_world: Path, tmp_path: Path) -> Path:
    """A run directory whose seed stage and first of two iterations have left a model."""
    from metareward.recipe_files import check, load_recipe
    from metareward.run.directory import RunDirectory

    run = RunDirectory(tmp_path / "run")
    run.open(check(load_recipe(tiny_world / "recipe.toml")))
    for files in (run.seed, run.iteration(1)):
        files.folder.mkdir()
        shutil.copytree(tiny_world / "model", files.model)
    return run.root


def scripted_completion(model: LoadedModel, name: str, flawed: bool) -> Completion:
    """A judge that scores by people's label, which is the response's number; a meta-judge that takes the first, but the higher
    score where scores differ and the seed's model is asked."""
    words = json.loads(name)
    if "compare" in words:
        first, second = words[-2:]
        by_score = model.subject.name == "seed" and first % 2 != second % 2
        text = f"Winner: Judgement {'A' if not by_score or first % 2 else 'B'}"
    else:
        # Odd samples are a point higher, up to 5; iteration 1 always says 5.
        score = min(int(words[3]) + words[-1] % 2, 5) if model.subject.name == "seed" else 5
        text = "no verdict" if flawed and words[-1] == 3 else f"Score: {score}"
    return Completion(name, model.chat.encode_completion(text), True, [])


def test_every_iteration_of_a_run_has_its_column(
    made_run: Path, tiny_world: Path, data: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted judges of known quality and bias, through the whole command."""

    def complete(
        self: LoadedModel, prompts: dict, params: object, label: str, unit: str
    ) -> dict[str, Completion]:
        return {name: scripted_completion(self, name, flawed=True) for name in prompts}

    monkeypatch.setattr(LoadedModel, "complete", complete)
    unset = {"model": None, "judge_template": None, "meta_judge_template": None, "max_new_tokens": None}
    found = judge(tiny_world, data, run_dir=made_run, samples=4, comparisons=10, **unset)
    seed, iteration = found["models"]
    assert [seed["name"], iteration["name"]] == ["seed", "iteration 1"]
    # The recipe's limits, not those of --model.
    assert (found["judging"]["max_new_tokens"], found["comparing"]["max_new_tokens"]) == (32, 96)
    for item in (seed, iteration):
        assert item["parse_rate"] == 0.75
        assert (item["meta_judge"]["pairs"], item["meta_judge"]["comparisons"]) == (10, 20)
        assert item["meta_judge"]["readable"]["value"] == 1.0
    assert seed["labels"]["sampled"]["spearman"]["value"] == pytest.approx(1.0)
    assert seed["labels"]["sampled"]["kendall"]["value"] == pytest.approx(1.0)
    assert seed["labels"]["sampled"]["pairwise"]["value"] == 1.0
    assert seed["labels"]["sampled"]["exact"]["value"] == 1.0
    # Three readable scores a response: n, n + 1, n.
    assert seed["score_histogram"] == {"0": 4, "1": 6, "2": 6, "3": 6, "4": 6, "5": 8}
    # A judge that gives 5 to everything ranks nothing: half of all pairs, all of them ties.
    assert iteration["score_histogram"]["5"] == iteration["judgments"] * 0.75
    assert iteration["score_entropy"] == 0.0
    constant = iteration["labels"]["sampled"]
    assert (constant["spearman"]["value"], constant["pairwise"]["value"], constant["tied"]["value"]) == (
        None,
        0.5,
        1.0,
    )
    assert constant["exact"]["value"] == pytest.approx(1 / 6)
    drifted = iteration["meta_judge"]
    assert (drifted["position"]["value"], drifted["consistent"]["value"]) == (1.0, 0.0)
    assert drifted["equal_scores"] == 20
    assert drifted["higher_score"]["value"] is None
    assert seed["meta_judge"]["higher_score"]["value"] == 1.0
    assert seed["meta_judge"]["position_unequal"]["value"] == 0.5
    shown = capsys.readouterr().out
    for text in ("iteration 1", "first position wins", "same winner in both orders", "none"):
        assert text in shown


def test_a_run_without_a_seed_stage_begins_with_its_starting_model(made_run: Path, tiny_world: Path) -> None:
    recipe = made_run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[seed]\nenabled = true", "[seed]\nenabled = false"))
    subjects, _ = run_subjects(made_run)
    assert [item.name for item in subjects] == ["start", "iteration 1"]
    shutil.rmtree(made_run / "iteration-1")
    with pytest.raises(UserError, match="has no model yet"):
        run_subjects(made_run)


def test_pairs_are_spread_over_responses() -> None:
    def response(name: str, scores: list[float | None], finished: bool = True) -> JudgedResponse:
        made = [Judgment(i, "", (), finished, score, 0.0) for i, score in enumerate(scores)]
        return JudgedResponse(Judged("labels", name, "", "r", ""), made)

    judged = [
        response("a", [1, 2, 3, 4]),
        response("b", [1, None, 2]),
        response("c", [None, 3]),
        response("d", [1, 2], finished=False),
        JudgedResponse(Judged("labels", "e", "", "r", ""), None),
    ]

    def names(count: int, seed: int) -> list[tuple[str, int, int]]:
        return [
            (pair.judged.response.prompt_id, pair.one.sample, pair.two.sample)
            for pair in draw_pairs(judged, count, seed)
        ]

    assert sorted(name for name, _, _ in names(2, 0)) == ["a", "b"]
    everything = names(99, 0)
    assert len(everything) == len(set(everything)) == 7
    assert names(4, 0) == everything[:4]
    assert {tuple(names(1, seed)) for seed in range(30)} > {(everything[0],)}
    assert draw_pairs(list(reversed(judged)), 5, 0) == draw_pairs(judged, 5, 0)


def test_nothing_fits(tiny_world: Path, data: Path) -> None:
    with pytest.raises(UserError, match=r"no judge prompt fits the context of .*, 512 tokens"):
        judge(tiny_world, data, max_new_tokens=500)


def test_what_makes_no_sense(tiny_world: Path, data: Path, preferences: Path, tmp_path: Path) -> None:
    for options, sentence in (
        ({"samples": 0}, "--samples is 0"),
        ({"limit": -1}, "--limit is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"samples": 1, "comparisons": 5}, "give --samples 2 or more"),
        ({"resamples": -1}, "--resamples -1"),
        ({"run_dir": tmp_path, "model": None}, "is not a run directory"),
    ):
        with pytest.raises(UserError, match=sentence):
            judge(tiny_world, data, **options)
    with pytest.raises(UserError, match="give --data with people's labels"):
        judge(tiny_world, None)
    for line, sentence in (
        ('{"prompt": "p", "chosen": "a"}', 'line 2 has no field "rejected"'),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "line 2 has the same text"),
        (preferences.read_text().splitlines()[0], "line 2 repeats the pair of line 1"),
    ):
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(preferences.read_text().splitlines()[0] + "\n" + line + "\n")
        with pytest.raises(UserError, match=sentence):
            judge(tiny_world, None, wrong)
