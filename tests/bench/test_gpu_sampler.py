"""The GPU script on the CPU at small shapes, and its limits against figures worked out by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_sampler
from bench.gpu_sampler_workload import SHAPES, make_requests
from bench.record import ROOT
from bench.workloads import common_length
from metareward.config import Recipe
from metareward.model.decoder import Decoder


def test_limits_of_llama3_8b_are_the_hand_figures() -> None:
    shapes = SHAPES["llama3-8b"]
    with torch.device("meta"):
        decoder = Decoder(shapes.model).to(torch.bfloat16)
    sizes = gpu_sampler.step_bytes(decoder, shapes)
    assert sizes["weights"] / 1e9 == pytest.approx(15.0, abs=0.05)
    assert sizes["shared_kv"] / 1e9 == pytest.approx(19.9, abs=0.05)
    assert sizes["unshared_kv"] / 1e9 == pytest.approx(50.3, abs=0.05)
    limits = gpu_sampler.limit_tokens_per_s(shapes, sizes, 3.0e12)
    assert limits["limit_tokens_per_s"] == pytest.approx(22_000, rel=0.01)
    assert limits["unshared_limit_tokens_per_s"] == pytest.approx(11_750, rel=0.01)


@pytest.mark.parametrize("name", list(SHAPES))
def test_requests_share_what_is_promised(name: str) -> None:
    shapes = SHAPES[name]
    prompts = [request.prompt for request in make_requests(shapes, seed=0)]
    assert len(prompts) == shapes.batch
    assert {len(prompt) for prompt in prompts} == {shapes.prompt}
    assert shapes.prompt + (shapes.few + shapes.many) / 2 == shapes.context
    assert shapes.prompt + shapes.many <= shapes.model.max_context
    first = prompts[: shapes.group]
    assert shapes.shared <= common_length(min(first), max(first)) < shapes.shared + 3
    assert common_length(prompts[0], prompts[shapes.group]) < 3


def test_small_shapes_on_the_cpu_write_a_record(tmp_path: Path) -> None:
    gpu_sampler.main(["--device", "cpu", "--shapes", "small", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-small-sampler.json")
    record = json.loads(path.read_text())
    assert record["shapes"] == "small"
    assert record["decode_tokens_per_s"] > 0
    assert record["share_of_limit"] == record["decode_tokens_per_s"] / record["limit_tokens_per_s"]
    assert record["limit_tokens_per_s"] > record["unshared_limit_tokens_per_s"]
    assert len(record["rounds"]) == 3
    assert record["implementation"]
    assert {"machine", "versions", "commit", "date"} <= record.keys()


def test_sampling_is_that_of_judging() -> None:
    judge = Recipe().judge
    assert (judge.temperature, judge.top_p) == (gpu_sampler.TEMPERATURE, gpu_sampler.TOP_P)


def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    # Neither installed nor beside the packages of the whole trainer.
    blocked = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'pydantic']))"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, str(ROOT / "bench" / "gpu_sampler.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--shapes" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_no_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_sampler.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--device cpu --shapes small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
