"""Ranks that share a model give what one process gives: tokens, log-probs and files. On gloo."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from metareward.config import Recipe, SamplerSettings
from metareward.errors import UserError
from metareward.loop import run
from metareward.model.chat import Chat
from metareward.model.hf_files import iterate_tensors, read_config
from metareward.model.tensor_parallel import TensorGroup, check_tensor_parallel, part_config
from metareward.profiling.read import read_run
from metareward.recipe_files import load_recipe
from metareward.run.metrics import read_metrics
from metareward.stages.context import load_engine

TESTS = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # With a bias on the sum of the ranks' terms, which must be added once.
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}),
    "qwen3": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}),
}
SHARED = [("llama", 2, 2), ("llama", 4, 2), ("qwen3", 2, 2), ("qwen3", 4, 4)]
"""(family, processes, ranks a model)"""


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """tensor_parallel_worker.py as a module, beside rank_worker.py of the training room, which it imports by that name."""
    for name, folder in (("rank_worker", "training"), ("tensor_parallel_worker", "stages")):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, TESTS / folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    return sys.modules["tensor_parallel_worker"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    folders = {}
    for family, (name, settings) in FAMILIES.items():
        config = getattr(transformers, f"{name}Config")(
            **{**SIZES, **settings, "tie_word_embeddings": family == "llama"}
        )
        torch.manual_seed(sum(family.encode()))
        model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms of ones, biases of zero and near-uniform logits would hide mistakes.
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
        folders[family] = tmp_path_factory.mktemp("models") / family
        model.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def recipe(tiny_world: Path) -> Recipe:
    recipe = load_recipe(tiny_world / "recipe.toml")
    short = replace(recipe.respond, max_new_tokens=12)
    return replace(recipe, seed=replace(recipe.seed, enabled=False), respond=short)


def sharing(recipe: Recipe, size: int) -> Recipe:
    return replace(recipe, sampler=replace(recipe.sampler, tensor_parallel=size))


@pytest.fixture(scope="module")
def folder(
    worker: ModuleType, models: dict[str, Path], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every case of this module, run; `<name>-<rank>.pt` says what a rank saw, `runs/<processes>` has the stage's files."""
    folder = tmp_path_factory.mktemp("tensor-parallel")
    cases: dict[tuple[str, int], Any] = {}
    for family, model in models.items():
        cases[f"{family}-1-{torch.float32}", 1] = worker.Sampling(model, 1)
    for family, processes, size in SHARED:
        cases[f"{family}-{processes}-{torch.float32}", processes] = worker.Sampling(models[family], size)
    for size in (1, 2):
        cases[f"qwen3-{size}-{torch.bfloat16}", size] = worker.Sampling(models["qwen3"], size, torch.bfloat16)
    for processes in (1, 2, 4):
        cases[f"respond-{processes}", processes] = worker.Staging(
            sharing(recipe, min(processes, 2)), folder / "runs" / str(processes)
        )
    torch.save(cases, folder / "plan.pt")
    places = [TESTS.parent, TESTS.parent / "kernels", TESTS / "training", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(TESTS / "stages" / "tensor_parallel_worker.py"), str(folder / "plan.pt")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(map(str, places)),
        },
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def seen(
    folder: Path, family: str, processes: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    """What every rank saw."""
    return [
        torch.load(folder / f"{family}-{processes}-{dtype}-{rank}.pt", weights_only=False)
        for rank in range(processes)
    ]


@pytest.mark.parametrize(("family", "processes", "size"), SHARED)
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_tokens_and_logprobs_are_those_of_one_process(
    folder: Path, worker: ModuleType, family: str, processes: int, size: int, kind: str
) -> None:
    (one,) = seen(folder, family, 1)
    assert len(one[kind]) == len(worker.requests())
    # Nothing of this is easy: sequences gave way, ended early, and ended at the limit.
    assert one["preemptions"] > 0
    assert len({item.finished for item in one[kind].values()}) == 2
    ranks = seen(folder, family, processes)
    together: dict[str, Any] = {}
    for first in range(0, processes, size):
        together |= ranks[first][kind]
    assert together.keys() == one[kind].keys()
    for identity, wanted in one[kind].items():
        assert together[identity].token_ids == wanted.token_ids, identity
        assert together[identity].finished == wanted.finished
        assert together[identity].logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "processes", "size", "dtype"),
    [*((*case, torch.float32) for case in SHARED), ("qwen3", 2, 2, torch.bfloat16)],
)
def test_the_ranks_of_a_group_see_the_same_bits(
    folder: Path, family: str, processes: int, size: int, dtype: torch.dtype
) -> None:
    ranks = seen(folder, family, processes, dtype)
    for rank, found in enumerate(ranks):
        first = ranks[rank // size * size]
        # Log-probs are each rank's own, of its own logits.
        assert (found["greedy"], found["drawn"]) == (first["greedy"], first["drawn"])
        assert torch.equal(found["logits"], first["logits"])
        assert all(torch.equal(mine, its) for mine, its in zip(found["sums"], first["sums"], strict=True))


@pytest.mark.parametrize(("family", "processes", "size"), SHARED)
def test_sums_are_over_the_group_alone(
    folder: Path, worker: ModuleType, family: str, processes: int, size: int
) -> None:
    for rank, found in enumerate(seen(folder, family, processes)):
        members = range(rank // size * size, rank // size * size + size)
        for count, total in zip(worker.ODD_SIZES, found["sums"], strict=True):
            terms = [
                torch.randn(count, generator=torch.Generator().manual_seed(member)) for member in members
            ]
            torch.testing.assert_close(total, torch.stack(terms).sum(0))


@pytest.mark.parametrize(("family", "processes", "size"), SHARED)
def test_the_plain_forward_of_the_parts_is_that_of_the_whole(
    folder: Path, family: str, processes: int, size: int
) -> None:
    (one,) = seen(folder, family, 1)
    for found in seen(folder, family, processes):
        torch.testing.assert_close(found["logits"], one["logits"], rtol=1e-5, atol=1e-5)
        assert found["difference"]["logprob_difference_max"] <= 1e-4


def test_in_bf16_the_group_is_as_near_to_the_trainer_as_one_process(folder: Path) -> None:
    (one,) = seen(folder, "qwen3", 1, torch.bfloat16)
    for found in seen(folder, "qwen3", 2, torch.bfloat16):
        assert found["difference"]["logprob_difference_tokens"] > 100
        mean = one["difference"]["logprob_difference_mean"]
        assert found["difference"]["logprob_difference_mean"] <= 1.5 * mean


@pytest.mark.parametrize(("family", "processes", "size"), SHARED)
def test_a_rank_holds_its_part_of_blocks_and_cache(
    folder: Path, models: dict[str, Path], family: str, processes: int, size: int
) -> None:
    (one,) = seen(folder, family, 1)
    config = read_config(models[family])
    # Norms, and the bias of the sum, are on every rank.
    whole = 4 * config.num_layers * (2 * config.hidden_size + config.output_bias * config.hidden_size)
    whole += 4 * config.num_layers * config.qk_norm * 2 * config.head_dim
    for found in seen(folder, family, processes):
        assert found["block_bytes"] == (one["block_bytes"] - whole) / size + whole
        assert found["block_bytes"] < 1.1 * one["block_bytes"] / size
        assert found["cache_bytes"] == one["cache_bytes"] / size


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_file_are_the_whole(models: dict[str, Path], family: str) -> None:
    whole = dict(iterate_tensors(models[family]))
    parts = [dict(iterate_tensors(models[family], TensorGroup(rank, 2))) for rank in range(2)]
    for name, tensor in whole.items():
        left, right = parts[0][name], parts[1][name]
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert torch.equal(torch.cat((left, right)), tensor), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat((left, right), dim=1), tensor), name
        elif name.endswith("o_proj.bias"):
            assert torch.equal(left, tensor), name
            assert not right.any()
        else:
            assert torch.equal(left, tensor), name
            assert torch.equal(right, tensor), name


@pytest.mark.parametrize("processes", [2, 4])
def test_the_stage_gives_the_file_of_one_process(folder: Path, processes: int) -> None:
    one, shared = folder / "runs" / "1", folder / "runs" / str(processes)
    wanted = (one / "iteration-1" / "responses.jsonl").read_bytes()
    assert wanted.count(b"\n") == 6 * 4
    assert (shared / "iteration-1" / "responses.jsonl").read_bytes() == wanted
    assert not list(shared.rglob("*.part-*"))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_work_of_a_group_is_counted_once(folder: Path, processes: int) -> None:
    def event(count: int) -> dict[str, Any]:
        (found,) = (item for item in read_metrics(folder / "runs" / str(count)) if item["event"] == "stage")
        return found

    alone, shared = event(1), event(processes)
    for name in ("requests", "prompt_tokens", "new_tokens"):
        assert shared[name] == alone[name]
    assert (shared["ranks"], shared["tensor_parallel"]) == (processes, 2)
    for left, right in zip(
        read_run(folder / "runs" / "1").stages, read_run(folder / "runs" / str(processes)).stages, strict=True
    ):
        assert left.stage == right.stage
        assert len(right.phases) == processes
        for name in ("requests", "prompt_tokens", "new_tokens", "completions"):
            assert left.count(name) == right.count(name), (left.stage, name)


def test_a_size_that_does_not_fit_is_answered_with_those_that_do(models: dict[str, Path]) -> None:
    config = read_config(models["qwen3"])
    for size, processes in ((1, 3), (2, 2), (2, 6), (4, 4), (4, 8)):
        check_tensor_parallel(size, processes, config)
    fits = r"must divide the number of processes \(4\) and .* \(8\), key-value heads \(4\) and intermediate_size \(48\): set it"
    with pytest.raises(UserError, match=rf"^sampler.tensor_parallel = 8 {fits} to 1, 2 or 4$"):
        check_tensor_parallel(8, 4, config)
    with pytest.raises(
        UserError, match=r"processes \(1\).*: set it to 1, or start a multiple of 2 processes$"
    ):
        check_tensor_parallel(2, 1, config)
    narrow = replace(config, intermediate_size=50)
    with pytest.raises(UserError, match=r"intermediate_size \(50\): set it to 1 or 2$"):
        check_tensor_parallel(4, 8, narrow)
    part = part_config(config, 4)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size, part.head_dim) == (2, 1, 12, 16)


def test_a_run_refuses_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"sampler\.tensor_parallel = 2 must divide the number of processes \(1\)"
    ):
        run(sharing(recipe, 2), tmp_path / "run")
    assert not list((tmp_path / "run").glob("iteration-*"))


def test_a_command_of_one_process_refuses(tiny_world: Path) -> None:
    settings = SamplerSettings(tensor_parallel=2)
    with pytest.raises(UserError, match=r"one process a model, and sampler\.tensor_parallel = 2"):
        load_engine(tiny_world / "model", Chat.load(tiny_world / "model", {}), settings, 0)
