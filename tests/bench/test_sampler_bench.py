"""The sampler's benchmark: its prompts are what it promises, and a tiny run of both sides leaves a complete file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import sampler, workloads
from bench.judgments import different_judgments
from bench.peer_generate import Peer, best_batch, plan, tokens_per_s
from bench.record import commit, environment
from bench.workloads import Source, Workload, common_length, unshared_tokens
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.hf_files import load_decoder
from metareward.roles.judge import parse_score
from metareward.run.inputs import read_quality
from metareward.sampler import Request, SamplingParams

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def chat(smollm2: Path) -> Chat:
    return Chat.load(smollm2)


@pytest.fixture(scope="module")
def source(chat: Chat) -> Source:
    if not workloads.DATA.is_dir():
        pytest.skip(f"the benchmark's data is not in {workloads.DATA}")
    return workloads.read_source(workloads.DATA, chat)


@pytest.fixture(scope="module")
def packaged(chat: Chat) -> Source:
    """The same from the packaged starter set, which is always there."""
    lines = read_quality("starter:quality")
    responses: dict[str, list[str]] = {}
    for line in lines:
        responses.setdefault(line.prompt, []).append(line.response)
    return Source(chat, responses, list(responses))


def test_unshared_tokens_are_those_of_a_prefix_tree() -> None:
    prompts = [(1, 2, 3), (1, 2, 4, 5), (1, 2), (7,), (1, 2, 3)]
    requests = tuple(Request(str(index), prompt) for index, prompt in enumerate(prompts))
    run = Workload("judge", requests, SamplingParams())
    tree = {prompt[:length] for prompt in prompts for length in range(1, len(prompt) + 1)}
    assert unshared_tokens(run) == len(tree) == 6


@pytest.mark.parametrize("scale", [1, 2])
def test_judge_prompts(source: Source, scale: int) -> None:
    run = workloads.judge(source, instructions=3 * scale)
    # In order, so that the first and the last of some neighbours differ the most.
    prompts = list(dict.fromkeys(request.prompt for request in run.requests))
    assert prompts == sorted(prompts)
    assert len(run.requests) == scale * 3 * 8 * 11
    assert len(prompts) == scale * 24
    assert all(350 <= len(prompt) <= 500 for prompt in prompts)
    # Groups of eight neighbours share the rubric and their instruction, and groups share the rubric.
    shared = [common_length(prompts[i], prompts[i + 7]) for i in range(0, len(prompts), 8)]
    overall = common_length(prompts[0], prompts[-1])
    assert overall > 150
    assert all(overall + 5 < length < min(map(len, prompts)) for length in shared)
    assert unshared_tokens(run) < 0.06 * sum(len(request.prompt) for request in run.requests)
    assert run.params.max_new_tokens == 128
    assert len({request.identity for request in run.requests}) == len(run.requests)


def test_compare_prompts(source: Source) -> None:
    run = workloads.compare(source)
    prompts = [request.prompt for request in run.requests]
    assert len(prompts) == len(set(prompts)) == 6 * 110
    assert prompts == sorted(prompts)
    assert unshared_tokens(run) < 0.3 * sum(map(len, prompts))
    assert run.params.max_new_tokens == 64


def test_respond_prompts(source: Source) -> None:
    run = workloads.respond(source)
    prompts = {request.prompt for request in run.requests}
    assert (len(run.requests), len(prompts)) == (64 * 7, 64)
    assert sum(map(len, prompts)) / len(prompts) == pytest.approx(40, abs=5)
    # The samples of a prompt are neighbours.
    assert all(run.requests[i].prompt == run.requests[i - i % 7].prompt for i in range(len(run.requests)))


def test_judgments_are_different_and_of_length(chat: Chat) -> None:
    response = (
        "Tides follow the moon. Its pull raises the water, and the turning earth carries the bulge round."
    )
    texts = different_judgments(response, 11, chat)
    assert len(set(texts)) == 11
    assert all(60 <= len(chat.encode_completion(text)) - 1 <= 120 for text in texts)
    assert all(parse_score(text) is not None for text in texts)
    assert len({parse_score(text) for text in texts}) > 2
    assert texts == different_judgments(response, 11, chat)


def test_too_little_data_is_said(packaged: Source) -> None:
    with pytest.raises(UserError, match=r"the workload judge needs 100000 instructions .* --scale"):
        workloads.judge(packaged, instructions=100_000)


def test_missing_data_is_one_sentence(tmp_path: Path, smollm2: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        sampler.main(
            [
                "--json",
                str(tmp_path / "x.json"),
                "--data",
                str(tmp_path),
                "--model",
                str(smollm2),
                "--no-peer",
            ]
        )
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "--data DIR" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_peer_measures_everything_once_then_the_best() -> None:
    assert len(plan([])) == 6
    rates = {("bf16", 16): 5.0, ("bf16", 32): 9.0, ("bf16", 64): 7.0, ("fp32", 16): 4.0, ("fp32", 64): 3.0}
    found = [
        {"round": 0, "dtype": dtype, "batch": batch, "tokens_per_s": rate}
        for (dtype, batch), rate in rates.items()
    ]
    assert plan(found) == [("bf16", 32)]
    faster = [{"round": 0, "dtype": "fp32", "batch": 32, "tokens_per_s": 9.5}]
    assert plan(found + faster) == [("bf16", 32), ("fp32", 32)]
    found += [{"round": 1, "dtype": "bf16", "batch": 32, "tokens_per_s": 6.0}]
    assert best_batch(found, "bf16") == 32
    assert tokens_per_s(found, "bf16") == 7.5


def test_tiny_run_of_both_sides(tmp_path: Path, smollm2: Path, packaged: Source, capsys: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, tmp_path / "model" / name)
    run = workloads.respond(packaged, prompts=2, samples=2, new_tokens=4)
    longer = workloads.respond(packaged, prompts=8, samples=2, new_tokens=4)
    record = sampler.measure_all(
        load_decoder(tmp_path / "model", dtype=torch.float32),
        Peer(tmp_path / "model", packaged.chat.stop_ids),
        [run],
        long_runs=[longer],
        rounds=2,
        max_running=3,
        seed=0,
        header={"model": "tiny", **environment()},
        path=tmp_path / "out.json",
    )
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert record["rounds"] == 2
    assert record["commit"] == commit()
    assert {"cpu", "cores", "threads", "memory_gib"} <= record["machine"].keys()
    assert record["versions"]["torch"] == torch.__version__
    found = record["workloads"]["respond"]
    assert (found["requests"], found["new_tokens"]) == (4, 16)
    assert found["prompt_tokens"] == sum(len(request.prompt) for request in run.requests)
    assert found["least_prefill_tokens"] <= found["prefill_tokens"] < found["prompt_tokens"]
    assert 0 < found["peak_kv_pages"] <= found["unshared_kv_pages"]
    assert found["ratio"] == found["tokens_per_s"] / found["peer_tokens_per_s"]
    assert found["ratio_fp32"] == found["tokens_per_s"] / found["peer_fp32_tokens_per_s"]
    assert found["tokens_per_s"] in [turn["tokens_per_s"] for turn in found["rounds"]]
    assert all(isinstance(name, str) for name in found["implementation"].values())
    assert found["implementation"]
    # Six in the first round, the best of bf16 (and of fp32 where it was faster) in the second.
    assert [turn["round"] for turn in found["peer_rounds"][:7]] == [0] * 6 + [1]
    assert len(found["peer_rounds"]) <= 8
    assert {turn["new_tokens"] for turn in found["peer_rounds"]} == {16}
    assert found["linear"]["rounds"][0]["requests"] == 16
    sampler.print_table(record)
    assert "respond" in capsys.readouterr().out
