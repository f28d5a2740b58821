"""The DPO benchmark: its pairs are what it promises, its oracle notices mistakes, a tiny run leaves a complete file."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import dpo_step, workloads
from bench.dpo_job import COMPLETION_TOKENS, PROMPT_TOKENS, Job, judge_pairs, make_job
from bench.dpo_oracle import deviations, oracle_steps, worst
from bench.dpo_step import Disagrees, check_agreement, fastest, summary
from bench.peer_dpo import PeerSetting, candidates, missing, rows_of
from bench.record import commit
from bench.workloads import Source, common_length
from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.roles.judge import parse_score
from metareward.run.inputs import read_quality
from metareward.training.examples import Example

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A random model that reads SmolLM2's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dpo") / "model"
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
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def job(tiny: Path) -> Job:
    """Six short pairs with a common beginning, in global batches of two."""
    examples = tuple(
        Example(
            f"pair {index}",
            "judge",
            (*range(100, 140), *range(500 + 10 * index, 507 + 11 * index)),
            (tuple(range(900, 904 + index)), tuple(range(950 + index, 962))),
        )
        for index in range(6)
    )
    settings = TrainSettings(
        batch_pairs=2,
        learning_rate=1e-3,
        warmup_share=0.0,
        min_learning_rate_share=1.0,
        checkpoint_steps=1000,
    )
    return make_job(tiny, examples, settings, steps=4, seed=0)


def test_pairs_are_judge_prompts_and_judgments(smollm2: Path) -> None:
    if not workloads.DATA.is_dir():
        pytest.skip(f"the benchmark's data is not in {workloads.DATA}")
    chat = Chat.load(smollm2)
    pairs = judge_pairs(workloads.read_source(workloads.DATA, chat), 64)
    assert (
        len({(pair.prompt, pair.completions) for pair in pairs})
        == len({pair.identity for pair in pairs})
        == 64
    )
    assert all(PROMPT_TOKENS[0] <= len(pair.prompt) <= PROMPT_TOKENS[1] for pair in pairs)
    completions = [completion for pair in pairs for completion in pair.completions]
    assert all(COMPLETION_TOKENS[0] <= len(completion) <= COMPLETION_TOKENS[1] for completion in completions)
    assert all(parse_score(chat.decode(completion)) is not None for completion in completions)
    assert all(completion[-1] == chat.end_of_turn for completion in completions)
    assert all(pair.completions[0] != pair.completions[1] for pair in pairs)
    # All begin with the rubric.
    assert min(common_length(pairs[0].prompt, pair.prompt) for pair in pairs) > 150


def test_too_little_data_is_said(smollm2: Path) -> None:
    empty = Source(Chat.load(smollm2), {"What is rain?": ["Water."]}, [])
    with pytest.raises(UserError, match=r"dpo_step needs 4 responses .* lower --pairs"):
        judge_pairs(empty, 4)


def test_oracle_takes_the_steps_of_torch(job: Job) -> None:
    """The oracle against a second implementation: torch's AdamW and clipping on unpadded sequences."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def logprob(example: Example, completion: tuple[int, ...]) -> torch.Tensor:
        logits = model(torch.tensor([example.prompt + completion])).logits[0, len(example.prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(completion)), list(completion)].sum()

    def margin(example: Example) -> torch.Tensor:
        return logprob(example, example.completions[0]) - logprob(example, example.completions[1])

    with torch.no_grad():
        fixed = {example.identity: margin(example) for example in job.examples}
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        losses = [torch.log1p(torch.exp(-0.1 * (margin(e) - fixed[e.identity]))) for e in job.batch(step)]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    found = oracle_steps(job, 3)
    assert worst(deviations(found, expected)) < 1e-5
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    # A learning rate at which the steps matter, so that a wrong update would show.
    assert abs(found[2]["loss"] - found[0]["loss"]) > 1e-4


@pytest.fixture(scope="module")
def quick(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The record of a quick run by its command, what it printed, and its data."""
    folder = tmp_path_factory.mktemp("quick")
    lines = [
        {"prompt": line.prompt, "response": line.response, "quality": line.quality}
        for line in read_quality("starter:quality")
    ]
    for name in (workloads.QUALITY, workloads.PROMPTS):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--quick", "--model", str(tiny), "--data", str(folder), "--json", str(folder / "x.json")]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("OMP_NUM_THREADS", "1")
        # As at the other steps of these tests, a learning rate at which a wrong update shows.
        dpo_step.main([*options, "--learning-rate", "1e-4", "--micro-batch-tokens", "1024"])
    return json.loads((folder / "x.json").read_text()), printed.getvalue(), folder


def test_quick_run_agrees_with_the_oracle(quick: Any, tiny: Path) -> None:
    record, _, folder = quick
    check_agreement(record["deviations"])
    assert [len(record["deviations"][dtype]) for dtype in ("fp32", "bf16")] == [3, 3]
    losses = [step["loss"] for step in record["oracle"]]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-3
    # A tenth more in one setting is told.
    pairs = judge_pairs(workloads.read_source(folder, Chat.load(tiny)), 4)
    settings = TrainSettings(**{**record["settings"], "beta": 0.11})
    off = deviations(record["rounds"], oracle_steps(make_job(tiny, pairs, settings, steps=4, seed=0), 3))
    with pytest.raises(Disagrees, match="ours in bf16"):
        check_agreement({**record["deviations"], "bf16": off})


def test_quick_run_leaves_a_complete_file(quick: Any) -> None:
    record, printed, _ = quick
    assert (record["pairs"], record["batch_pairs"], len(record["rounds"])) == (4, 2, 3)
    assert record["commit"] == commit()
    assert record["settings"]["compute_dtype"] == "bfloat16"
    assert {"cpu", "cores"} <= record["machine"].keys()
    assert {"torch", "trl"} <= record["versions"].keys()
    assert "pairs/s" in printed
    assert record["tokens_computed"] < record["tokens_unshared"]
    seconds = sorted(step["seconds"] for step in record["rounds"][1:])
    assert record["pairs_per_s"] == pytest.approx(2 * 2 / sum(seconds))
    assert 0 < record["peak_bytes"] < record["peak_whole_bytes"]
    assert record["implementation"].keys() == {"linear_preference", "segment_attention"}
    assert record["tflops"] > 0
    assert record["mfu"] is None
    assert "CPU" in record["mfu_reason"]
    if reason := missing():
        assert record["peer_reason"] == reason
        assert record["ratio"] is record["peer_pairs_per_s"] is record["peer_setting"] is None
        assert record["peer_peak_bytes"] is None
        return
    assert record["ratio"] == record["pairs_per_s"] / record["peer_pairs_per_s"]
    assert worst(record["deviations"]["peer"]) < 0.05
    assert len(record["peer_rounds"]) == 3
    # Both sides saw the same pairs, the peer's padded to the longer completion.
    assert record["peer_tokens_computed"] >= record["tokens_unshared"]
    assert record["peer_setting"]["batch_pairs"] == 1
    assert 0 < record["peer_peak_bytes"] < record["peer_peak_whole_bytes"]


def test_peer_gets_the_same_batches(job: Job) -> None:
    rows = rows_of(job, 3)
    for step in range(3):
        mine = {(e.prompt, *e.completions) for e in job.batch(step)}
        theirs = {
            tuple(tuple(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            for row in rows[2 * step : 2 * step + 2]
        }
        assert mine == theirs
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    assert all(lengths[i] >= lengths[i + 1] for i in range(0, 6, 2))


def test_peer_settings() -> None:
    assert candidates(12) == [PeerSetting(1), PeerSetting(2), PeerSetting(4), PeerSetting(2, True)]
    tried = [{"seconds": 3.0}, {"seconds": 1.0}]
    assert fastest([PeerSetting(1), PeerSetting(2)], tried) == PeerSetting(2)


def test_summary_leaves_the_first_step_out() -> None:
    step = {
        "loss": 0.7,
        "grad_norm": 1.0,
        "tokens": 10,
        "unshared_tokens": 30,
        "peak_bytes": 5,
        "peak_whole_bytes": 9,
    }
    mine = [{**step, "seconds": seconds} for seconds in (100.0, 2.0, 8.0, 4.0)]
    theirs = [{**step, "seconds": seconds} for seconds in (100.0, 8.0, 8.0, 32.0)]
    found = summary(mine, theirs, 16, "no MFU: a reason")
    assert (found["pairs_per_s"], found["peer_pairs_per_s"], found["ratio"]) == (4.0, 2.0, 2.0)
    assert (found["tokens_computed"], found["tokens_unshared"]) == (30, 90)
    assert (found["mfu"], found["mfu_reason"]) == (None, "no MFU: a reason")
    known = [{**step, "mfu": share} for step, share in zip(mine, (0.9, 0.3, 0.5, 0.4), strict=True)]
    found = summary(known, [], 16, "no MFU: a reason")
    assert (found["mfu"], found["mfu_reason"], found["ratio"]) == (0.4, None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pairs", "6", "--batch-pairs", "4"], "--pairs 6 is no multiple of --batch-pairs 4"),
        (["--rounds", "1"], "--rounds is 1: set 2 or more"),
        (["--learning-rate", "nan"], "--learning-rate is nan: set a positive number"),
        (["--batch-pairs", "4", "--peer-batch", "3"], "--peer-batch 3 does not divide"),
        (["--data", "/nowhere"], "--data DIR"),
    ],
)
def test_wrong_input_is_one_sentence(
    options: list[str], said: str, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(SystemExit) as ended:
        dpo_step.main(["--json", str(file), "--model", str(tiny), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not file.exists()
