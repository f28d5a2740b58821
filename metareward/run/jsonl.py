"""JSON lines that survive a kill: complete files under their final name, unfinished ones beside them.

A file `x.jsonl` is written whole to `x.jsonl.tmp`, synced and renamed. While a stage works, finished requests are appended to
`x.jsonl.part-<rank>`, one line each, flushed at once; a line that a kill cut short is dropped when the stage goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from metareward.errors import UserError

Line = dict[str, Any]


def read_jsonl(path: Path, *, without: Collection[str] = ()) -> list[Line]:
    """All lines of a complete file that a stage wrote; fields named in `without` are left out, to save their memory.

    Raises:
        UserError: naming file and line where one is not valid JSON, which means that something else wrote to it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run the stage that writes it first")
    lines = []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError:
                raise UserError(
                    f"{path}, line {number} is not valid JSON: the file was changed after the run wrote it; "
                    f"delete it and run again to make it anew"
                ) from None
            for name in without:
                line.pop(name, None)
            lines.append(line)
    return lines


def write_jsonl(path: Path, lines: Iterable[Line]) -> None:
    """Write a complete file: a temporary name, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(encode(line))
        sync(file)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in the same all-or-nothing way."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        sync(file)
    os.replace(temporary, path)
    sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Whether a file can be written there, asked before the work that it is for.

    Raises:
        UserError: its folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: give a file in a folder that is there and can be written to")


def encode(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


def sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without a line end, which is what a kill in the middle of a write leaves."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


class PartFile:
    """The unfinished work of one rank: append-only, one finished request a line.

    Opening it cuts off a last line that a kill cut short.
    """

    def __init__(self, final: Path, rank: int) -> None:
        self.path = final.with_name(f"{final.name}.part-{rank}")
        cut_torn_line(self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def append(self, line: Line) -> None:
        self.file.write(encode(line))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def part_files(final: Path) -> list[Path]:
    """Unfinished files of `final`, of whatever ranks an earlier start had."""
    return sorted(final.parent.glob(f"{final.name}.part-*"))


def read_parts(final: Path) -> Iterator[Line]:
    """Finished requests of all ranks so far; a last line cut short by a kill is passed over."""
    for path in part_files(final):
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    continue
                try:
                    yield json.loads(raw)
                except ValueError:
                    raise UserError(
                        f"{path}, line {number} is not valid JSON: something else changed the file; remove that line and "
                        f"run again"
                    ) from None
