"""LoRA: an adapted model starts as the model itself, trains as peft on transformers does, resumes, and is written merged."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from metareward_kernels import preference_pass
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.decoder import Decoder
from metareward.model.flops import Work, step_flops
from metareward.model.hf_files import iterate_tensors, load_decoder
from metareward.run import ranks
from metareward.stages.train import write_model
from metareward.training import lora
from metareward.training.examples import Example
from metareward.training.memory import estimate_memory
from metareward.training.objectives import pair_objective
from metareward.training.optimizer import build_optimizer
from metareward.training.packing import pack, work_of
from metareward.training.sharded import load_sharded, reshard, whole_tensors
from metareward.training.step import hidden_states

pytest.importorskip("peft")
CPU = torch.device("cpu")
FAMILIES = ("llama-tied", "qwen3")
MakeExamples = Callable[..., list[Example]]
Models = dict[str, tuple[Any, Path]]


@pytest.fixture
def settings(make_settings: Callable[..., TrainSettings]) -> TrainSettings:
    return make_settings(lora_rank=4, lora_alpha=6.0, learning_rate=3e-3, weight_decay=0.1, epochs=3)


def load(folder: Path, settings: TrainSettings, seed: tuple[int, ...] = (0, 1)) -> Decoder:
    return load_sharded(folder, settings, CPU, ranks.world_size(), seed)


def whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_model_itself(
    models: Models, make_examples: MakeExamples, settings: TrainSettings, family: str, dtype: str
) -> None:
    """To the bit: so the reference is the model without its adapters."""
    batch = pack(make_examples(4), CPU)
    found = []
    for rank in (0, 4):
        decoder = load(models[family][1], replace(settings, lora_rank=rank, compute_dtype=dtype))
        with torch.no_grad():
            found.append(hidden_states(decoder, batch))
        reshard(decoder)
    assert torch.equal(*found)
    adapters = {name: whole(value) for name, value in decoder.named_parameters() if lora.is_adapter(name)}
    # Seven matrices of two blocks, each with two.
    assert len(adapters) == 2 * 7 * 2
    for name, value in adapters.items():
        assert bool((value == 0).all()) == (".lora_B." in name), name
    again = dict(load(models[family][1], settings).named_parameters())
    assert all(torch.equal(whole(again[name]), value) for name, value in adapters.items())
    other = dict(load(models[family][1], settings, (0, 2)).named_parameters())
    assert not any(
        torch.equal(whole(other[name]), value) for name, value in adapters.items() if ".lora_A." in name
    )


def trained_by_peft(
    model: Any, start: dict[str, Tensor], job: Any, data: Any, settings: TrainSettings
) -> tuple[dict[str, Tensor], list[float]]:
    """The same training by peft on transformers' model: unpadded sequences, autograd, torch's AdamW; its weights merged."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=6,
        target_modules=list(lora.TARGETS[settings.lora_targets]),
        lora_dropout=0.0,
    )
    peft_model: Any = get_peft_model(copy.deepcopy(model), config)
    peft_model.eval()
    parameters = {
        name.removeprefix("base_model.model."): value for name, value in peft_model.named_parameters()
    }
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, value in start.items():
            trained[name].copy_(value)
    optimizer = torch.optim.AdamW(
        trained.values(), betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=0.1
    )

    def margin(example: Example) -> Tensor:
        sums = []
        for completion in example.completions:
            ids = torch.tensor([example.prompt + completion])
            logprobs = peft_model(ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
            sums.append(logprobs[torch.arange(len(completion)), list(completion)].sum())
        return sums[0] - sums[1]

    with torch.no_grad(), peft_model.disable_adapter():
        fixed = {example.identity: margin(example) for example in job.examples}
    losses = []
    from metareward.training.optimizer import learning_rate, set_learning_rate

    for step in range(data.order.steps):
        set_learning_rate(optimizer, learning_rate(step, data.order.steps, settings))
        batch = [job.examples[index] for index in data.order.indices(step)]
        optimizer.zero_grad()
        loss = torch.stack(
            [-F.logsigmoid(settings.beta * (margin(e) - fixed[e.identity])) for e in batch]
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return dict(peft_model.merge_and_unload().named_parameters()), losses


@pytest.mark.parametrize("targets", ["all", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_as_peft_on_transformers(
    models: Models,
    make_examples: MakeExamples,
    settings: TrainSettings,
    worker: ModuleType,
    tmp_path: Path,
    family: str,
    targets: Any,
) -> None:
    model, folder = models[family]
    # Several micro-batches a step.
    settings = replace(
        settings, lora_targets=targets, micro_batch_tokens=60, beta=0.5, activation_checkpointing="full"
    )
    job = worker.Job(folder, make_examples(6), settings, tmp_path / "training")
    start = {
        name: whole(value)
        for name, value in load(folder, settings, ()).named_parameters()
        if lora.is_adapter(name)
    }
    found = worker.run(job)
    assert not found.error
    wanted, losses = trained_by_peft(model, start, job, worker.training_set(job), settings)
    assert [step["loss"] for step in found.steps] == pytest.approx(losses, rel=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3
    before = dict(iterate_tensors(folder))
    assert found.weights.keys() == before.keys()
    for name, weight in found.weights.items():
        adapted = name.split(".")[-2] in lora.TARGETS[targets]
        assert torch.equal(weight, before[name]) != adapted, name
        change, right = weight - before[name], wanted[name] - before[name]
        assert (change - right).norm() <= 1e-3 * right.norm(), name


def test_written_merged(
    models: Models, make_examples: MakeExamples, settings: TrainSettings, tmp_path: Path
) -> None:
    """The written model without adapters computes what the decoder computes with them, and a start of its own loads it."""
    folder = shutil.copytree(models["qwen3"][1], tmp_path / "policy")
    (folder / "tokenizer.json").write_text("{}")
    decoder = load(folder, settings)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if lora.is_adapter(name):
                parameter.add_(torch.ones_like(parameter) * 0.05)
    batch = pack(make_examples(4), CPU)
    with torch.no_grad():
        wanted = hidden_states(decoder, batch)
    reshard(decoder)
    write_model(decoder, folder, tmp_path / "model", "float32")
    for again in (load_decoder(tmp_path / "model", dtype=torch.float32), load(tmp_path / "model", settings)):
        with torch.no_grad():
            found = hidden_states(again, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    plain = load_decoder(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (hidden_states(plain, batch) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_is_bitwise_the_same(
    models: Models,
    make_examples: MakeExamples,
    settings: TrainSettings,
    worker: ModuleType,
    tmp_path: Path,
    dtype: str,
) -> None:
    folder = models["llama-tied"][1]
    settings = replace(settings, checkpoint_steps=2, compute_dtype=dtype)
    job = worker.Job(folder, make_examples(6), settings, tmp_path / "training")
    undisturbed = worker.run(replace(job, checkpoints=tmp_path / "undisturbed"))
    first = worker.run(replace(job, stop_after=3))
    assert first.error == "Interrupted: after step 3"
    second = worker.run(job)
    assert [figures["step"] for figures in second.steps] == [3, 4, 5, 6]
    for name, weight in undisturbed.weights.items():
        assert torch.equal(second.weights[name], weight), name
    assert second.reference == undisturbed.reference
    # Adapters and two moments of each, not the model.
    adapters = {name for name, _ in load(folder, settings).named_parameters() if lora.is_adapter(name)}
    written = dcp.FileSystemReader(tmp_path / "training" / "step-000004").read_metadata().state_dict_metadata
    weights = {name for name in written if name.startswith("model.")}
    assert {name.removeprefix("model.") for name in weights} == adapters
    assert {name for name in written if ".exp_avg" in name} == {
        f"optimizer.state.{name}.{moment}" for name in adapters for moment in ("exp_avg", "exp_avg_sq")
    }


def test_only_adapters_are_trained(models: Models, settings: TrainSettings) -> None:
    decoder = load(models["llama-tied"][1], settings)
    names = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in decoder.named_parameters() if lora.is_adapter(name)}
    optimizer = build_optimizer(decoder, settings)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_a_frozen_head_has_two_products(
    models: Models,
    make_examples: MakeExamples,
    settings: TrainSettings,
    worker: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    real = preference_pass.Pass.hidden_gradient

    def counted(self: Any) -> None:
        calls.append("two products")
        real(self)

    def refused(self: Any, *_: Any) -> None:
        raise AssertionError("the head's gradient was made")

    monkeypatch.setattr(preference_pass.Pass, "hidden_gradient", counted)
    monkeypatch.setattr(preference_pass.Pass, "all_gradients", refused)
    settings = replace(settings, epochs=1, batch_pairs=6, micro_batch_tokens=10_000)
    outcome = worker.run(worker.Job(models["qwen3"][1], make_examples(6), settings, tmp_path))
    assert len(outcome.steps) == len(calls) == 1
    long = replace(pack(make_examples(3), CPU), lengths=(1000, 24, 1000, 25, 3, 4))
    assert pair_objective(settings, {}).recomputed_rows(long) == 0
    assert pair_objective(replace(settings, lora_rank=0), {}).recomputed_rows(long) > 1000


def test_sft_trains_adapters(
    models: Models, make_examples: MakeExamples, settings: TrainSettings, worker: ModuleType, tmp_path: Path
) -> None:
    settings = replace(settings, epochs=10, learning_rate=2e-2, weight_decay=0.0)
    examples = make_examples(4, completions=1)
    job = worker.Job(models["qwen3"][1], examples, settings, tmp_path, objective="sft")
    outcome = worker.run(job)
    assert outcome.steps[-1]["loss"] < 0.8 * outcome.steps[0]["loss"]


@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
def test_flops_by_pytorch_s_counter(
    models: Models, make_examples: MakeExamples, settings: TrainSettings, targets: Any
) -> None:
    """As test_flops.py counts them with all weights trained: attention multiplies nothing, the head is eager and frozen."""
    decoder = load(models["qwen3"][1], replace(settings, lora_targets=targets))
    reshard(decoder)
    batch = pack(make_examples(3), CPU)
    weight = load_decoder(models["qwen3"][1], dtype=torch.float32).head_weight.detach()
    with FlopCounterMode(display=False) as counter:
        states = decoder(
            batch.token_ids,
            batch.positions,
            # Values and keys take part, so that no product is left out.
            lambda layer, query, key, value: query * (key.mean() + value.mean()),
            rows=batch.rows,
        )
        (states @ weight.T).square().sum().backward()
    adapters = lora.adapter_weights(decoder)
    config = decoder.config
    found = step_flops(config, Work.of(work_of(batch)), adapter_weights=adapters)
    # The first block's input is a frozen embedding: what reads it has no gradient by it, nor have q, k, v, o, gate and up where
    # the first adapters are those of the MLP.
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    frozen = hidden * (queries + 2 * config.num_kv_heads * config.head_dim)
    reading = 3
    if targets == "mlp":
        frozen += queries * hidden + 2 * hidden * config.intermediate_size
        reading = 2
    missing = 2 * batch.tokens * (frozen + reading * settings.lora_rank * hidden)
    assert counter.get_total_flops() == found.dense + found.head - missing


def test_adapters_are_counted_from_the_recipe(models: Models, settings: TrainSettings) -> None:
    for targets in ("all", "attention", "mlp"):
        decoder = load(models["qwen3"][1], replace(settings, lora_targets=targets))
        found = sum(value.numel() for name, value in decoder.named_parameters() if lora.is_adapter(name))
        chosen = replace(settings, lora_targets=targets)
        assert lora.adapter_parameters(decoder.config, chosen) == found
        assert lora.adapter_weights(decoder) * decoder.config.num_layers == found
    assert lora.adapter_parameters(decoder.config, replace(settings, lora_rank=0)) == 0


def test_memory_estimate_has_adapters_alone(
    models: Models, make_examples: MakeExamples, settings: TrainSettings
) -> None:
    config = load_decoder(models["qwen3"][1], dtype=torch.float32).config
    frozen = estimate_memory(config, settings, make_examples(4), 4, 1, "cpu")
    whole = estimate_memory(config, replace(settings, lora_rank=0), make_examples(4), 4, 1, "cpu")
    adapters = 4 * lora.adapter_parameters(config, settings)
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (
        whole.weights + adapters,
        adapters,
        2 * adapters,
    )
    assert frozen.update == adapters
    assert frozen.gathered < whole.gathered
    assert frozen.peak < whole.peak


def test_a_missing_peft_is_said_before_the_work(settings: TrainSettings, monkeypatch: Any) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"train\.lora_rank = 4 needs peft.*pip install metareward\[lora\].*set it to 0"
    ):
        lora.check_lora(settings)
    lora.check_lora(replace(settings, lora_rank=0))


def test_whole_tensors_of_adapters_are_the_model_s(models: Models, settings: TrainSettings) -> None:
    """Before training, merging changes nothing: names and values are the files'."""
    folder = models["llama-tied"][1]
    found = dict(whole_tensors(load(folder, settings)))
    wanted = dict(iterate_tensors(folder))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in wanted.items())
