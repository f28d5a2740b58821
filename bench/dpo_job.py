"""What both sides of the DPO benchmark train on: preference pairs of judgments, in one order of global batches.

A pair is what meta-judging gives: the prompt with which a judge read a response, a better and a worse judgment of it.
Prompts are real instructions and whole responses in the judge's template, in the data file's order, so that
responses to one instruction are neighbours. Judgments are put together from sentences (`bench.judgments`): the pairs
do not depend on a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.judgments import different_judgments
from bench.workloads import Source, check_enough
from metareward.config import TrainSettings
from metareward.roles.judge import judge_messages
from metareward.roles.templates import load_template
from metareward.training.examples import DataOrder, Example

PROMPT_TOKENS = (300, 1000)
# With the token that ends the turn.
COMPLETION_TOKENS = (60, 160)


@dataclass(frozen=True)
class Job:
    """One run of training. Both sides and the oracle see `batch(0)`, `batch(1)`, ... as their global batches."""

    model: Path
    examples: tuple[Example, ...]
    order: DataOrder
    settings: TrainSettings

    def batch(self, step: int) -> list[Example]:
        return [self.examples[index] for index in self.order.indices(step)]


def judge_pairs(source: Source, count: int) -> tuple[Example, ...]:
    """So many pairs, a pure function of the data and the tokenizer.

    Raises:
        UserError: the data has fewer responses of a fitting length.
    """
    chat, template = source.chat, load_template("judge")
    low, high = COMPLETION_TOKENS
    least, most = PROMPT_TOKENS
    found: list[Example] = []
    responses = ((prompt, text) for prompt, texts in source.responses.items() for text in texts)
    for instruction, response in responses:
        if len(found) == count:
            break
        prompt = tuple(chat.render(judge_messages(template, instruction, response)))
        # A response of a few words has nothing to quote, and its judgments are too short.
        if not least <= len(prompt) <= most:
            continue
        judgments = different_judgments(response, 2, chat, lengths=(low, high - 1))
        completions = tuple(tuple(chat.encode_completion(text)) for text in judgments)
        if all(low <= len(completion) <= high for completion in completions):
            found.append(Example(f"pair {len(found)}", "judge", prompt, completions))
    check_enough(
        "dpo_step", len(found), count, f"responses whose judge prompt has {least} to {most} tokens", "--pairs"
    )
    return tuple(found)


def make_job(
    model: Path, examples: tuple[Example, ...], settings: TrainSettings, steps: int, seed: int
) -> Job:
    """The pairs in a shuffled order, as many epochs of them as `steps` optimizer steps need."""
    per_epoch = DataOrder(len(examples), settings.batch_pairs, 1, seed, 1).steps_per_epoch
    epochs = -(-steps // per_epoch)
    return Job(model, examples, DataOrder(len(examples), settings.batch_pairs, epochs, seed, 1), settings)
