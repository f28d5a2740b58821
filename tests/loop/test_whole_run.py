"""A whole run through the command line: what it leaves behind, read independently."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

RHO = {1: 0.0, 2: 0.32}
Lines = list[dict[str, Any]]


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(root: Path) -> dict[str, str]:
    """Relative path -> content digest of every file."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def expected_actor_pairs(folder: Path, rho: float) -> Lines:
    """The paper's stage 3, from the files alone."""
    text = {
        (line["prompt_id"], line["response_id"]): line["text"] for line in read(folder / "responses.jsonl")
    }
    scores = defaultdict(list)
    for line in read(folder / "judgments.jsonl"):
        if line["score"] is not None:
            scores[line["prompt_id"], line["response_id"]].append(line["score"])
    pairs = []
    for prompt_id in dict.fromkeys(key[0] for key in text):
        mean = {key[1]: float(np.mean(found)) for key, found in scores.items() if key[0] == prompt_id}
        if len(mean) < 2 or math.isclose(max(mean.values()), min(mean.values())):
            continue
        top, bottom = max(mean.values()), min(mean.values())
        high = [key for key, score in mean.items() if score >= (1 - rho) * top + rho * bottom - 1e-9]
        low = [key for key, score in mean.items() if score <= (1 - rho) * bottom + rho * top + 1e-9]
        chosen = min(high, key=lambda key: (len(text[prompt_id, key]), -mean[key], key))
        rejected = min(low, key=lambda key: (-len(text[prompt_id, key]), mean[key], key))
        pairs.append(
            {
                "prompt_id": prompt_id,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_score": pytest.approx(mean[chosen]),
                "rejected_score": pytest.approx(mean[rejected]),
            }
        )
    return pairs


def expected_judge_pairs(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The paper's stage 4, from the files alone: (prompt_id, response_id) -> Elo by judgment."""
    comparisons = read(folder / "comparisons.jsonl")
    first = sum(line["winner"] == "first" for line in comparisons)
    second = sum(line["winner"] == "second" for line in comparisons)
    w1, w2 = (second / (first + second), first / (first + second)) if first + second else (0.5, 0.5)
    groups = defaultdict(list)
    for line in comparisons:
        groups[line["prompt_id"], line["response_id"]].append(line)
    found = {}
    for key, lines in groups.items():
        ids = sorted({line["first"] for line in lines})
        wins = np.zeros((len(ids), len(ids)))
        for line in lines:
            a, b = ids.index(line["first"]), ids.index(line["second"])
            if line["winner"] == "first":
                wins[a, b] += w1
            elif line["winner"] == "second":
                wins[b, a] += w2

        def loss(eps: np.ndarray, wins: np.ndarray = wins) -> float:
            gap = eps[:, None] - eps[None, :]
            return float((wins * np.logaddexp(0, -gap)).sum() + 0.005 * (eps**2).sum())

        eps = minimize(loss, np.zeros(len(ids)), method="BFGS", options={"gtol": 1e-9}).x
        if eps.max() - eps.min() > 1e-6:
            found[key] = dict(zip(ids, eps - eps.mean(), strict=True))
    return found


@pytest.mark.parametrize("iteration", [1, 2])
def test_actor_pairs_equal_an_independent_reading(finished_run: Path, iteration: int) -> None:
    folder = finished_run / f"iteration-{iteration}"
    pairs = read(folder / "actor_pairs.jsonl")
    assert pairs == expected_actor_pairs(folder, RHO[iteration])
    assert pairs, "the recipe is meant to give actor pairs"


@pytest.mark.parametrize("iteration", [1, 2])
def test_judge_pairs_equal_an_independent_reading(finished_run: Path, iteration: int) -> None:
    folder = finished_run / f"iteration-{iteration}"
    pairs = read(folder / "judge_pairs.jsonl")
    assert pairs, "the recipe is meant to give judge pairs"
    expected = expected_judge_pairs(folder)
    assert [(line["prompt_id"], line["response_id"]) for line in pairs] == list(expected)
    for line in pairs:
        elo = expected[line["prompt_id"], line["response_id"]]
        # Two optimizers agree to about 1e-5, so a near tie may be broken either way; the Elo may not differ.
        assert line["chosen_elo"] == pytest.approx(max(elo.values()), abs=1e-4)
        assert line["rejected_elo"] == pytest.approx(min(elo.values()), abs=1e-4)
        assert elo[line["chosen"]] == pytest.approx(max(elo.values()), abs=1e-4)
        assert elo[line["rejected"]] == pytest.approx(min(elo.values()), abs=1e-4)


@pytest.mark.parametrize("iteration", [1, 2])
def test_comparisons_cover_the_most_varied_response_in_both_orders(
    finished_run: Path, iteration: int
) -> None:
    folder = finished_run / f"iteration-{iteration}"
    usable = defaultdict(lambda: defaultdict(dict))
    for line in read(folder / "judgments.jsonl"):
        if line["finished"] and line["score"] is not None:
            usable[line["prompt_id"]][line["response_id"]][line["judgment_id"]] = line["score"]
    compared = defaultdict(list)
    for line in read(folder / "comparisons.jsonl"):
        compared[line["prompt_id"], line["response_id"]].append((line["first"], line["second"]))
    assert len({prompt_id for prompt_id, _ in compared}) == len(compared), "one response a prompt"
    for (prompt_id, response_id), orders in compared.items():
        assert sorted(orders) == sorted(itertools.permutations(usable[prompt_id][response_id], 2))
        variance = {
            key: np.var(list(found.values())) for key, found in usable[prompt_id].items() if len(found) > 1
        }
        assert variance[response_id] == pytest.approx(max(variance.values()))
    eligible = {key for key, found in usable.items() if any(len(scores) > 1 for scores in found.values())}
    assert eligible == {prompt_id for prompt_id, _ in compared}


@pytest.mark.parametrize("folder", ["seed", "iteration-1", "iteration-2"])
def test_models_load_in_plain_transformers_and_generate(finished_run: Path, folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished_run / folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / folder / "model")
    messages = [{"role": "user", "content": "Tell me about tea."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_each_iteration_trains_the_model_before_it(finished_run: Path) -> None:
    from metareward.model.hf_files import weights_digest

    seeded, first, second = (
        weights_digest(finished_run / name / "model") for name in ("seed", "iteration-1", "iteration-2")
    )
    assert len({seeded, first, second}) == 3
    for iteration, digest in ((1, seeded), (2, first)):
        reference = read(finished_run / f"iteration-{iteration}" / "reference_logprobs.jsonl")
        assert {line["weights"] for line in reference} == {digest}


def test_the_first_loss_is_ln_2_and_no_request_is_doubled(finished_run: Path) -> None:
    events = read(finished_run / "metrics.jsonl")
    for iteration in (1, 2):
        first = next(
            event
            for event in events
            if event["event"] == "step" and event["stage"] == "train" and event["iteration"] == iteration
        )
        assert first["step"] == 1
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        for name, fields in {
            "responses": ("prompt_id", "response_id"),
            "judgments": ("prompt_id", "response_id", "judgment_id"),
            "comparisons": ("prompt_id", "response_id", "first", "second"),
        }.items():
            lines = read(finished_run / f"iteration-{iteration}" / f"{name}.jsonl")
            keys = [tuple(line[field] for field in fields) for line in lines]
            assert keys
            assert len(keys) == len(set(keys))


def test_only_finished_distinct_responses_are_judged_and_paired(finished_run: Path) -> None:
    for iteration in (1, 2):
        folder = finished_run / f"iteration-{iteration}"
        responses = {
            (line["prompt_id"], line["response_id"]): line for line in read(folder / "responses.jsonl")
        }
        for line in read(folder / "judgments.jsonl"):
            response = responses[line["prompt_id"], line["response_id"]]
            assert response["finished"]
            assert response["duplicate_of"] is None


def test_a_finished_run_says_so_and_changes_nothing(
    finished_run: Path, tiny_world: Path, metareward: Any
) -> None:
    before = snapshot(finished_run)
    again = metareward("run", tiny_world / "recipe.toml", "--run-dir", finished_run)
    assert again.returncode == 0
    assert "already; nothing was changed" in again.stdout
    assert snapshot(finished_run) == before


def test_another_recipe_is_refused_with_the_settings_named(
    finished_run: Path, tiny_world: Path, metareward: Any
) -> None:
    before = snapshot(finished_run)
    other = metareward("run", tiny_world / "recipe.toml", "--run-dir", finished_run, "--judge.samples", 5)
    assert other.returncode == 2
    assert "judge.samples: 4 -> 5" in other.stdout
    assert "Traceback" not in other.stdout
    assert snapshot(finished_run) == before


def test_a_stage_runs_alone_and_gives_the_same_file(
    finished_run: Path, tmp_path: Path, metareward: Any
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    again = copy / "iteration-2" / "comparisons.jsonl"
    again.unlink()
    done = metareward("stage", "compare", copy, "--iteration", 2)
    assert done.returncode == 0, done.stdout
    assert again.read_bytes() == (finished_run / "iteration-2" / "comparisons.jsonl").read_bytes()


def test_exported_pairs_are_the_pairs_of_the_run(finished_run: Path, tmp_path: Path, metareward: Any) -> None:
    out = tmp_path / "pairs.jsonl"
    done = metareward("export", "pairs", finished_run, "--format", "trl", "--out", out)
    assert done.returncode == 0, done.stdout
    lines = read(out)
    count = 0
    for number in (1, 2):
        folder = finished_run / f"iteration-{number}"
        count += len(read(folder / "actor_pairs.jsonl"))
        judgments = {
            (line["prompt_id"], line["response_id"], line["judgment_id"]): line["token_ids"]
            for line in read(folder / "judgments.jsonl")
        }
        for line in read(folder / "judge_pairs.jsonl"):
            key = (line["prompt_id"], line["response_id"])
            # Two judgments with the same tokens are no pair to learn from.
            count += judgments[*key, line["chosen"]] != judgments[*key, line["rejected"]]
    assert len(lines) == count
    for line in lines:
        assert line["prompt"][-1]["role"] == "user"
        assert [message["role"] for message in line["chosen"] + line["rejected"]] == [
            "assistant",
            "assistant",
        ]
        assert line["chosen"] != line["rejected"]


def test_a_run_stops_where_it_is_asked_and_goes_on(
    finished_run: Path, tiny_world: Path, tmp_path: Path, metareward: Any
) -> None:
    settings = ["--seed.no-enabled", "--model.name", finished_run / "seed" / "model"]
    command = ["run", tiny_world / "recipe.toml", "--run-dir", tmp_path / "part", *settings]
    part = metareward(*command, "--stop-after", 1)
    assert part.returncode == 0, part.stdout
    assert "stopped after iteration 1" in part.stdout
    assert not (tmp_path / "part" / "iteration-2").exists()
    whole = metareward(*command)
    assert whole.returncode == 0, whole.stdout
    assert (tmp_path / "part" / "iteration-2" / "model").is_dir()
