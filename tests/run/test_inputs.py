"""Prompt and quality files: every mistake is named by file and line, and the draw of an iteration's prompts is fair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.errors import UserError
from metareward.run.inputs import Prompt, draw_prompts, locate, read_prompts, read_quality

GOOD_PROMPT = b'{"prompt_id": "a", "prompt": "Hello"}'
GOOD_LABEL = b'{"prompt": "Hello", "response": "Hi", "quality": 0.5}'


def refusal(read, path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError) as caught:
        read(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line ")
    assert "\n" not in message
    return message.removeprefix(f"{path}, line ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "cut off', "3 is not valid JSON"),
        (b"not json", "3 is not valid JSON"),
        (b'["prompt"]', "3 is not a JSON object"),
        (b'"prompt"', "3 is not a JSON object"),
        (b'{"prompt": "caf\xe9"}', "3 is not UTF-8"),
        (b'{"text": "x"}', '3 has no field "prompt"'),
        (b'{"prompt": 7}', '3 needs a string in the field "prompt"'),
        (b'{"prompt": null}', '3 needs a string in the field "prompt"'),
        (b'{"prompt": ""}', '3 has an empty "prompt"'),
        (b'{"prompt": " \\n\\t "}', '3 has an empty "prompt"'),
        (b'{"prompt": "half \\ud83d"}', "3 has half a character"),
        (b'{"prompt_id": "\\udc00", "prompt": "x"}', "3 has half a character"),
        (b'{"prompt_id": "a", "prompt": "Other"}', '3 has the prompt_id "a" of line 1'),
    ],
)
def test_a_bad_prompt_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    # The blank line counts, as in an editor.
    assert refusal(read_prompts, tmp_path / "prompts.jsonl", GOOD_PROMPT, b"", line).startswith(said)


def test_a_repeated_prompt_without_ids_is_named(tmp_path: Path) -> None:
    line = b'{"prompt": "Hello"}'
    assert refusal(read_prompts, tmp_path / "p.jsonl", line, line).startswith(
        "2 repeats the prompt of line 1"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x", "response": "y"}', '2 needs a number from 0 to 1 in "quality", not None'),
        (
            b'{"prompt": "x", "response": "y", "quality": 1.5}',
            '2 needs a number from 0 to 1 in "quality", not 1.5',
        ),
        (b'{"prompt": "x", "response": "y", "quality": -0.1}', "2 needs a number from 0 to 1"),
        (b'{"prompt": "x", "response": "y", "quality": "0.5"}', "2 needs a number from 0 to 1"),
        (b'{"prompt": "x", "response": "y", "quality": true}', "2 needs a number from 0 to 1"),
        (b'{"prompt": "x", "response": "y", "quality": NaN}', "2 needs a number from 0 to 1"),
        (b'{"prompt": "x", "response": "", "quality": 1}', '2 has an empty "response"'),
        (b'{"prompt": "x", "quality": 1}', '2 has no field "response"'),
        (
            b'{"prompt": "x", "response": "y", "quality": 1, "rationale": 3}',
            '2 needs a string in "rationale"',
        ),
        (b'{"prompt": "Hello", "response": "Hi", "quality": 1}', "2 has the response_id "),
        (b'{"prompt": "x", "response": "y", "quality": 1', "2 is not valid JSON"),
    ],
)
def test_a_bad_quality_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    assert refusal(read_quality, tmp_path / "quality.jsonl", GOOD_LABEL, line).startswith(said)


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    first = b'{"prompt_id": "a", "prompt": "x", "response": "1", "quality": 1}'
    second = b'{"prompt_id": "a", "prompt": "y", "response": "2", "quality": 1}'
    assert refusal(read_quality, tmp_path / "q.jsonl", first, second).startswith("2 has another prompt")
    assert refusal(read_prompts, tmp_path / "q.jsonl", first, second).startswith(
        '2 has the prompt_id "a" of line 1'
    )


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.jsonl"):
        read_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="no file"):
        read_prompts(str(tmp_path))
    with pytest.raises(UserError, match="starter:prompts or starter:quality"):
        locate("starter:absent")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="has no lines"):
        read_quality(str(tmp_path / "empty.jsonl"))


def test_good_files_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    labels = [
        {"prompt": "p", "response": "good", "quality": 1, "rationale": "Fine."},
        {"prompt": "p", "response": "bad 🙂", "quality": 0.0, "extra": [1]},
        {"prompt_id": 0, "prompt": "q", "response_id": 0, "response": "good", "quality": 0.4},
    ]
    # As some editors write it: carriage returns, and no end of line at the end.
    path.write_text("\r\n".join(map(json.dumps, labels)))
    found = read_quality(str(path))
    assert [(item.response, item.quality, item.rationale) for item in found] == [
        ("good", 1.0, "Fine."),
        ("bad 🙂", 0.0, None),
        ("good", 0.4, None),
    ]
    assert found[0].prompt_id == found[1].prompt_id != found[2].prompt_id == "0"
    assert read_prompts(str(path)) == [Prompt(found[0].prompt_id, "p"), Prompt("0", "q")]


def test_ids_made_from_texts_do_not_depend_on_the_order(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    one = read_prompts(str(path))
    path.write_text('{"prompt": "y"}\n{"prompt": "x"}\n')
    assert read_prompts(str(path)) == one[::-1]


def test_the_packaged_sets_are_read() -> None:
    assert len(read_prompts("starter:prompts")) >= 40
    assert len({item.prompt_id for item in read_quality("starter:quality")}) >= 40


@given(
    size=st.integers(1, 40),
    share=st.floats(0.01, 1.0),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_no_prompt_comes_again_before_all_were_used(
    size: int, share: float, iterations: int, seed: int
) -> None:
    pool = [Prompt(str(index), f"prompt {index}") for index in range(size)]
    count = max(1, int(size * share))
    used: Counter[str] = Counter()
    for iteration in range(1, iterations + 1):
        drawn = draw_prompts(pool, count, iteration, seed)
        assert len({item.prompt_id for item in drawn}) == len(drawn) == count
        assert drawn == draw_prompts(pool, count, iteration, seed)
        used.update(item.prompt_id for item in drawn)
        times = [used[item.prompt_id] for item in pool]
        assert max(times) - min(times) <= 1


def test_the_draw_depends_on_the_seed_and_shuffles() -> None:
    pool = [Prompt(str(index), "") for index in range(100)]
    first = draw_prompts(pool, 50, 1, 0)
    assert first != draw_prompts(pool, 50, 1, 1)
    assert first != pool[:50]
    assert not set(first) & set(draw_prompts(pool, 50, 2, 0))
    assert draw_prompts(pool, 50, 3, 0) != first


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"per_iteration = 5 but the prompt file has 2: set it to 2"):
        draw_prompts([Prompt("a", "a"), Prompt("b", "b")], 5, 1, 0)
