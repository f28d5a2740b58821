"""Models to assess: one that is named, or all that a run made; loaded one at a time, asked by identity."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from metareward.config import Recipe, SamplerSettings
from metareward.errors import UserError
from metareward.model.chat import Chat
from metareward.model.locate import locate_model
from metareward.run import ranks
from metareward.run.directory import open_existing
from metareward.run.progress import progress_bar
from metareward.sampler.engine import Engine
from metareward.sampler.request import Completion, Request, SamplingParams
from metareward.stages.context import load_engine

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model to assess. `template_kwargs` go to its chat template."""

    name: str
    folder: Path
    template_kwargs: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    settings: SamplerSettings = field(default_factory=SamplerSettings)


def named_subject(model: str) -> Subject:
    """A model directory or hub id.

    Raises:
        UserError: neither is there.
    """
    return Subject(model, ranks.on_first(lambda: locate_model(model)))


def run_subjects(root: Path) -> tuple[list[Subject], Recipe]:
    """The models of a run, oldest first: the seed's (the starting model where there was no seed stage), then every iteration's.

    Raises:
        UserError: no run there, or it has not made a model yet.
    """
    run, recipe = open_existing(root)
    folders = [("seed", run.seed.model)] if recipe.seed.enabled else []
    folders += [
        (f"iteration {number}", run.iteration(number).model) for number in range(1, len(recipe.iteration) + 1)
    ]
    there = [(name, folder) for name, folder in folders if (folder / "config.json").is_file()]
    if not there:
        raise UserError(f"{root} has no model yet: run it until its seed stage or first iteration is done")
    if not recipe.seed.enabled:
        there.insert(0, ("start", ranks.on_first(lambda: locate_model(recipe.model.name))))
    return [
        Subject(name, folder, recipe.model.chat_template_kwargs, recipe.sampler) for name, folder in there
    ], recipe


def only_one_process() -> None:
    """Raises UserError under torchrun with more than one process."""
    if ranks.world_size() > 1:
        raise UserError(
            "metareward assess and export answers run on one process: start them without torchrun"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model with its sampler. Its random numbers are keyed by `seed` and each request's identity."""

    subject: Subject
    chat: Chat
    engine: Engine

    @property
    def max_context(self) -> int:
        return self.engine.decoder.config.max_context

    def complete(
        self, prompts: Mapping[str, Prompt], params: SamplingParams, label: str, unit: str
    ) -> dict[str, Completion]:
        """Identity -> completion, for every prompt; each must leave room for params.max_new_tokens in the context."""
        found: dict[str, Completion] = {}
        requests = (Request(identity, prompt) for identity, prompt in prompts.items())
        with progress_bar(label, len(prompts), unit) as bar:
            for completion in self.engine.generate(requests, params):
                found[completion.identity] = completion
                bar.update()
        return found


def load(subject: Subject, seed: int) -> LoadedModel:
    """Load a subject's weights and tokenizer.

    Raises:
        UserError: they cannot be read, or too little memory is free.
    """
    chat = Chat.load(subject.folder, subject.template_kwargs)
    return LoadedModel(subject, chat, load_engine(subject.folder, chat, subject.settings, seed))


def free_memory_of_models() -> None:
    """To be called when the last reference to a loaded model is gone, before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
