"""Stage 5: DPO on the iteration's pairs, from M_t with M_t as the reference, to M_{t+1} (section 2.3)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metareward.config import TrainSettings
from metareward.errors import UserError
from metareward.model.config import ModelConfig
from metareward.model.decoder import Decoder
from metareward.model.hf_files import read_config, weights_digest
from metareward.model.model_writer import save_model
from metareward.run import ranks
from metareward.run.directory import IterationFiles
from metareward.run.jsonl import Line, read_jsonl, write_jsonl
from metareward.run.progress import progress_bar
from metareward.stages.context import Context
from metareward.stages.out_of_memory import naming_out_of_memory
from metareward.stages.preference_set import preference_examples
from metareward.stages.training_memory import check_training_memory
from metareward.training.compiled import naming_compiler_failures
from metareward.training.examples import DataOrder, Example, check_batch
from metareward.training.lora import adapter_parameters
from metareward.training.losses import uses_reference
from metareward.training.memory_check import Workload
from metareward.training.objectives import Objective, pair_objective
from metareward.training.sharded import load_sharded, whole_tensors
from metareward.training.trainer import TrainingSet, logprobs_of, train

Reference = dict[str, tuple[float, float]]


def train_policy(context: Context, iteration: int) -> None:
    """actor_pairs.jsonl, judge_pairs.jsonl -> reference_logprobs.jsonl, model/. A collective."""
    files, settings = context.files(iteration), context.recipe.train
    if is_trained(files):
        return
    spans = context.spans
    spans.mark("data")
    context.release()
    check_batch(settings.batch_pairs, ranks.world_size(), "train.batch_pairs")
    policy = context.policy(iteration)
    examples = preference_examples(context, iteration, context.chat(policy), context.max_context(policy))
    data = training_set(context, iteration, examples, settings)
    check_training_memory(context, iteration, "train", policy, data, settings)
    spans.mark("load")
    adapter_seed = (context.recipe.random_seed, iteration)
    decoder = load_sharded(policy, settings, ranks.device(), ranks.world_size(), adapter_seed)
    digest = ranks.on_first(lambda: weights_digest(policy))
    spans.mark("data")
    if not ranks.on_first(files.reference.is_file):
        # Checkpoints from before the reference belong to other pairs: somebody had this iteration's files made anew.
        ranks.on_first(lambda: drop_checkpoints(files.training))
        if uses_reference(settings):
            with spans.stage("reference", iteration):
                spans.note(**model_facts(decoder, settings))
                write_reference(context, iteration, decoder, data, digest)
        else:
            # No numbers, but a file all the same: it ties the checkpoints to these pairs and weights.
            write_lines(files.reference, examples, {}, digest)
    reference = read_reference(files.reference, examples, digest, uses_reference(settings))
    run_training(
        context, iteration, "train", policy, decoder, data, pair_objective(settings, reference), settings
    )


def training_set(
    context: Context, iteration: int, examples: list[Example], settings: TrainSettings
) -> TrainingSet:
    order = DataOrder(
        len(examples), settings.batch_pairs, settings.epochs, context.recipe.random_seed, iteration
    )
    return TrainingSet(examples, order, settings.micro_batch_tokens)


def write_reference(
    context: Context, iteration: int, decoder: Decoder, data: TrainingSet, digest: str
) -> None:
    """Log-probs of every pair under M_t, once an iteration, under the digest of the weights that gave them."""
    began = time.perf_counter()
    label = f"iteration {iteration}: reference"
    with (
        progress_bar(label, len(data.examples), "pairs", shown=ranks.is_first()) as bar,
        naming_compiler_failures(context.recipe.train),
        naming_out_of_memory(context, iteration, "reference", workload(decoder, data), context.recipe.train),
    ):
        found = logprobs_of(decoder, data, ranks.device(), bar.update, context.spans)
    context.spans.mark("write")
    write_lines(context.files(iteration).reference, data.examples, found, digest)
    context.metrics.event(
        "stage",
        "reference",
        iteration,
        seconds=time.perf_counter() - began,
        requests=len(data.examples),
        tokens=sum(example.tokens for example in data.examples),
    )


def write_lines(
    path: Path, examples: Sequence[Example], found: Mapping[str, tuple[float, ...]], digest: str
) -> None:
    """One line a pair; its log-probs are null where none were computed. A collective."""
    lines: list[Line] = []
    for example in examples:
        chosen, rejected = found.get(example.identity, (None, None))
        lines.append(
            {
                "identity": example.identity,
                "chosen_logprob": chosen,
                "rejected_logprob": rejected,
                "weights": digest,
            }
        )
    ranks.on_first(lambda: write_jsonl(path, lines))


def read_reference(path: Path, examples: Sequence[Example], digest: str, needed: bool = True) -> Reference:
    """identity -> (chosen, rejected) log-probs; nothing for a loss that needs none, after the same checks.

    Raises:
        UserError: a row is missing or comes from other weights, or has no numbers and they are needed; computing it anew in
            the midst of a run would hide that.
    """
    lines = {line["identity"]: line for line in read_jsonl(path)}
    for example in examples:
        line = lines.get(example.identity)
        problem = ""
        if line is None:
            problem = "has no row"
        elif line["weights"] != digest:
            problem = "comes from other weights"
        elif needed and line["chosen_logprob"] is None:
            problem = "has no log-probs"
        if problem:
            raise UserError(
                f"{path} {problem} for the pair {example.identity}: the pairs, the model or the loss changed after it was "
                f"written; delete it and this iteration's training folder, then run again"
            )
    if not needed:
        return {}
    return {name: (line["chosen_logprob"], line["rejected_logprob"]) for name, line in lines.items()}


def run_training(
    context: Context,
    iteration: int,
    stage: str,
    policy: Path,
    decoder: Decoder,
    data: TrainingSet,
    objective: Objective,
    settings: TrainSettings,
) -> None:
    """Train, write the model, drop the checkpoints. Used by this stage and by the seed stage."""
    began = time.perf_counter()
    context.spans.note(**model_facts(decoder, settings))
    files = context.files(iteration)
    ranks.on_first(lambda: files.training.mkdir(parents=True, exist_ok=True))
    label = "seed: train" if iteration == 0 else f"iteration {iteration}: train"
    tokens = 0.0
    with progress_bar(label, data.order.steps, "steps", shown=ranks.is_first()) as bar:

        def on_step(step: int, steps: int, figures: Mapping[str, float]) -> None:
            nonlocal tokens
            tokens += figures["tokens"]
            context.metrics.event("step", stage, iteration, step=step, steps=steps, **figures)
            bar.set_postfix_str(
                f"loss {figures['loss']:.4f}, {figures['tokens_per_s']:.0f} tok/s", refresh=False
            )
            bar.update(step - bar.n)

        with (
            naming_compiler_failures(settings),
            naming_out_of_memory(context, iteration, stage, workload(decoder, data), settings),
        ):
            train(decoder, data, objective, settings, files.training, ranks.device(), on_step, context.spans)
    context.spans.mark("write")
    write_model(decoder, policy, files.model, context.recipe.save_dtype)
    seconds = time.perf_counter() - began
    context.metrics.event(
        "stage",
        stage,
        iteration,
        seconds=seconds,
        requests=len(data.examples),
        tokens=int(tokens),
        tokens_per_s=tokens / seconds,
        ranks=ranks.world_size(),
    )
    # The finished model takes their place: they only serve to continue this stage.
    ranks.on_first(lambda: drop_checkpoints(files.training))


def workload(decoder: Decoder, data: TrainingSet) -> Workload:
    """What the estimate of memory is of."""
    return Workload(decoder.config, data.examples, data.order.batch, ranks.world_size(), ranks.device().type)


def model_facts(decoder: Decoder, settings: TrainSettings) -> dict[str, Any]:
    """What the stage profile needs to know of the model."""
    facts = {
        "model": decoder.config.hf,
        "dtype": settings.compute_dtype,
        "activation_checkpointing": settings.activation_checkpointing,
    }
    adapters = adapter_parameters(decoder.config, settings)
    return {**facts, "adapter_parameters": adapters} if adapters else facts


def is_trained(files: IterationFiles) -> bool:
    """Whether the model is there; checkpoints that a kill left after it was written are removed. A collective."""

    def look() -> bool:
        done = files.model.is_dir()
        if done:
            drop_checkpoints(files.training)
        return done

    return ranks.on_first(look)


def drop_checkpoints(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)


def write_model(decoder: Decoder, policy: Path, final: Path, dtype: str) -> None:
    """Gather tensor by tensor and write on rank 0, with the tokenizer of `policy`. A collective."""

    tensors = whole_tensors(decoder)
    if ranks.is_first():
        for leftover in final.parent.glob(f".{final.name}.partial-*"):
            shutil.rmtree(leftover)
        config: ModelConfig = read_config(policy)
        save_model(final, tensors, config, tokenizer_from=policy, dtype=getattr(torch, dtype))
    for _ in tensors:
        # The other ranks take part in every gather.
        pass
    ranks.barrier()
