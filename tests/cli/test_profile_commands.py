"""`metareward profile` and `metareward plan` as a user calls them, mistakes first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from metareward.commands_profile import measure_machine
from metareward.profiling import machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_mistakes_are_one_sentence(metareward, made_run: Path, tmp_path: Path) -> None:
    assert "--machine to measure" in metareward("profile").sentence
    assert "not a run directory" in metareward("profile", tmp_path / "nowhere").sentence
    assert "has no spans" in metareward("profile", tmp_path / "made-run").sentence
    assert "add --machine" in metareward("profile", made_run, "--recipe", "demo.toml").sentence
    assert "give its folder" in metareward("profile", "--machine", "--trace", "x").sentence
    assert "is not there" in metareward("profile", made_run, "--machine-file", tmp_path / "no.json").sentence
    assert "downloads nothing" in metareward("plan", "llama3-8b.toml").sentence
    assert "there is no recipe" in metareward("plan", "nothing.toml").sentence
    assert "out of range" in metareward("plan", "demo.toml", "--assume.judged-share", "2").sentence


@pytest.mark.parametrize("load", [0.2, 6.0])
def test_a_busy_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, load: float
) -> None:
    found = machine.Machine("x", 2, 1e9, 2e9, {"bfloat16": 3e12, "float32": 1e12}, "2.13", "now")
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(machine, "measure", lambda device: found)
    measure_machine(tmp_path / "machine.json", "")
    shown = capsys.readouterr().out
    assert ("other work has been running here (load 6.0)" in shown) == (load > 1)
    assert "triad 2.0 GB/s" in shown
    assert machine.load(tmp_path / "machine.json") == found


def test_a_stage_then_its_profile(metareward, made_run: Path, tmp_path: Path) -> None:
    assert metareward("stage", "actor_pairs", made_run).code == 0
    shown = metareward("profile", made_run, "--json", tmp_path / "p.json", "--trace", tmp_path / "t.json")
    assert shown.code == 0, shown
    assert "actor_pairs" in shown.out
    assert "no limits" in shown.out
    found = json.loads((tmp_path / "p.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == ["start", "actor_pairs"]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_a_plan_without_and_with_a_machine(metareward, tiny_world: Path, tmp_path: Path) -> None:
    shown = metareward("plan", tiny_world / "recipe.toml")
    assert shown.code == 0
    assert "No time, because no machine is known" in shown.out
    assert "What dominates" in shown.out
    shown = metareward(
        "plan", tiny_world / "recipe.toml", "--machine", "A100-SXM4-80GB", "--json", tmp_path / "p.json"
    )
    assert "GPU-hours" in shown.out
    assert "data sheet" in shown.out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["seconds"] > 0
