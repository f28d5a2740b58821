"""The full path on one process: load, reference log-probs, train. Against plain transformers, and by its invariants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from metareward.config import TrainSettings
from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.optimizer import build_optimizer
from metareward.training.packing import pack, tree_attention
from metareward.training.sharded import load_sharded, reshard, whole_tensors
from metareward.training.step import hidden_states
from metareward.training.trainer import TrainingSet, logprobs_of
from tests.training.plain_loop import logprob

CPU = torch.device("cpu")
Models = dict[str, tuple[Any, Path]]
MakeSettings = Callable[..., TrainSettings]
MakeExamples = Callable[..., list[Example]]


def test_sharded_weights_are_those_of_the_file(models: Models, make_settings: MakeSettings) -> None:
    for _, folder in models.values():
        plain = dict(load_decoder(folder, dtype=torch.float32).named_parameters())
        sharded = dict(whole_tensors(load_sharded(folder, make_settings(), CPU, 1)))
        assert sharded.keys() == plain.keys()
        assert all(torch.equal(sharded[name], plain[name]) for name in plain)


def test_root_is_sharded_again_after_the_reference_pass(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    """A forward pass without a backward leaves the root's weights gathered; an optimizer on those would train copies."""
    job = worker.Job(models["qwen3"][1], make_examples(4), make_settings(), tmp_path)
    decoder = load_sharded(job.model, job.settings, CPU, 1)
    data: TrainingSet = worker.training_set(job)
    with torch.no_grad():
        hidden_states(decoder, pack(data.examples, CPU))
    with pytest.raises(AssertionError, match="not sharded"):
        build_optimizer(decoder, job.settings)
    reshard(decoder)
    build_optimizer(decoder, job.settings)

    logprobs_of(decoder, data, CPU, lambda count: None)
    assert all(isinstance(parameter, DTensor) for parameter in decoder.parameters())
    outcome = worker.run(job)
    before = dict(load_decoder(job.model, dtype=torch.float32).named_parameters())
    for name, weight in outcome.weights.items():
        assert not torch.equal(weight, before[name]), f"{name} was not trained"
    # What was written out is what the last step's forward pass used and the optimizer updated.
    assert len({figures["loss"] for figures in outcome.steps}) == len(outcome.steps)


def test_reference_logprobs_by_transformers(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    model, folder = models["llama-tied"]
    examples = make_examples(7)
    job = worker.Job(folder, examples, make_settings(), tmp_path)
    counts: list[int] = []
    decoder = load_sharded(folder, job.settings, CPU, 1)
    found = logprobs_of(decoder, worker.training_set(job), CPU, counts.append)
    assert counts == [4, 3]
    assert found.keys() == {item.identity for item in examples}
    for item in examples:
        wanted = [logprob(model, item.prompt, part).item() for part in item.completions]
        assert found[item.identity] == pytest.approx(wanted, rel=1e-5)


def test_identities_must_be_unique(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    """Reference log-probs go by identity; two examples of one name would be trained against one reference."""
    examples = make_examples(3)
    twice = [*examples, replace(examples[0], prompt=(5, 6, 7))]
    with pytest.raises(AssertionError, match="identity"):
        worker.run(worker.Job(models["llama-tied"][1], twice, make_settings(), tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_first_dpo_loss_is_ln_2(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
    family: str,
    dtype: str,
) -> None:
    settings = make_settings(compute_dtype=dtype, activation_checkpointing="full")
    outcome = worker.run(worker.Job(models[family][1], make_examples(6), settings, tmp_path, stop_after=1))
    assert outcome.steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert outcome.steps[0]["margin"] == pytest.approx(0.0, abs=1e-6)
    assert outcome.steps[0]["grad_norm"] > 0


@pytest.mark.parametrize("objective", ["pair", "sft"])
def test_result_does_not_depend_on_the_micro_batch(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
    objective: str,
) -> None:
    outcomes = []
    for budget in (1, 90, 10_000):
        settings = make_settings(micro_batch_tokens=budget)
        examples = make_examples(6, completions=2 if objective == "pair" else 1)
        job = worker.Job(models["llama-tied"][1], examples, settings, tmp_path, objective)
        outcomes.append(worker.run(job))
    first = outcomes[0]
    assert len(first.steps) == 4
    for other in outcomes[1:]:
        for left, right in zip(first.steps, other.steps, strict=True):
            for name in ("loss", "grad_norm"):
                assert left[name] == pytest.approx(right[name], rel=1e-5)
            assert left["unshared_tokens"] == right["unshared_tokens"]
            assert left["tokens"] >= right["tokens"]
        for name, weight in first.weights.items():
            torch.testing.assert_close(other.weights[name], weight, rtol=1e-5, atol=1e-5)
    if objective == "pair":
        tokens = [sum(figures["tokens"] for figures in outcome.steps) for outcome in outcomes]
        assert tokens[0] > tokens[2], "one micro-batch shares the rubric"


def test_sft_learns_a_tiny_set(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    settings = make_settings(epochs=15, learning_rate=1e-2)
    outcome = worker.run(
        worker.Job(models["llama-tied"][1], make_examples(4, completions=1), settings, tmp_path, "sft")
    )
    losses = [figures["loss"] for figures in outcome.steps]
    assert losses[0] > math.log(100), "a random model knows nothing"
    assert losses[-1] < 0.2 * losses[0]


def test_dpo_learns_a_tiny_set(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    settings = make_settings(epochs=8, learning_rate=3e-3)
    outcome = worker.run(worker.Job(models["qwen3"][1], make_examples(4), settings, tmp_path))
    assert [outcome.steps[-1][f"accuracy{kind}"] for kind in ("", "_actor", "_judge")] == [1.0, 1.0, 1.0]
    assert outcome.steps[-1]["loss"] < 0.5 * math.log(2)
    assert outcome.steps[-1]["margin"] > 0.5


def test_bf16_compute_keeps_fp32_weights(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    folder = models["llama-tied"][1]
    settings = make_settings(compute_dtype="bfloat16", learning_rate=1e-6, epochs=1)
    outcome = worker.run(worker.Job(folder, make_examples(4), settings, tmp_path))
    decoder = load_sharded(folder, settings, CPU, 1)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    before = dict(whole_tensors(decoder))
    assert {weight.dtype for weight in outcome.weights.values()} == {torch.float32}
    for name, weight in outcome.weights.items():
        change = (weight - before[name]).abs()
        assert change.max() > 0, name
        # Adam's first step is at most the learning rate: far below bf16's resolution of these weights.
        assert change.max() < 1e-5
    norm = "model.norm.weight"
    lost = before[norm].bfloat16() == outcome.weights[norm].bfloat16()
    assert lost.float().mean() > 0.9, "the update is too small for bf16, or this test shows nothing"
    # The computation itself is in bf16.
    exact = worker.run(
        worker.Job(folder, make_examples(4), replace(settings, compute_dtype="float32"), tmp_path)
    )
    assert outcome.steps[0]["chosen_logprob"] != exact.steps[0]["chosen_logprob"]
    assert outcome.steps[0]["chosen_logprob"] == pytest.approx(exact.steps[0]["chosen_logprob"], rel=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_gradient(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples, dtype: str
) -> None:
    batch = pack(make_examples(4), CPU)
    found = []
    for recompute in ("none", "full", "selective"):
        settings = make_settings(compute_dtype=dtype, activation_checkpointing=recompute)
        decoder = load_sharded(models["qwen3"][1], settings, CPU, 1)
        calls: list[int] = []
        attend = tree_attention(batch.segments)

        def counted(
            layer: int, *parts: Tensor, calls: list[int] = calls, attend: Callable[..., Tensor] = attend
        ) -> Tensor:
            calls.append(layer)
            return attend(layer, *parts)

        out = decoder(batch.token_ids, batch.positions, counted, rows=batch.rows, targets=batch.targets)
        out.sum().backward()
        assert len(calls) == (2 if recompute == "none" else 4)
        found.append({name: item.grad.full_tensor() for name, item in decoder.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(found[1][name], gradient), name
        assert torch.equal(found[2][name], gradient), name


def test_divergence_names_the_batch_and_changes_nothing(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    folder, examples, settings = models["llama-tied"][1], make_examples(6), make_settings()
    job = worker.Job(folder, examples, settings, tmp_path)
    order = worker.training_set(job).order
    batch = sorted(examples[index].identity for index in order.indices(1))
    outcome = worker.run(replace(job, poison=batch[0]))
    assert outcome.error.startswith("TrainingDiverged: the loss is nan")
    assert f"on the batch {', '.join(batch)}:" in outcome.error
    assert len(outcome.steps) == 1
    untouched = worker.run(replace(job, stop_after=1))
    for name, weight in untouched.weights.items():
        assert torch.equal(outcome.weights[name], weight), name


def test_a_gradient_that_is_not_finite_is_found_behind_a_finite_loss(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    worker: ModuleType,
    tmp_path: Path,
) -> None:
    """The loss of the figures is finite; only its derivative is not."""
    examples = make_examples(4)
    objective = worker.sft_objective()

    def loss(batch: Any, hidden: Tensor, head: Tensor, scale: float) -> tuple[Tensor, dict[str, float]]:
        value, figures = objective.loss(batch, hidden, head, scale)
        # sqrt has an infinite slope at 0.
        return value + torch.sqrt(value - value.detach()), figures

    worker_objective = worker.sft_objective
    worker.sft_objective = lambda: replace(objective, loss=loss)
    try:
        job = worker.Job(models["llama-tied"][1], examples, make_settings(), tmp_path, "sft")
        outcome = worker.run(job)
    finally:
        worker.sft_objective = worker_objective
    assert outcome.error.startswith("TrainingDiverged")
    assert not outcome.steps
    before = dict(whole_tensors(load_sharded(job.model, job.settings, CPU, 1)))
    assert all(torch.equal(outcome.weights[name], before[name]) for name in before)
