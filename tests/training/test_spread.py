"""Master weights of a bf16 file: they round to the file, and small updates show in their bf16 copies at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metareward.config import TrainSettings
from metareward.training.examples import Example
from metareward.training.packing import pack
from metareward.training.sharded import load_sharded, reshard, whole_tensors
from metareward.training.spread import spread_in_cells_
from metareward.training.step import hidden_states

CPU = torch.device("cpu")
Models = dict[str, tuple[Any, Path]]


def all_bf16() -> torch.Tensor:
    """Every finite bf16 number, float32."""
    found = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return found[found.isfinite()].float()


def test_every_bf16_number_is_what_its_master_rounds_to() -> None:
    for repeat in range(50):
        exact = all_bf16()
        found = spread_in_cells_(exact.clone(), f"weight {repeat}")
        assert found.isfinite().all()
        assert torch.equal(found.bfloat16().float(), exact)
        assert bool((found[exact == 0] == 0).all())
    assert (found == exact).float().mean() < 1e-3


def test_a_place_is_a_function_of_the_name() -> None:
    weight = torch.randn(100, 70).bfloat16().float()
    found = spread_in_cells_(weight.clone(), "a")
    assert torch.equal(found, spread_in_cells_(weight.clone(), "a"))
    assert not torch.equal(found, spread_in_cells_(weight.clone(), "b"))


@pytest.mark.parametrize("update", [5e-6, 5e-5, -3e-4])
def test_copies_follow_their_masters_on_average(update: float) -> None:
    """200,000 weights around 0.2: from the middle of their cells none of the smaller updates shows."""
    exact = (torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.13).bfloat16().float()
    found = (spread_in_cells_(exact.clone(), "w") + update).bfloat16().float() - exact
    # A step of bf16 is 2^-10 here; an even spread crosses an edge with probability |update| / 2^-10.
    error = 2.0**-10 * (abs(update) * 2**10 / 200_000) ** 0.5
    assert found.mean().item() == pytest.approx(update, abs=5 * error)
    assert (exact + update).bfloat16().float().sub(exact).abs().max() == 0
    assert set((found * 2**10).unique().tolist()) == {0.0, 1.0 if update > 0 else -1.0}


@pytest.fixture
def bf16_files(models: Models, tmp_path: Path) -> Path:
    folder = tmp_path / "bf16"
    folder.mkdir()
    source = models["qwen3"][1]
    (folder / "config.json").write_text((source / "config.json").read_text())
    weights = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_training_starts_as_the_file(
    bf16_files: Path, make_settings: Callable[..., TrainSettings], make_examples: Callable[..., list[Example]]
) -> None:
    """In bf16 to the bit, in float32 with the very numbers: nothing is spread where nothing is rounded."""
    wanted = {name: value.float() for name, value in load_file(bf16_files / "model.safetensors").items()}
    exact = load_sharded(bf16_files, make_settings(), CPU, 1)
    spread = load_sharded(bf16_files, make_settings(compute_dtype="bfloat16"), CPU, 1)
    assert all(torch.equal(value, wanted[name]) for name, value in whole_tensors(exact))
    masters = dict(whole_tensors(spread))
    assert all(torch.equal(value.bfloat16().float(), wanted[name]) for name, value in masters.items())
    assert all((value != wanted[name]).float().mean() > 0.99 for name, value in masters.items())
    batch = pack(make_examples(3), CPU)
    with torch.no_grad():
        first = hidden_states(spread, batch)
    reshard(spread)
    with torch.no_grad():
        for name, parameter in spread.named_parameters():
            parameter.to_local().copy_(wanted[name])
        assert torch.equal(hidden_states(spread, batch), first)


def test_files_of_float32_are_taken_as_they_are(
    models: Models, make_settings: Callable[..., TrainSettings]
) -> None:
    folder = models["qwen3"][1]
    decoder = load_sharded(folder, make_settings(compute_dtype="bfloat16"), CPU, 1)
    wanted = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in whole_tensors(decoder))
