"""The learning rate by hand figures, and what is decayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metareward.config import TrainSettings
from metareward.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from metareward.training.sharded import load_sharded


def rates(steps: int, **changes: Any) -> list[float]:
    settings = TrainSettings(learning_rate=8e-6, **changes)
    return [learning_rate(step, steps, settings) / 8e-6 for step in range(steps)]


def test_warmup_and_cosine() -> None:
    found = rates(10, warmup_share=0.2)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    # The cosine takes 8 steps from the peak: an eighth of a half turn each.
    assert found[4] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found[6] == pytest.approx(0.5)
    assert found[9] == pytest.approx(0.0380602337)
    assert min(found) > 0.0


def test_floor() -> None:
    found = rates(10, warmup_share=0.2, min_learning_rate_share=0.1)
    assert found[1:3] == pytest.approx([2 / 3, 1.0])
    assert found[6] == pytest.approx(0.55)
    assert found[9] == pytest.approx(0.1 + 0.9 * 0.0380602337)
    assert rates(7, warmup_share=0.3, min_learning_rate_share=1.0)[3:] == [1.0] * 4


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(4, warmup_share=0.0) == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


def test_warmup_is_rounded_up_but_not_by_a_rounding_error() -> None:
    assert rates(11, warmup_share=0.1)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert rates(100, warmup_share=0.07)[7] == 1.0


def test_only_warmup() -> None:
    assert rates(3, warmup_share=1.0) == pytest.approx([0.25, 0.5, 0.75])


def test_matrices_decay_and_vectors_do_not(
    models: dict[str, tuple[Any, Path]], make_settings: Callable[..., TrainSettings]
) -> None:
    settings = make_settings(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7)
    decoder = load_sharded(models["qwen3"][1], settings, torch.device("cpu"), 1)
    optimizer = build_optimizer(decoder, settings)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    decayed, plain = ([names[id(item)] for item in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all("norm" in name for name in plain)
    assert not any("norm" in name for name in decayed)
    assert sorted(decayed + plain) == sorted(names.values())
    assert all(group["betas"] == (0.8, 0.7) for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
