"""A user's mistake ends in exit code 2 and one sentence on stderr that names the thing; never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.recipe_files import check, load_recipe
from metareward.run.directory import RunDirectory
from metareward.training.examples import check_batch

Recipe = Callable[..., Path]


@pytest.fixture
def model(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_world / "model", tmp_path / "damaged"))


@pytest.fixture
def refused(metareward, tmp_path: Path) -> Callable[..., str]:
    """The sentence that `metareward run RECIPE ...` ends in."""
    return lambda path, *options: metareward("run", path, "--run-dir", tmp_path / "run", *options).sentence


def test_recipes(metareward, refused, tmp_path: Path) -> None:
    assert "there is no recipe absent.toml" in refused("absent.toml")
    path = tmp_path / "bad.toml"
    path.write_text("[respond\n")
    assert f"{path} is not valid TOML" in refused(path)
    path.write_text("[respond]\ntemprature = 1.0\n")
    assert "unknown setting respond.temprature; did you mean respond.temperature?" in refused(path)
    path.write_text("")
    assert "model.name is not set" in refused(path)
    assert "needs a recipe first" in metareward("run", "--run-dir", tmp_path / "run", path).sentence
    assert not (tmp_path / "run").exists()


def test_one_line_and_no_traceback_in_a_process_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    command = [
        sys.executable,
        "-m",
        "metareward",
        "run",
        str(recipe(**{"prompts.file": tmp_path / "prompts.jsonl"})),
    ]
    ended = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert not ended.stdout
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert f"{tmp_path / 'prompts.jsonl'}, line 2 is not valid JSON" in ended.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--respond.samples", "1"), "respond.samples = 1"),
        (("--judge.samples", "1"), "judge.samples = 1"),
        (("--respond.top-p", "1.5"), "respond.top_p = 1.5"),
        (("--prompts.per-iteration", "13"), "prompts.per_iteration = 13 but the prompt file has 12"),
        (("--respond.max-new-tokens", "512"), "respond.max_new_tokens = 512 leaves no room"),
        (("--meta-judge.max-new-tokens", "600"), "meta_judge.max_new_tokens = 600 leaves no room"),
        (("--prompts.file", "absent.jsonl"), "there is no file"),
        (("--judge.template", "absent.txt"), "the template"),
        (("--model.name", "absent-model"), "There is no model directory absent-model"),
    ],
)
def test_settings_that_cannot_work(refused, recipe: Recipe, options: tuple[str, str], said: str) -> None:
    assert said in refused(recipe(), *options)


def test_a_mistake_does_not_bind_the_run_directory(refused, recipe: Recipe) -> None:
    path = recipe()
    assert "there is no file" in refused(path, "--prompts.file", "absent.jsonl")
    # The mended setting is not "another recipe".
    assert "there is no file" in refused(path, "--prompts.file", "also-absent.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'prompt': 1}", "line 2 is not valid JSON"),
        ('{"prompt": "  "}', 'line 2 has an empty "prompt"'),
        ('{"prompt_id": "a", "prompt": "y"}', 'line 2 has the prompt_id "a" of line 1'),
        (json.dumps({"prompt": "tea " * 600}), "tokens and at most 480 fit"),
    ],
)
def test_prompt_files(refused, recipe: Recipe, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt_id": "a", "prompt": "x"}}\n{line}\n')
    sentence = refused(recipe(**{"prompts.file": path, "prompts.per_iteration": 2}))
    assert said in sentence
    assert str(path) in sentence


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 2 is not valid JSON"),
        ('{"prompt": "x", "response": "y"}', 'line 2 needs a number from 0 to 1 in "quality"'),
        (
            '{"prompt": "x", "response": "y", "quality": 3}',
            'line 2 needs a number from 0 to 1 in "quality", not 3',
        ),
    ],
)
def test_quality_files(metareward, refused, recipe: Recipe, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "quality.jsonl"
    path.write_text(f'{{"prompt": "x", "response": "z", "quality": 1}}\n{line}\n')
    assert said in refused(recipe(**{"seed.file": path, "seed.enabled": True}))
    assert said in metareward("assess", "judge", "--model", "unused", "--data", path).sentence


def test_a_model_without_tokenizer_or_template(refused, recipe: Recipe, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    path = recipe(**{"model.name": model})
    assert "has no chat template" in refused(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert "has no tokenizer" in refused(path)
    (model / "config.json").unlink()
    assert "damaged" in refused(path)


def test_damaged_weights(metareward, refused, recipe: Recipe, model: Path, tmp_path: Path) -> None:
    path, weights = recipe(**{"model.name": model}), model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged or half-written" in refused(path)
    weights.unlink()
    assert "has no model.safetensors" in refused(path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "model.norm.weight holds NaN or infinite values" in refused(path)
    # Mended, and the same command goes on. This model was never taught to judge, so it comes as far as the pairs.
    weights.write_bytes(whole)
    ended = metareward("run", path, "--run-dir", tmp_path / "run")
    assert ended.code == 2
    assert "no preference pairs to train on" in ended.err.splitlines()[-1]


def test_no_pairs_left(metareward, made_run: Path) -> None:
    folder = made_run / "iteration-1"
    assert "actor_pairs.jsonl is missing: run the stage" in metareward("stage", "train", made_run).sentence
    (folder / "actor_pairs.jsonl").write_text("")
    sentence = metareward("stage", "train", made_run).sentence
    assert "iteration 1 has no preference pairs to train on" in sentence
    assert "metrics.jsonl" in sentence
    assert "respond.samples" in sentence
    assert not (folder / "model").exists()


def test_pairs_that_are_all_too_long(metareward, made_run: Path) -> None:
    assert metareward("stage", "actor_pairs", made_run).code == 0
    recipe = made_run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("max_tokens = 4096", "max_tokens = 3"))
    assert (
        "no preference pairs to train on, actor_too_long: 1"
        in metareward("stage", "train", made_run).sentence
    )


def test_a_world_size_that_does_not_divide_the_batch() -> None:
    check_batch(32, 8, "train.batch_pairs")
    with pytest.raises(
        UserError, match=r"train\.batch_pairs = 32 does not divide over 5 .*set it to 30 or 35"
    ):
        check_batch(32, 5, "train.batch_pairs")
    with pytest.raises(UserError, match=r"set it to 8\b"):
        check_batch(4, 8, "train.batch_pairs")


def test_run_directories(metareward, refused, recipe: Recipe, made_run: Path, tmp_path: Path) -> None:
    sentence = metareward("run", recipe(), "--run-dir", made_run, "--random-seed", "8").sentence
    assert f"{made_run} was made by another recipe" in sentence
    assert "random_seed: 7 -> 8" in sentence
    assert "iteration.0.meta_judge: False -> True" in sentence
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("Dear")
    assert "has no recipe.toml" in refused(recipe())
    for words in (("summary",), ("stage", "judge"), ("export", "pairs")):
        assert "is not a run directory" in metareward(*words, tmp_path / "run").sentence
    assert "iterations 1 to 1, not 4" in metareward("stage", "judge", made_run, "--iteration", "4").sentence


def test_output_that_cannot_be_written(metareward, made_run: Path, tmp_path: Path) -> None:
    metareward("stage", "actor_pairs", made_run)
    out = tmp_path / "absent" / "x.jsonl"
    assert f"cannot write {out}" in metareward("export", "pairs", made_run, "--out", out).sentence
    data = tmp_path / "q.jsonl"
    data.write_text('{"prompt": "x", "response": "y", "quality": 1}\n')
    words = ("assess", "judge", "--model", "unused", "--data", data)
    assert f"cannot write {out}" in metareward(*words, "--json", out).sentence
    assert "give 1 judgment a response or more" in metareward(*words, "--samples", "0").sentence
    assert "either a GGUF file or --packaged" in metareward("import", "gguf", "--out", out).sentence


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_when_a_file_is_synced(
    refused, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in refused(recipe(**{"prompts.file": "absent.jsonl"}))
    assert not (tmp_path / "run" / "recipe.toml").exists()
    monkeypatch.setattr(os, "fsync", real)
    # What the first try left is no obstacle.
    assert "there is no file" in refused(recipe(**{"prompts.file": "absent.jsonl"}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of half a megabyte, where this user may mount one."""
    disk = tmp_path / "small-disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))
    return filler


def test_a_full_disk_in_the_midst_of_a_stage(metareward, recipe: Recipe, small_disk: Path) -> None:
    command = ("stage", "respond", small_disk / "run")
    settings = check(load_recipe(recipe(**{"prompts.per_iteration": 12, "respond.samples": 20})))
    RunDirectory(small_disk / "run").open(settings)
    filler = fill(small_disk, leave=24_576)
    ended = metareward(*command)
    assert ended.code == 2
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("metareward: the disk is full")
    assert "run the same command again" in last
    folder = small_disk / "run" / "iteration-1"
    assert not (folder / "responses.jsonl").exists()
    before = (folder / "responses.jsonl.part-0").read_bytes()
    assert before.count(b"\n") >= 1
    filler.unlink()
    assert metareward(*command).code == 0
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({(line["prompt_id"], line["response_id"]) for line in lines}) == len(lines) == 240
    kept = [json.loads(line) for line in before.splitlines() if line.endswith(b"}")]
    by_key = {(line["prompt_id"], line["response_id"]): line for line in lines}
    assert all(by_key[line["prompt_id"], line["response_id"]]["text"] == line["text"] for line in kept)
    assert {path.name for path in folder.iterdir()} == {"prompts.jsonl", "responses.jsonl"}


def test_a_full_disk_while_a_model_or_checkpoint_is_written(tiny_world: Path, small_disk: Path) -> None:
    from metareward.model.hf_files import iterate_tensors, read_config, save_model
    from metareward.run import ranks
    from metareward.training.checkpoint import checkpoint_folders, load_checkpoint
    from metareward.training.checkpoint_writer import save_checkpoint
    from metareward.training.optimizer import build_optimizer
    from metareward.training.sharded import load_sharded

    source = tiny_world / "model"
    filler = fill(small_disk, leave=65_536)
    with pytest.raises((UserError, OSError)) as caught:
        save_model(
            small_disk / "model",
            iterate_tensors(source),
            read_config(source),
            tokenizer_from=source,
            dtype=torch.float32,
        )
    assert isinstance(caught.value, UserError) or caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    ranks.start_ranks()
    try:
        settings = TrainSettings(compute_dtype="float32")
        decoder = load_sharded(source, settings, torch.device("cpu"), 1)
        optimizer = build_optimizer(decoder, settings)
        with pytest.raises(UserError, match=r"checkpoint .*step-000002 cannot be written .* MB are free"):
            save_checkpoint(small_disk, 2, decoder, optimizer, keep=1)
        filler.unlink()
        assert not checkpoint_folders(small_disk)
        assert load_checkpoint(small_disk, decoder, optimizer) == 0
        assert not list(small_disk.iterdir())
    finally:
        ranks.stop_ranks()


def test_an_unreadable_checkpoint_is_named(tiny_world: Path, tmp_path: Path) -> None:
    from metareward.run import ranks
    from metareward.training.checkpoint import load_checkpoint
    from metareward.training.checkpoint_writer import save_checkpoint
    from metareward.training.optimizer import build_optimizer
    from metareward.training.sharded import load_sharded

    ranks.start_ranks()
    try:
        settings = TrainSettings(compute_dtype="float32")
        decoder = load_sharded(tiny_world / "model", settings, torch.device("cpu"), 1)
        optimizer = build_optimizer(decoder, settings)
        for step in (1, 2):
            save_checkpoint(tmp_path, step, decoder, optimizer, keep=2)
        for path in (tmp_path / "step-000002").glob("*.distcp"):
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(
            UserError, match=r"step-000002 cannot be read .*goes on from step-000001"
        ) as caught:
            load_checkpoint(tmp_path, decoder, optimizer)
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "step-000002")
        assert load_checkpoint(tmp_path, decoder, optimizer) == 1
    finally:
        ranks.stop_ranks()
