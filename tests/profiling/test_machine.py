"""The machine's measurement and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metareward.errors import UserError
from metareward.profiling import machine as machines


def test_measured_rates_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machines.measure(torch.device("cpu"), tries=1)
    # Anything that runs PyTorch copies more than 100 MB/s and less than 10 TB/s, and multiplies in between as well.
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.triad < 1e13
    assert 1e8 < found.matrix["float32"] < 1e14
    assert found.bandwidth == max(found.copy, found.triad)
    assert (found.kind, found.sheet) == ("cpu", None)


def test_the_file_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = machines.default_file()
    assert path == tmp_path / "cache" / "metareward" / "machine.json"
    found = machines.Machine(
        "x", 2, 1e9, 2e9, {"bfloat16": 3e9, "float32": 1e9}, "2.13", "now", {"m": {"train": 0.5}}
    )
    machines.save(found, path)
    assert machines.load(path) == found


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    with pytest.raises(UserError, match="profile --machine"):
        machines.load(path)
    good = {"device": "x", "threads": 1, "copy": 1.0, "triad": 1.0, "torch": "", "measured": ""}
    for text in (
        "{",
        "[]",
        "{}",
        json.dumps({**good, "matrix": {"bfloat16": 1.0}}),
        json.dumps({**good, "copy": 0.0, "matrix": {"bfloat16": 1.0, "float32": 1.0}}),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="delete it and measure again"):
            machines.load(path)
    with pytest.raises(UserError, match="--machine-file"):
        machines.save(machines.Machine("x", 1, 1, 1, {}, "", ""), path / "below")


def test_a_gpu_by_its_data_sheet() -> None:
    with pytest.raises(UserError, match="neither a file nor the exact name of a GPU"):
        machines.from_data_sheet("abacus")
    # The variants differ by a third.
    with pytest.raises(UserError, match="H100 80GB HBM3, H100 PCIe"):
        machines.from_data_sheet("H100")
    found = machines.from_data_sheet("H100 80GB HBM3")
    assert (found.rate("bfloat16"), found.rate("float32"), found.bandwidth) == (989.5e12, 67e12, 3350e9)
    assert found.kind == "cuda"
    assert found.sheet is not None


def test_a_cpu_that_is_called_like_a_gpu_has_no_data_sheet() -> None:
    assert machines.Machine("A10", 2, 1e9, 1e9, {}, "", "").sheet is None
