"""The GPU script of the head's kernels, on the CPU at small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_kernels
from bench.record import ROOT


def test_small_shapes_on_the_cpu_write_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cpu",
        "--shapes",
        "small",
        "--no-tests",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as ended:
        gpu_kernels.main(arguments)
    assert ended.value.code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-small-kernels.json")
    record = json.loads(path.read_text())
    assert record["complete"]
    assert record["tests"]["passed"] is None
    rows = {(row["method"], row["pass"]): row for row in record["rows"]}
    assert rows["linear_fp32 + logprob_rows, chunked", "forward"]["ms"] > 0
    assert "linear_preference" in rows["linear_fp32 + logprob_rows, chunked", "forward+backward"]["reason"]
    assert rows["linear_logprob, torch forced", "forward"]["ms"] > 0
    assert "cannot run so" in rows["linear_logprob, triton forced", "forward"]["reason"]
    shown = capsys.readouterr().out
    assert "TFLOP/s" in shown
    assert str(path) in shown


def test_the_published_shape_is_in_the_grid() -> None:
    shape = max(gpu_kernels.SHAPES["all"], key=lambda shape: shape.product_flop())
    assert (shape.tokens, shape.hidden, shape.vocabulary) == (16384, 4096, 128256)
    assert shape.product_flop() / 1e12 == pytest.approx(17.2, abs=0.05)


def test_the_end_of_the_kernel_tests_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in (("interpreter", "pass"), ("kernels", "assert not 'broken'")):
        folder = tmp_path / "tests" / name
        folder.mkdir(parents=True)
        (folder / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n")
    for ignored in gpu_kernels.WITHOUT_GPU:
        (tmp_path / "tests" / "kernels" / ignored).write_text("raise SystemExit('not to be collected')\n")
    monkeypatch.setattr(gpu_kernels, "ROOT", tmp_path)
    found = gpu_kernels.run_tests(60.0)
    assert found["passed"] is False
    assert "1 failed, 1 passed" in found["summary"]
    assert "broken" in found["output"]
    late = gpu_kernels.run_tests(0.01)
    assert (late["passed"], late["summary"]) == (False, "not done after 0 s")
    # A failed test does not end the run, but it shows in the exit status.
    monkeypatch.setattr(gpu_kernels, "SHAPES", {"small": []})
    with pytest.raises(SystemExit) as ended:
        gpu_kernels.main(["--device", "cpu", "--shapes", "small", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_bare_checkout_is_enough(tmp_path: Path) -> None:
    # Neither installed nor beside the packages of the whole trainer.
    blocked = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'pydantic', 'rich', 'matplotlib']))"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, str(ROOT / "bench" / "gpu_kernels.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--shapes" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_no_gpu_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_kernels.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--device cpu --shapes small" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
