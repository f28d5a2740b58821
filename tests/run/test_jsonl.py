"""Files that survive a kill: whole under their final name, part files whose torn last line is dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metareward.errors import UserError
from metareward.run.jsonl import (
    PartFile,
    check_writable,
    cut_torn_line,
    encode,
    part_files,
    read_jsonl,
    read_parts,
    write_jsonl,
    write_text,
)

# Line separators of Unicode and control characters must stay inside their line.
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\u2028", "\x85", "a\r\nb", "\x0c", "\x1c"]
)
LINES = st.lists(
    st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(st.integers()), min_size=1), max_size=8
)


@given(lines=LINES)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lines: list[dict]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    write_jsonl(path, lines)
    assert read_jsonl(path) == lines
    assert [item.name for item in path.parent.iterdir()] == ["x.jsonl"]


def test_an_error_midway_leaves_the_old_file_and_no_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])

    def lines():
        yield {"a": 2}
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_jsonl(path, lines())
    assert read_jsonl(path) == [{"a": 1}]


def test_a_leftover_temporary_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.tmp").write_text('{"half": ')
    write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}]
    assert not (tmp_path / "x.jsonl.tmp").exists()


def test_a_missing_or_changed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl is missing"):
        read_jsonl(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2"):
        read_jsonl(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": 1}\n"\xff"\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 3"):
        read_jsonl(tmp_path / "x.jsonl")


@given(lines=LINES.filter(bool), data=st.data())
def test_a_kill_at_any_byte_costs_at_most_the_line_it_hit(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict], data: st.DataObject
) -> None:
    final = tmp_path_factory.mktemp("parts") / "x.jsonl"
    whole = "".join(map(encode, lines)).encode()
    cut = data.draw(st.integers(0, len(whole)))
    Path(f"{final}.part-0").write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert list(read_parts(final)) == lines[:kept]
    part = PartFile(final, 0)
    for line in lines[kept:]:
        part.append(line)
    part.close()
    assert list(read_parts(final)) == lines


def test_parts_of_more_ranks_than_now_are_read(tmp_path: Path) -> None:
    final = tmp_path / "x.jsonl"
    for rank in range(11):
        part = PartFile(final, rank)
        part.append({"rank": rank})
        part.close()
    with Path(f"{final}.part-10").open("a") as file:
        file.write('{"rank": 1')
    assert sorted(line["rank"] for line in read_parts(final)) == list(range(11))
    assert len(part_files(final)) == 11


def test_an_appended_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "x.jsonl", 3)
    part.append({"text": "y" * 100_000})
    assert len(list(read_parts(tmp_path / "x.jsonl"))) == 1
    part.close()


def test_a_whole_but_broken_part_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.part-0").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(UserError, match="part-0, line 2"):
        list(read_parts(tmp_path / "x.jsonl"))


def test_cutting_leaves_whole_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    cut_torn_line(path)
    assert not path.exists()
    for before, after in ((b"", b""), (b"ab", b""), (b"ab\n", b"ab\n"), (b"ab\ncd", b"ab\n")):
        path.write_bytes(before)
        cut_torn_line(path)
        assert path.read_bytes() == after


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "one")
    write_text(tmp_path / "t", "two\n")
    assert (tmp_path / "t").read_text() == "two\n"
    assert json.loads(encode({"ü": "\u2028"})) == {"ü": "\u2028"}


def test_unwritable_places_are_told_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    with pytest.raises(UserError, match=r"absent/new\.json"):
        check_writable(tmp_path / "absent" / "new.json")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path)
