"""What share of the machine's limits a model's own sampler and trainer reach here: short real runs, random tokens.

About a minute for a model of 135M parameters on two cores. `metareward plan` multiplies limits by these shares. Never run on a GPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from metareward.config import Recipe
from metareward.model.chat import Chat
from metareward.model.flops import parameter_count
from metareward.model.hf_files import read_config
from metareward.profiling.figures import ITEMSIZE, SAMPLING, PhaseFigures, all_figures
from metareward.profiling.machine import Machine
from metareward.profiling.read import read_run
from metareward.run import ranks
from metareward.run.spans import Spans, open_spans
from metareward.run.step_trace import ChosenSteps
from metareward.sampler.request import Request, SamplingParams
from metareward.stages.context import load_engine
from metareward.stages.train import model_facts
from metareward.training.examples import DataOrder, Example
from metareward.training.objectives import pair_objective
from metareward.training.sharded import load_sharded
from metareward.training.trainer import TrainingSet, train

GROUPS, SAMPLES, PROMPT, NEW = 12, 4, 256, 32
PAIRS, COMPLETION = 4, 96


def calibrate(model: Path, machine: Machine, recipe: Recipe) -> Machine:
    """The machine with the shares that the model at `model` reaches under the recipe's sampler and train settings.

    The shares: prefill, decode, sample (of their limits), train (forward and backward, with what is computed again), optimizer.
    Also host_step, the seconds of scheduling and book-keeping a step, and load_rate, bytes a second of loading the model for
    sampling and for training.
    """
    chat = Chat.load(model, recipe.model.chat_template_kwargs)
    with tempfile.TemporaryDirectory() as folder:
        spans = open_spans(Path(folder) / "spans", ChosenSteps())
        sample_some(model, chat, recipe, spans)
        train_some(model, recipe, Path(folder), spans)
        spans.close()
        figures = {item.time.stage: item for item in all_figures(read_run(Path(folder)), machine)}
    sampled = {item.phase: item for item in figures["decode"].phases}
    prefilled = {item.phase: item for item in figures["prefill"].phases}
    trained = {item.phase: item for item in figures["train"].phases}

    def share(*phases: PhaseFigures) -> float:
        limit, seconds = sum(item.limit_of_all for item in phases), sum(item.seconds for item in phases)
        return limit / seconds

    reached = {
        "prefill": share(*(prefilled[name] for name in SAMPLING if name in prefilled)),
        "decode": share(*(sampled[name] for name in SAMPLING if name in sampled)),
        "sample": share(sampled["sample"]),
        "train": share(trained["forward"], trained["backward"]),
        "optimizer": share(trained["optimizer"]),
        "host_step": sampled["host"].seconds / figures["decode"].time.steps,
        "load_rate": loaded_bytes(model, figures["decode"].time.notes["dtype"])
        / (figures["load"].time.seconds + figures["load_training"].time.seconds),
    }
    return replace(machine, reached={**machine.reached, str(model.absolute()): reached})


def loaded_bytes(model: Path, dtype: str) -> float:
    """Bytes of the weights as the sampler holds them, and as the trainer does, in float32."""
    return parameter_count(read_config(model)) * (ITEMSIZE[dtype] + 4.0)


def random_tokens(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocabulary, count).tolist())


def sample_some(model: Path, chat: Chat, recipe: Recipe, spans: Spans) -> None:
    """Groups of requests with a prompt in common, as judging has them, in two runs: prompts alone, then new tokens."""
    with spans.stage("load", 1):
        engine = load_engine(model, chat, recipe.sampler, 0, spans)
    vocabulary = engine.decoder.config.vocab_size
    facts = {"model": engine.decoder.config.hf, "dtype": str(engine.runner.dtype).removeprefix("torch.")}
    # Random text may end at once; what is measured needs all its tokens.
    engine.stop_ids = frozenset()

    def requests(name: str, samples: int, seed: int) -> list[Request]:
        return [
            Request(f"{name}/{group}/{sample}", random_tokens(PROMPT, vocabulary, seed + group))
            for group in range(GROUPS)
            for sample in range(samples)
        ]

    with spans.stage("warm-up", 1):
        list(engine.generate(requests("warm", 1, 100)[:2], SamplingParams(max_new_tokens=4)))
    with spans.stage("prefill", 1):
        spans.note(**facts)
        list(engine.generate(requests("prefill", 1, 200), SamplingParams(max_new_tokens=1)))
    # The same prompts again: they are in the cache, so what is left is decoding.
    with spans.stage("decode", 1):
        spans.note(**facts)
        list(engine.generate(requests("decode", SAMPLES, 200), SamplingParams(max_new_tokens=NEW)))


def train_some(model: Path, recipe: Recipe, folder: Path, spans: Spans) -> None:
    """Two optimizer steps on pairs; the first warms up and belongs to no figure."""
    settings = replace(recipe.train, epochs=1, batch_pairs=PAIRS, checkpoint_steps=10**9)
    vocabulary = read_config(model).vocab_size
    with spans.stage("load_training", 1):
        decoder = load_sharded(model, settings, ranks.device(), ranks.world_size())

    def run(name: str, seed: int) -> None:
        examples = [
            Example(
                f"{name}/{index}",
                "judge",
                random_tokens(PROMPT, vocabulary, seed + index),
                (
                    random_tokens(COMPLETION, vocabulary, seed + 50 + index),
                    random_tokens(COMPLETION, vocabulary, seed + 80 + index),
                ),
            )
            for index in range(PAIRS)
        ]
        data = TrainingSet(examples, DataOrder(PAIRS, PAIRS, 1, 0, 1), settings.micro_batch_tokens)
        reference = {example.identity: (-100.0, -100.0) for example in examples}
        with spans.stage(name, 1):
            spans.note(**model_facts(decoder, settings))
            train(
                decoder,
                data,
                pair_objective(settings, reference),
                settings,
                folder,
                ranks.device(),
                lambda *_: None,
                spans,
            )

    run("warm-up", 300)
    run("train", 400)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
