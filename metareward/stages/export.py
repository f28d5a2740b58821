"""Preference pairs for other software. Reads a run, writes one file beside it, changes nothing else."""

from __future__ import annotations

from pathlib import Path

from metareward.config import LoggingSettings
from metareward.errors import UserError
from metareward.run.directory import open_existing
from metareward.run.jsonl import check_writable, write_jsonl
from metareward.run.metrics import Metrics
from metareward.stages.context import Context
from metareward.stages.preference_set import differ, pairs


def export(root: Path, format: str, out: Path | None, iteration: int) -> None:
    """Write `out`: for "trl", TRL's conversational preference format (prompt, chosen, rejected as lists of messages).

    Raises:
        UserError: no run there, no such iteration, or no pairs yet.
    """
    assert format == "trl"
    run, recipe = open_existing(root)
    context = Context(run, recipe, Metrics(root, LoggingSettings(), active=False))
    count = len(recipe.iteration)
    if not 0 <= iteration <= count:
        raise UserError(f"{root} has iterations 1 to {count}, not {iteration}: set --iteration, or 0 for all")
    numbers = [iteration] if iteration else list(range(1, count + 1))
    ready = [number for number in numbers if has_pairs(context, number)]
    if not ready:
        raise UserError(
            f"{root} has no preference pairs yet: run it until the pairs of an iteration are selected"
        )
    final = out or root / f"pairs-{format}.jsonl"
    check_writable(final)
    lines = [
        {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": chosen["text"]}],
            "rejected": [{"role": "assistant", "content": rejected["text"]}],
            "kind": kind,
            "identity": identity,
        }
        for number in ready
        for identity, kind, messages, chosen, rejected in pairs(context, number)
        if differ(chosen, rejected)
    ]
    write_jsonl(final, lines)
    print(f"wrote {len(lines)} pairs of iteration {', '.join(map(str, ready))} to {final}")


def has_pairs(context: Context, number: int) -> bool:
    files = context.files(number)
    judge_ready = files.judge_pairs.is_file() or not context.recipe.iteration[number - 1].meta_judge
    return files.actor_pairs.is_file() and judge_ready
