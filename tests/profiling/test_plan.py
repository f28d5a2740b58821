"""A plan's requests, tokens, seconds and memory against hand arithmetic, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metareward.config import Iteration, Recipe, TrainSettings
from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.flops import Work, forward_flops, inference_flops, step_flops
from metareward.profiling.assumptions import Assumptions, with_values
from metareward.profiling.machine import Machine, save
from metareward.profiling.measured import measured_values
from metareward.profiling.plan_command import make_plan
from metareward.profiling.plan_lengths import Lengths
from metareward.profiling.plan_time import (
    Setting,
    plan,
    sampling_memory,
    sensitivities,
    total_seconds,
    training_memory,
)
from metareward.profiling.plan_work import Kind, StageWork, all_work, training_work
from metareward.training.lora import adapter_parameters
from metareward.training.memory import LargestBatch, memory_of
from metareward.training.packing import SMALLEST_SHARED

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
)
LENGTHS = Lengths(prompt=20, instruction=12, judge_shared=100, judge_rest=8, meta_shared=120, meta_rest=10)
ASSUMED = Assumptions(
    response_share=0.5,
    judgment_share=0.5,
    comparison_share=0.4,
    judged_share=0.75,
    parsed_share=1.0,
    actor_pair_share=0.5,
    judge_pair_share=0.4,
    train_reached=0.4,
)
FAST = Machine("made up", 1, 1e9, 1e9, {"bfloat16": 2e8, "float32": 1e8}, "2.13", "today")


def small_recipe(meta_judge: bool = True) -> Recipe:
    recipe = Recipe(iteration=(Iteration(meta_judge=meta_judge),))
    return replace(
        recipe,
        prompts=replace(recipe.prompts, per_iteration=10),
        seed=replace(recipe.seed, enabled=False),
        respond=replace(recipe.respond, samples=4, max_new_tokens=100),
        judge=replace(recipe.judge, samples=3, max_new_tokens=60),
        meta_judge=replace(recipe.meta_judge, max_new_tokens=50),
        sampler=replace(recipe.sampler, max_running=8, max_step_tokens=64),
        train=replace(recipe.train, compute_dtype="float32", epochs=3, batch_pairs=4),
    )


def work_of(recipe: Recipe, gpus: int = 1) -> dict[str, StageWork]:
    return {item.stage: item for item in all_work(recipe, LENGTHS, ASSUMED, gpus)}


def test_sampling_by_hand() -> None:
    work = work_of(small_recipe())
    respond, judge, compare = (work[name] for name in ("respond", "judge", "compare"))
    assert (respond.requests, respond.prompt_tokens, respond.prefill.rows, respond.new_tokens) == (
        40,
        800,
        200,
        2000,
    )
    # 40 requests in 8 slots: 5 rounds of 50 steps, and the longest of the last runs 50 more.
    assert respond.decode.passes == 5 * 50 + 50
    # 30 of 40 responses, 3 judgments each; the rubric once, instructions once a prompt, the rest once a response.
    assert (judge.requests, judge.prompt_tokens, judge.new_tokens) == (90, 90 * 170, 2700)
    assert judge.prefill.rows == 100 + 10 * 12 + 30 * (50 + 8)
    # 3 judgments of one response a prompt: 6 ordered pairs; the first judgment is shared by the two that follow it.
    assert (compare.requests, compare.prompt_tokens, compare.new_tokens) == (60, 60 * 252, 1200)
    assert compare.prefill.rows == 120 + 10 * (12 + 50) + 10 * (3 * 30 + 6 * (30 + 10))


def test_training_by_hand() -> None:
    work = work_of(small_recipe())
    # 5 actor pairs of 20 + 2 x 50 tokens, 4 judge pairs of 70 + 2 x 30 behind a rubric of 100, in 3 batches of 4, each
    # of which fits into one micro-batch.
    train, reference = work["train"], work["reference"]
    assert (train.requests, train.optimizer_steps, reference.optimizer_steps) == (9, 3 * 3, 0)
    own, shared = 5 * 120 + 4 * 130, 3 * 100
    assert reference.forward.rows == pytest.approx(own + shared)
    assert train.forward.rows == pytest.approx(3 * (own + shared))
    assert train.forward.logit_rows == pytest.approx(3 * (5 * 100 + 4 * 60))
    assert (reference.forward.passes, train.forward.passes) == (3, 9)
    actor = 20 * 21 / 2 + 2 * (50 * 20 + 50 * 51 / 2)
    judge = 170 * 171 / 2 + 2 * (30 * 170 + 30 * 31 / 2)
    # One of the 4 judge pairs finds its rubric computed.
    assert train.forward.pairs == pytest.approx(3 * (5 * actor + 4 * judge - 100 * 101 / 2))


def test_a_beginning_is_computed_once_in_every_micro_batch_that_has_its_kind() -> None:
    kinds = [Kind(32, 0, 100, 5050, 10), Kind(32, 100, 100, 20_100, 10)]
    settings = TrainSettings(micro_batch_tokens=600)
    # 4 batches of 16 examples of 150 tokens, 4 in a micro-batch; the first kind is a third of the tokens, so three of a batch's
    # four micro-batches have some of the second.
    work = training_work("train", 1, kinds, 16, 1, settings, 1).forward
    assert work.passes == 16
    assert work.rows == pytest.approx(32 * 100 + 32 * 100 + 4 * 3 * 100)
    assert work.pairs == pytest.approx(32 * 5050 + 32 * (20_100 - 5050) + 12 * 5050)
    # Two ranks with two micro-batches each: the second kind is in all four.
    work = training_work("train", 1, kinds, 16, 1, settings, 2).forward
    assert work.passes == 16
    assert work.rows == pytest.approx(6400 + 4 * 4 * 100)
    # A beginning too short to be shared, and no examples at all.
    few = [Kind(32, SMALLEST_SHARED - 1, 100, 5050, 10)]
    assert training_work("train", 1, few, 16, 1, settings, 1).forward.rows == 32 * (99 + SMALLEST_SHARED)
    assert training_work("train", 1, [Kind(0, 0, 100, 5050, 10)], 16, 1, settings, 1).forward.rows == 0


def test_without_a_meta_judge_nothing_is_compared() -> None:
    work = work_of(small_recipe(meta_judge=False))
    assert "compare" not in work
    assert work["train"].requests == 5


def test_all_at_once_takes_as_many_steps_as_the_longest() -> None:
    recipe = small_recipe()
    wide = replace(recipe, sampler=replace(recipe.sampler, max_running=64))
    assert work_of(wide)["respond"].decode.passes == 100
    # Two GPUs each make that many.
    assert work_of(wide, gpus=2)["respond"].decode.passes == 200


def test_seconds_by_hand() -> None:
    recipe = small_recipe()
    setting = Setting(recipe, CONFIG, LENGTHS, 1, "float32", FAST)
    stages = {item.work.stage: item for item in plan(setting, ASSUMED)}
    judge, train = stages["judge"], stages["train"]
    assert judge.parts["prefill"] == pytest.approx(inference_flops(CONFIG, judge.work.prefill) / 1e8 / 0.5)
    assert judge.parts["host"] == pytest.approx(0.002 * judge.work.decode.passes)
    assert judge.parts["sample"] == pytest.approx(4 * 10 * 2700 / 1e9 / 0.3)
    # The default computes every block again.
    rows, positions = train.work.forward.rows, train.work.forward.pairs
    weights = 4 * (2 * 4 + 2 * 2) + 3 * 4 * 6
    again = 2 * rows * 2 * (weights - 4 * 6) + 4 * positions * 2 * 4
    model = step_flops(CONFIG, train.work.forward).model
    assert train.parts["compute"] == pytest.approx((model + again) / 1e8 / 0.4)
    assert train.parts["optimizer"] == pytest.approx(28 * 340 * 9 / 1e9 / 0.5)
    assert stages["reference"].parts["compute"] == pytest.approx(model / 1e8 / 0.4 / 3 / 3)
    # Twice the GPUs, half the computing.
    double = {item.work.stage: item for item in plan(replace(setting, gpus=2), ASSUMED)}
    assert double["judge"].parts["prefill"] == pytest.approx(judge.parts["prefill"] / 2, rel=0.02)
    assert plan(replace(setting, machine=None), ASSUMED)[0].parts == {}


def test_gpus_that_share_a_model_are_one_engine() -> None:
    recipe = small_recipe()
    shared = replace(recipe, sampler=replace(recipe.sampler, tensor_parallel=2))
    one = Setting(recipe, CONFIG, LENGTHS, 1, "float32", FAST)
    two = replace(one, recipe=shared, gpus=2, config=replace(CONFIG, num_heads=4, num_kv_heads=2))
    assert work_of(shared, gpus=2)["judge"].decode == work_of(recipe)["judge"].decode
    alone = plan(replace(two, recipe=recipe, gpus=1), ASSUMED)[0]
    together = plan(two, ASSUMED)[0]
    assert alone.work.stage == together.work.stage == "respond"
    # They divide the passes and the loading, but not the drawing and the book-keeping.
    for name, times in (("prefill", 2), ("decode", 2), ("load", 2), ("sample", 1), ("host", 1)):
        assert together.parts[name] == pytest.approx(alone.parts[name] / times), name
    weights, cache = sampling_memory(replace(two, recipe=recipe))
    part, its_cache = sampling_memory(two)
    matrices = 4 * 2 * 10 * 4 + 4 * (2 * 2 + 1) * 4
    assert (part, its_cache) == ((weights - matrices) / 2 + matrices, cache / 2)


def seconds_of_training(setting: Setting, mode: str, **changes: Any) -> dict[str, float]:
    """Stage -> seconds of forward and backward under an activation checkpointing."""
    recipe = setting.recipe
    train = replace(recipe.train, activation_checkpointing=mode, **changes)
    found = plan(replace(setting, recipe=replace(recipe, train=train)), ASSUMED)
    return {item.work.stage: item.parts["compute"] for item in found if "compute" in item.parts}


def test_what_is_computed_again_takes_its_time() -> None:
    recipe = small_recipe()
    taught = replace(recipe, seed=replace(recipe.seed, enabled=True, max_examples=9))
    lengths = replace(LENGTHS, seed_prompt=150, seed_target=20)
    setting = Setting(taught, CONFIG, lengths, 1, "float32", FAST)
    none, selective, full = (seconds_of_training(setting, mode) for mode in ("none", "selective", "full"))
    assert none == selective
    # A reference is a forward pass: nothing is computed again.
    assert full["reference"] == none["reference"]
    work = {item.work.stage: item.work.forward for item in plan(setting, ASSUMED)}
    for stage in ("seed", "train"):
        once = forward_flops(CONFIG, work[stage])
        last = 2 * work[stage].rows * 2 * 4 * 6
        assert full[stage] - none[stage] == pytest.approx((once.dense - last + once.attention) / 1e8 / 0.4)
    # SFT makes its logits twice, pairs once.
    once = forward_flops(CONFIG, work["seed"])
    assert none["seed"] == pytest.approx((3 * once.model + once.head) / 1e8 / 0.4)
    assert none["train"] == pytest.approx(3 * forward_flops(CONFIG, work["train"]).model / 1e8 / 0.4)
    # Adapters are computed again with their matrices.
    once = forward_flops(CONFIG, work["train"])
    adapters = 2 * work["train"].rows * adapter_parameters(CONFIG, TrainSettings(lora_rank=3))
    with_adapters = [seconds_of_training(setting, mode, lora_rank=3)["train"] for mode in ("none", "full")]
    again = (once.dense - 2 * work["train"].rows * 2 * 4 * 6 + adapters + once.attention) / 1e8 / 0.4
    assert with_adapters[1] - with_adapters[0] == pytest.approx(again)


def test_measured_rates_serve_a_plan_with_another_checkpointing(run: Path, machine: Machine) -> None:
    """The share that a run reaches counts what it computed again, so the run planned as it was takes as long as it took."""
    forward = Work(passes=8, rows=1600, logit_rows=200, pairs=18_000, fused_rows=150)
    shares = {}
    for mode in ("none", "full"):
        for path in (run / "spans").glob("rank-*.jsonl"):
            path.write_text(with_note(path.read_text(), activation_checkpointing=mode))
        shares[mode] = measured_values(run, machine)["train_reached"]
        flops = step_flops(CONFIG, forward, recompute_blocks=mode == "full", recomputed_head_rows=50)
        # 4 s of forward and backward; two ranks share 2e6 FLOP/s.
        assert shares[mode] == pytest.approx((flops.model + flops.recomputed) / 4.0 / 2e6)
    assert shares["full"] > 1.2 * shares["none"]


def with_note(text: str, **facts: Any) -> str:
    """Spans whose notes on training say this too."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        if line["kind"] == "note" and line["stage"] == "train":
            line.update(facts)
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_what_dominates_is_found() -> None:
    slow_host = replace(ASSUMED, host_step=10.0)
    setting = Setting(small_recipe(), CONFIG, LENGTHS, 1, "float32", FAST)
    name, change = sensitivities(setting, slow_host)[0]
    assert name == "host_step"
    assert change == pytest.approx(0.25, abs=0.01)
    base = total_seconds(plan(setting, slow_host))
    assert total_seconds(plan(setting, replace(slow_host, host_step=12.5))) / base - 1 == pytest.approx(
        change
    )
    # Without a machine it is the tokens that are ranked, on which no rate has a bearing.
    ranked = dict(sensitivities(replace(setting, machine=None), ASSUMED))
    assert ranked["train_reached"] == 0.0
    assert ranked["response_share"] > 0.05


def test_memory_by_hand() -> None:
    recipe = small_recipe()
    setting = Setting(recipe, CONFIG, LENGTHS, 1, "float32", None)
    weights, cache = sampling_memory(setting)
    assert weights == 340 * 4
    # The longest request is cut at the context of 64 tokens; a token has 2 layers x 1 head x 2 x (key and value) x 4 bytes.
    assert cache == 8 * 64 * 2 * 2 * 1 * 2 * 4
    states, peak = training_memory(setting, [])
    assert states == 16 * 340
    assert training_memory(replace(setting, gpus=4), [])[0] == 4 * 340
    # As much as the run's own estimate has for full micro-batches; less is kept where blocks are computed again.
    tokens = recipe.train.micro_batch_tokens
    largest = LargestBatch(tokens, tokens, tokens, min(tokens, CONFIG.max_context))
    assert peak == memory_of(CONFIG, recipe.train, largest, 0, 1, "cuda").peak
    full = replace(recipe, train=replace(recipe.train, activation_checkpointing="full"))
    none = replace(recipe, train=replace(recipe.train, activation_checkpointing="none"))
    assert (
        training_memory(replace(setting, recipe=full), [])[1]
        < training_memory(replace(setting, recipe=none), [])[1]
    )


def test_measured_values_replace_assumptions_up_to_one() -> None:
    assert with_values(ASSUMED, {"train_reached": 1.7, "host_step": 3.0}).train_reached == 1.0
    assert with_values(ASSUMED, {"host_step": 3.0}).host_step == 3.0


def test_a_run_tells_its_lengths_and_rates(run: Path, machine: Machine) -> None:
    values = measured_values(run, machine)
    # 820 tokens in 40 completions of at most 512.
    assert values["judgment_share"] == pytest.approx(820 / 40 / 512)
    assert set(values) >= {
        "prefill_reached",
        "decode_reached",
        "sample_reached",
        "train_reached",
        "host_step",
    }
    assert "decode_reached" not in measured_values(run, None)


def test_the_plan_of_a_recipe(tiny_world: Path, tmp_path: Path, run: Path) -> None:
    path = tmp_path / "machine.json"
    save(replace(FAST, reached={str(tiny_world / "model"): {"train": 0.125, "load": 3.0}}), path)
    recipe = str(tiny_world / "recipe.toml")
    setting, plans, assumed, origins = make_plan(recipe, str(path), None, None, 1, Assumptions())
    assert [item.work.stage for item in plans][:5] == ["seed", "respond", "judge", "compare", "reference"]
    # 72 labels balanced, 48 comparisons; 6 prompts of 4 responses.
    assert plans[0].work.requests == 72 + 48
    assert plans[1].work.requests == 24
    assert 5 < setting.lengths.prompt < 30
    assert setting.lengths.judge_shared > 0
    assert assumed.train_reached == 0.125
    assert origins == {"train_reached": "measured here"}
    given = replace(Assumptions(), train_reached=0.25, host_step=0.5)
    _, _, assumed, origins = make_plan(recipe, str(path), run, None, 1, given)
    assert assumed.train_reached == 0.25
    assert (origins["train_reached"], origins["judgment_share"]) == ("given", "measured in run")


def test_mistakes_are_answered(tiny_world: Path, tmp_path: Path) -> None:
    recipe = str(tiny_world / "recipe.toml")
    with pytest.raises(UserError, match="--gpus 0"):
        make_plan(recipe, "", None, None, 0, Assumptions())
    with pytest.raises(UserError, match="does not divide over 1000 processes"):
        make_plan(recipe, "", None, None, 1000, Assumptions())
    with pytest.raises(UserError, match=r"--assume.judged-share 1.5 is out of range"):
        make_plan(recipe, "", None, None, 1, Assumptions(judged_share=1.5))
    with pytest.raises(UserError, match="downloads nothing"):
        make_plan("llama3-8b.toml", "", None, None, 1, Assumptions())
    with pytest.raises(UserError, match="neither a file nor the exact name"):
        make_plan(recipe, "abacus", None, None, 1, Assumptions())
    with pytest.raises(UserError, match="is not a run directory"):
        make_plan(recipe, "H100 80GB HBM3", tmp_path, None, 1, Assumptions())
