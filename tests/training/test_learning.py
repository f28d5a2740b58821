"""Training reaches the values that theory gives for its losses: SFT the data's entropy, smoothed DPO its optimal margin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from metareward.config import TrainSettings
from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.packing import pack
from metareward.training.step import target_logprobs

Models = dict[str, tuple[Any, Path]]
MakeSettings = Callable[..., TrainSettings]
MakeExamples = Callable[..., list[Example]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_sft_loss_falls_to_the_entropy_of_the_data(
    models: Models, make_settings: MakeSettings, worker: ModuleType, tmp_path: Path, family: str
) -> None:
    """Two answers of one token to each of two prompts: no model is better than one half each, which costs ln 2 a token."""
    examples = [
        Example(f"{prompt}-{answer}", "actor", (5, 6, 7 + prompt, 8), ((20 + 2 * prompt + answer,),))
        for prompt in range(2)
        for answer in range(2)
    ]
    settings = make_settings(epochs=100, learning_rate=1e-2)
    losses = [
        figures["loss"]
        for figures in worker.run(worker.Job(models[family][1], examples, settings, tmp_path, "sft")).steps
    ]
    assert losses[0] > 3.0, "a random model knows nothing"
    assert losses[-1] == pytest.approx(math.log(2), abs=2e-3)
    # Every batch is the whole set, so no loss can be below its entropy.
    assert min(losses) > math.log(2) - 1e-5


def test_smoothed_dpo_ends_at_the_margin_of_its_smoothing(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    """-(1-s) log sigmoid(m) - s log sigmoid(-m) is least where sigmoid(m) = 1 - s, and is the entropy of s there."""
    share = 0.2
    settings = make_settings(epochs=80, learning_rate=1e-3, beta=0.5, label_smoothing=share)
    outcome = worker.run(worker.Job(models["qwen3"][1], make_examples(4), settings, tmp_path))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    losses = [figures["loss"] for figures in outcome.steps]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] == pytest.approx(entropy, abs=2e-3)
    assert min(losses) > entropy - 1e-6
    assert outcome.steps[-1]["margin"] == pytest.approx(math.log((1 - share) / share), rel=0.05)
    assert outcome.steps[-1]["accuracy"] == 1.0


def margins(folder: Path, weights: dict[str, Tensor], pairs: Sequence[Example]) -> Tensor:
    """[pairs] log pi / pi_ref of the chosen less that of the rejected completion; the files are the reference."""
    sums = []
    for trained in (True, False):
        decoder = load_decoder(folder, dtype=torch.float32)
        if trained:
            decoder.load_state_dict(weights, strict=True)
        batch = pack(pairs, CPU)
        with torch.no_grad():
            sums.append(batch.sum_completions(target_logprobs(decoder, batch)).view(-1, 2))
    chosen, rejected = (sums[0] - sums[1]).unbind(1)
    return chosen - rejected


@pytest.mark.parametrize("swapped", [False, True])
def test_swapped_pairs_give_a_negative_margin(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
    swapped: bool,
) -> None:
    """By the weights that come out, not by what training says of itself: each pair's margin follows its labels."""
    folder, pairs = models["qwen3"][1], make_examples(4)
    taught = [replace(item, completions=item.completions[::-1]) for item in pairs] if swapped else pairs
    settings = make_settings(epochs=8, learning_rate=3e-3)
    outcome = worker.run(worker.Job(folder, taught, settings, tmp_path))
    found = margins(folder, outcome.weights, pairs)
    assert bool((found < -1.0 if swapped else found > 1.0).all()), found
    # What training told of its own pairs, before the last step's update: always that it learns them.
    assert outcome.steps[-1]["margin"] > 0.5
