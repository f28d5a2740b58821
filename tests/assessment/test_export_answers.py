"""`metareward export answers`: the harnesses' files, field by field, and read by their own loaders where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metareward.assessment import answers, benchmarks
from metareward.assessment.models import LoadedModel
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.sampler.request import Completion, SamplingParams

PARAMS = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=12)
ALPACA = [
    {"instruction": "Name a tea.", "output": "reference", "generator": "gpt4", "dataset": "helpful_base"},
    {"instruction": "Say 🙂.", "output": "reference", "generator": "gpt4", "dataset": "koala"},
]
ARENA_1 = [
    {
        "question_id": "b2",
        "category": "arena-hard-v0.1",
        "cluster": "x",
        "turns": [{"content": "Explain tea."}],
    },
    {
        "question_id": "a1",
        "category": "arena-hard-v0.1",
        "cluster": "y",
        "turns": [{"content": "Explain rain."}],
    },
]
ARENA_2 = [{"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Explain maps."}]
MT = [
    {"question_id": 82, "category": "math", "turns": ["Add 1 and 1.", "Now double it."]},
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Write a line.", "Write it shorter."],
        "reference": [],
    },
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    text = json.dumps(lines) if path.suffix == ".json" else "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text)
    return path


def export(tiny_world: Path, benchmark: Any, questions: Path, out: Path, **changes: Any) -> Path:
    given = {"name": "mine", "params": PARAMS, "own_temperatures": True, "limit": 0, "seed": 0, **changes}
    return answers.export(str(tiny_world / "model"), benchmark, questions, out, **given)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Answers that say what was asked; gives (rendered prompt, temperature) of every request."""
    found: list[tuple[str, float]] = []

    def complete(
        self: LoadedModel, prompts: dict[str, tuple[int, ...]], params: SamplingParams, label: str, unit: str
    ) -> dict[str, Completion]:
        texts = {name: self.chat._tokenizer.decode(prompt) for name, prompt in prompts.items()}
        found.extend((text, params.temperature) for text in texts.values())
        # In another order than asked, as an engine finishes them.
        return {
            name: Completion(
                name, self.chat.encode_completion(f" re: {text.split('<|user|>')[-1][:12]} "), True, []
            )
            for name, text in reversed(texts.items())
        }

    monkeypatch.setattr(LoadedModel, "complete", complete)
    return found


def test_alpaca_eval(tiny_world: Path, tmp_path: Path) -> None:
    final = export(tiny_world, "alpaca-eval", write(tmp_path / "alpaca_eval.json", ALPACA), tmp_path / "out")
    assert final == tmp_path / "out" / "model_outputs.json"
    found = json.loads(final.read_text())
    assert [(line["instruction"], line["dataset"]) for line in found] == [
        (line["instruction"], line["dataset"]) for line in ALPACA
    ]
    for line in found:
        assert set(line) == {"instruction", "output", "generator", "dataset"}
        assert line["generator"] == "mine"
        assert line["output"] != "reference"
    again = export(tiny_world, "alpaca-eval", write(tmp_path / "q.jsonl", ALPACA[::-1]), tmp_path / "two")
    # Real sampling at 0.7, keyed by the question: the order of the file does not matter.
    assert json.loads(again.read_text()) == found[::-1]


def test_arena_hard_in_both_versions(
    tiny_world: Path, tmp_path: Path, asked: list[tuple[str, float]]
) -> None:
    chat = Chat.load(tiny_world / "model")
    final = export(tiny_world, "arena-hard", write(tmp_path / "q.jsonl", ARENA_1), tmp_path / "one")
    assert final.name == "mine.jsonl"
    found = lines_of(final)
    assert [line["question_id"] for line in found] == ["a1", "b2"]
    for line, topic in zip(found, ("rain", "tea"), strict=True):
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["model_id"] == "mine"
        ((choice),) = line["choices"]
        assert choice["index"] == 0
        (turn,) = choice["turns"]
        assert set(turn) == {"content", "token_len"}
        assert topic in turn["content"]
        # v0.1's show_result.py sums these, and stops where one is missing.
        assert turn["token_len"] == len(chat._encode(turn["content"])) > 0
    assert len({line["answer_id"] for line in found}) == 2
    (second,) = lines_of(
        export(tiny_world, "arena-hard", write(tmp_path / "q2.jsonl", ARENA_2), tmp_path / "two")
    )
    assert set(second) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert (second["uid"], second["model"]) == ("u1", "mine")
    assert second["messages"][0] == {"role": "user", "content": "Explain maps."}
    assert second["messages"][-1]["role"] == "assistant"
    assert "maps" in second["messages"][-1]["content"]["answer"]
    assert {temperature for _, temperature in asked} == {0.0}


def test_mt_bench_shows_the_first_answer_in_the_second_turn(
    tiny_world: Path, tmp_path: Path, asked: list[tuple[str, float]]
) -> None:
    found = lines_of(export(tiny_world, "mt-bench", write(tmp_path / "question.jsonl", MT), tmp_path / "out"))
    assert [line["question_id"] for line in found] == [81, 82]
    turns = {line["question_id"]: line["choices"][0]["turns"] for line in found}
    assert all(isinstance(text, str) and text == text.strip() for texts in turns.values() for text in texts)
    assert len(asked) == 4
    second = next(text for text, _ in asked if "Now double it." in text)
    assert f"Add 1 and 1.</s><|assistant|>{turns[82][0]}</s><|user|>Now double it." in second
    # FastChat's temperatures by category.
    assert {("Write" in text, temperature) for text, temperature in asked} == {(True, 0.7), (False, 0.0)}
    export(
        tiny_world,
        "mt-bench",
        tmp_path / "question.jsonl",
        tmp_path / "o",
        own_temperatures=False,
        params=SamplingParams(0.3, max_new_tokens=12),
    )
    assert {temperature for _, temperature in asked[4:]} == {0.3}


def test_a_turn_that_does_not_fit_is_empty_and_told(tiny_world: Path, tmp_path: Path, capsys) -> None:
    long = [MT[1], {**MT[0], "turns": ["x " * 600, "And?"]}]
    final = export(tiny_world, "mt-bench", write(tmp_path / "q.jsonl", long), tmp_path / "out")
    turns = {line["question_id"]: line["choices"][0]["turns"] for line in lines_of(final)}
    assert turns[82] == ["", ""]
    assert turns[81] != ["", ""]
    assert "2 turns have an empty answer" in capsys.readouterr().out
    assert len(lines_of(export(tiny_world, "mt-bench", tmp_path / "q.jsonl", tmp_path / "out", limit=1))) == 1


@pytest.mark.parametrize(
    ("whose", "lines", "sentence"),
    [
        ("alpaca-eval", [{"prompt": "x"}], r'entry 1 has no text in "instruction"'),
        ("alpaca-eval", [ALPACA[0], ALPACA[0]], "entry 2 is the question 'Name a tea.' again"),
        ("arena-hard", MT, r'entry 1 has no "question_id" with texts in "turns"'),
        ("arena-hard", [{"uid": "u"}], r'entry 1 has no text in "prompt"'),
        ("mt-bench", ARENA_1, r'entry 1 has no "question_id" with texts in "turns"'),
        ("mt-bench", [{"question_id": 1, "turns": []}], r'entry 1 has no "question_id"'),
    ],
)
def test_the_wrong_questions_are_refused(
    tiny_world: Path, tmp_path: Path, whose: Any, lines: list[dict[str, Any]], sentence: str
) -> None:
    suffix = "json" if whose == "alpaca-eval" else "jsonl"
    with pytest.raises(UserError, match=sentence):
        export(tiny_world, whose, write(tmp_path / f"q.{suffix}", lines), tmp_path / "out")


def test_names_paths_and_numbers(tiny_world: Path, tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", ARENA_2)
    for changes, sentence in (
        ({"name": "a/b"}, "must do as a file name"),
        ({"limit": -1}, "--limit is -1"),
        ({"out": questions / "below"}, "cannot make the folder"),
    ):
        given = {"out": tmp_path / "out", **changes}
        with pytest.raises(UserError, match=sentence):
            export(tiny_world, "arena-hard", questions, **given)
    with pytest.raises(UserError, match=r"no question of .* fits the model's context of 512 tokens"):
        export(
            tiny_world, "arena-hard", questions, tmp_path / "out", params=SamplingParams(max_new_tokens=510)
        )
    assert not (tmp_path / "out" / "mine.jsonl").exists()
    with pytest.raises(UserError, match="there is no file"):
        export(tiny_world, "mt-bench", tmp_path / "absent.jsonl", tmp_path / "out")
    assert export(tiny_world, "arena-hard", questions, tmp_path / "out", name="").name == "model.jsonl"


def test_alpaca_eval_s_own_loader_reads_it(
    tiny_world: Path, tmp_path: Path, asked: list[tuple[str, float]]
) -> None:
    utils = pytest.importorskip(
        "alpaca_eval.utils", reason="alpaca-eval is not installed", exc_type=ImportError
    )
    final = export(tiny_world, "alpaca-eval", write(tmp_path / "q.json", ALPACA), tmp_path / "out")
    table = utils.load_or_convert_to_dataframe(str(final))
    assert list(table["instruction"]) == [line["instruction"] for line in ALPACA]
    assert utils.get_generator_name(None, table) == "mine"
    assert table["output"].str.len().gt(0).all()


def test_fastchat_s_own_loader_reads_it(
    tiny_world: Path, tmp_path: Path, asked: list[tuple[str, float]]
) -> None:
    common = pytest.importorskip(
        "fastchat.llm_judge.common", reason="fschat is not installed", exc_type=ImportError
    )
    questions = write(tmp_path / "q.jsonl", MT)
    export(tiny_world, "mt-bench", questions, tmp_path / "out")
    found = common.load_model_answers(str(tmp_path / "out"))
    assert list(found) == ["mine"]
    for question in common.load_questions(str(questions), None, None):
        assert len(found["mine"][question["question_id"]]["choices"][0]["turns"]) == len(question["turns"])
    assert common.temperature_config.items() >= benchmarks.TEMPERATURES.items()
