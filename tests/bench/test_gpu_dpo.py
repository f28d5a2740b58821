"""The GPU script of the DPO step, on the CPU at small shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import gpu_dpo
from bench.dpo_job import Job
from bench.gpu_dpo_workload import SHAPES, make_pairs, write_random_model
from bench.workloads import common_length
from metareward.config import TrainSettings
from metareward.model.hf_files import load_decoder
from metareward.training.examples import DataOrder
from metareward.training.packing import pack

PLAIN = {"compile": False, "activation_checkpointing": "none"}


def test_small_shapes_on_the_cpu_write_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_dpo, "VARIANTS", (PLAIN,))
    monkeypatch.setattr(gpu_dpo, "missing", lambda: "not installed: trl")
    gpu_dpo.main(["--device", "cpu", "--shapes", "small", "--steps", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-small-dpo.json")
    record = json.loads(path.read_text())
    ours, *peers = record["rows"]
    assert ours["reason"] is None
    assert ours["first_loss_off"] < 1e-6
    assert len(ours["losses"]) == 2
    # A rubric, four prompts and eight completions; apart, every completion has both before it.
    assert ours["tokens_per_s"] / ours["pairs_per_s"] == pytest.approx((20 + 4 * 30 + 8 * 12) / 4)
    assert ours["unshared_tokens_per_s"] / ours["pairs_per_s"] == pytest.approx(2 * 62)
    assert ours["tflops"] > 0
    assert ours["mfu"] is None
    assert [row["reason"] for row in peers] == ["not installed: trl"] * 2
    assert {"machine", "versions", "commit", "date"} <= record.keys()
    assert "pairs/s" in capsys.readouterr().out


def test_what_had_no_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_dpo, "missing", lambda: "not installed: trl")
    gpu_dpo.main(["--device", "cpu", "--shapes", "small", "--minutes", "0", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row["side"] == "ours"]
    assert len(ours) == len(gpu_dpo.VARIANTS)
    assert {row["reason"] for row in ours} == {"no time was left"}


def test_a_side_that_fails_is_a_row(tmp_path: Path) -> None:
    shapes = SHAPES["small"]
    order = DataOrder(shapes.pairs, shapes.pairs, 1, 0, 1)
    job = Job(tmp_path / "nowhere", make_pairs(shapes, 0), order, TrainSettings())
    row = gpu_dpo.attempt(gpu_dpo.serve_ours, (job, "cpu"), 1, math.inf)
    assert "no model directory" in row["reason"]


@pytest.mark.parametrize("name", list(SHAPES))
def test_pairs_share_what_is_promised(name: str) -> None:
    shapes = SHAPES[name]
    pairs = make_pairs(shapes, seed=0)
    assert len(pairs) == shapes.pairs
    prompts = [pair.prompt for pair in pairs]
    assert {len(prompt) for prompt in prompts} == {shapes.rubric + shapes.prompt}
    assert shapes.rubric <= common_length(min(prompts), max(prompts)) < shapes.rubric + 5
    assert all(len(part) == shapes.completion for pair in pairs for part in pair.completions)
    assert max(max(prompt) for prompt in prompts) < shapes.model.vocab_size
    assert pack(pairs[:4], torch.device("cpu")).tokens < 4 * pairs[0].tokens


def test_the_random_model_loads_here_and_at_the_peer_s(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    write_random_model(folder, SHAPES["small"].model, "cpu", seed=0)
    ours = load_decoder(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = dict(theirs.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in ours.named_parameters())
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 0
