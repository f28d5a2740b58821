"""A training step through linear_preference, against the loss and the gradients of per-token log-probs and autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from metareward.config import TrainSettings
from metareward.model.decoder import Decoder
from metareward.model.flops import Work, step_flops
from metareward.model.hf_files import load_decoder
from metareward.training.examples import Example
from metareward.training.head_weight import head_weight
from metareward.training.losses import PairLogprobs, pair_loss
from metareward.training.packing import pack, work_of
from metareward.training.sharded import load_sharded, reshard
from metareward.training.step import hidden_states, target_logprobs
from tests.training.step_worker import CPU, Outcome, step, two_ranks

FAMILIES = ("llama-tied", "qwen3")
LAYERS, MICRO_BATCHES = 2, 3
Models = dict[str, tuple[Any, Path]]
MakeExamples = Callable[..., list[Example]]
MakeSettings = Callable[..., TrainSettings]


def reference_of(examples: Sequence[Example]) -> dict[str, tuple[float, float]]:
    """Some reference that is not the policy, different for every pair."""
    return {item.identity: (-20.0 - index, -31.0 + 2 * index) for index, item in enumerate(examples)}


def plain_step(
    decoder: Decoder, settings: TrainSettings, micro: Sequence[Sequence[Example]], weight: int, reference: Any
) -> Outcome:
    """The same step by linear_logprob and autograd, one micro-batch after the other."""
    total = 0.0
    decoder.zero_grad()
    for examples in micro:
        batch = pack(examples, CPU)
        policy = batch.sum_completions(target_logprobs(decoder, batch)).view(-1, 2)
        fixed = torch.tensor([reference[item.identity] for item in examples], dtype=torch.float64)
        tokens = torch.tensor(batch.lengths, dtype=torch.float64).view(-1, 2)
        record = PairLogprobs(*policy.unbind(1), *fixed.unbind(1), *tokens.unbind(1))
        loss = pair_loss(settings)(record).sum() / weight
        loss.backward()
        total += loss.item()
    found = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert all(grad is not None for grad in found.values())
    norm = torch.stack([grad.double().norm() for grad in found.values() if grad is not None]).norm()
    return Outcome({"loss": total, "grad_norm": norm.item()}, found, {})  # type: ignore[arg-type]


def assert_same(found: Outcome, wanted: Outcome, tolerance: float = 1e-5) -> None:
    for name, value in wanted.figures.items():
        assert found.figures[name] == pytest.approx(value, rel=tolerance), name
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        difference: Tensor = (found.gradients[name].double() - gradient.double()).norm()
        assert difference <= tolerance * gradient.norm(), name
        assert gradient.norm() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_equals_logprobs_and_autograd(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    family: str,
    sharded: bool,
    loss: str,
) -> None:
    settings = make_settings(loss=loss, beta=0.3, nll_weight=0.2 if loss == "simpo" else 0.0)
    examples = make_examples(7)
    micro = [examples[:3], examples[3:6], examples[6:]]
    reference = reference_of(examples)
    folder = models[family][1]
    plain = load_decoder(folder, dtype=torch.float32)
    wanted = plain_step(copy.deepcopy(plain), settings, micro, 7, reference)
    decoder = load_sharded(folder, settings, CPU, 1) if sharded else plain
    found = step(decoder, settings, micro, 7, reference)
    assert_same(found, wanted)
    # A second step starts from no gradient.
    again = step(decoder, settings, micro, 7, reference)
    assert all(torch.equal(again.gradients[name], found.gradients[name]) for name in found.gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_pairs_turn_the_gradient_of_a_symmetric_loss(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples, family: str
) -> None:
    """With the policy as reference, DPO's gradient at a swapped pair is the negative."""
    settings, examples = make_settings(), make_examples(2)
    swapped = [Example(item.identity, item.kind, item.prompt, item.completions[::-1]) for item in examples]
    decoder = load_decoder(models[family][1], dtype=torch.float32)
    outcomes = []
    for pairs in (examples, swapped):
        with torch.no_grad():
            batch = pack(pairs, CPU)
            sums = batch.sum_completions(target_logprobs(decoder, batch)).view(-1, 2).tolist()
        reference = {item.identity: (a, b) for item, (a, b) in zip(pairs, sums, strict=True)}
        outcomes.append(step(decoder, settings, [pairs], 2, reference))
    for name, gradient in outcomes[0].gradients.items():
        turned = -outcomes[1].gradients[name]
        assert (gradient - turned).norm() <= 1e-4 * gradient.norm(), name


def test_bf16_step_is_near_fp32(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples
) -> None:
    """Compute in bf16, accumulation over micro-batches and reduction in float32."""
    examples = make_examples(6)
    reference = reference_of(examples)
    found = []
    for dtype in ("float32", "bfloat16"):
        settings = make_settings(compute_dtype=dtype)
        decoder = load_sharded(models["qwen3"][1], settings, CPU, 1)
        found.append(step(decoder, settings, [examples[:2], examples[2:4], examples[4:]], 6, reference))
    for name, gradient in found[0].gradients.items():
        assert found[1].gradients[name].dtype == torch.float32
        assert (found[1].gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name
        assert not torch.equal(found[1].gradients[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES)
def test_head_weight_before_and_after_a_forward_pass(
    models: Models, make_settings: MakeSettings, make_examples: MakeExamples, family: str
) -> None:
    folder = models[family][1]
    whole = load_decoder(folder, dtype=torch.float32).head_weight
    decoder = load_sharded(folder, make_settings(compute_dtype="bfloat16"), CPU, 1)
    assert isinstance(decoder.head_weight, DTensor)
    before = head_weight(decoder)
    assert before.dtype == torch.bfloat16
    assert torch.equal(before, whole.bfloat16())
    with torch.no_grad():
        hidden = hidden_states(decoder, pack(make_examples(2), CPU))
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(head_weight(decoder), before)
    reshard(decoder)
    assert isinstance(decoder.head_weight, DTensor)
    plain = load_decoder(folder, dtype=torch.float32)
    assert head_weight(plain) is plain.head_weight


@pytest.fixture(scope="module")
def two(
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[Outcome]]:
    """Seven pairs on two ranks in three micro-batches each; the second rank has nothing to do in the third."""
    examples = make_examples(7)
    micro = [[examples[:2], examples[2:3], examples[3:4]], [examples[4:6], examples[6:], []]]
    return two_ranks(
        {family: (models[family][1], micro) for family in FAMILIES},
        make_settings(beta=0.3),
        7,
        reference_of(examples),
        tmp_path_factory.mktemp("step"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_with_an_empty_micro_batch(
    two: dict[str, list[Outcome]],
    models: Models,
    make_settings: MakeSettings,
    make_examples: MakeExamples,
    family: str,
) -> None:
    examples = make_examples(7)
    decoder = load_decoder(models[family][1], dtype=torch.float32)
    wanted = plain_step(decoder, make_settings(beta=0.3), [examples], 7, reference_of(examples))
    # What the rank without work computes in its place counts for nothing.
    work = [
        pack(part, CPU) for part in (examples[:2], examples[2:3], examples[3:4], examples[4:6], examples[6:])
    ]
    wanted.figures["flops"] = sum(step_flops(decoder.config, Work.of(work_of(batch))).model for batch in work)
    for outcome in two[family]:
        assert_same(outcome, wanted)
        assert outcome.figures["entropy"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_gathered_and_reduced_once_a_step(two: dict[str, list[Outcome]], family: str) -> None:
    for outcome in two[family]:
        counts = outcome.collectives
        # Blocks: a gather for every forward and every backward pass, a reduction after every backward pass. Head: one of each.
        # The root, which is the final norm: like a block, but not given up between forward and backward. An untied embedding: one
        # of each a micro-batch.
        embedding = 0 if family == "llama-tied" else MICRO_BATCHES
        assert counts["_allgather_base_"] == (2 * LAYERS + 1) * MICRO_BATCHES + embedding + 1, counts
        assert counts["_reduce_scatter_base_"] == (LAYERS + 1) * MICRO_BATCHES + embedding + 1, counts
