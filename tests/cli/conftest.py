"""`metareward ...` called in this process: exit code, stdout, stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from metareward.cli import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What a user's mistake gives: exit code 2, and on stderr one line, which is returned."""
        assert self.code == 2, self
        assert self.err.startswith("metareward: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        assert "Traceback" not in self.err
        return self.err.strip()


Call = Callable[..., Ended]


@pytest.fixture
def metareward(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    # Help is wrapped to the terminal's width.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        code: object = 0
        try:
            main([str(item) for item in arguments])
        except SystemExit as end:
            code = end.code or 0
        assert not dist.is_initialized(), "a process group was left behind"
        assert isinstance(code, int)
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture
def recipe(tiny_world: Path, tmp_path: Path) -> Callable[..., Path]:
    """recipe(**{"model.name": ...}) writes the tiny recipe with some settings replaced and without a seed stage."""
    import tomllib

    import tomli_w

    def write(**changes: object) -> Path:
        tree = tomllib.loads((tiny_world / "recipe.toml").read_text())
        tree["seed"]["enabled"] = False
        for name, value in changes.items():
            table = tree
            *sections, key = name.split(".")
            for section in sections:
                table = table.setdefault(section, {})
            table[key] = str(value) if isinstance(value, Path) else value
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return write


def sampled(index: int) -> dict[str, object]:
    """Tokens of a finished completion, others for every index."""
    return {"token_ids": [40 + index, 41, 1], "finished": True}


@pytest.fixture
def made_run(metareward: Call, recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A run directory with responses and judgments of which one prompt gives an actor pair; no model was needed."""
    from metareward.recipe_files import check, load_recipe
    from metareward.run.directory import RunDirectory

    run = RunDirectory(tmp_path / "made-run")
    run.open(check(load_recipe(recipe(iteration=[{"meta_judge": False}]))))
    folder = run.iteration(1).folder
    folder.mkdir()
    head = {"prompt_id": "p0"}
    lines = {
        "prompts": [{**head, "prompt": "Tell me about tea."}],
        "responses": [
            {**head, "response_id": index, "text": text, **sampled(index), "duplicate_of": None}
            for index, text in enumerate(("It helps.", "No."))
        ],
        "judgments": [
            {**head, "response_id": index, "judgment_id": 0, "text": "...", **sampled(index), "score": score}
            for index, score in enumerate((4.0, 2.0))
        ],
    }
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return run.root
