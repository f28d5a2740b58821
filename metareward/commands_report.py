"""`metareward report` and `metareward show`: what a run did, for people."""

from __future__ import annotations

import logging
from pathlib import Path

import tyro

from metareward.errors import UserError

logger = logging.getLogger("metareward")


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path | None = None, text: bool = False
) -> None:
    """Write one self-contained report.html of a run, or of several side by side; it opens offline.

    Scores, lengths, biases, pairs, training curves, time and examples, each with a sentence on what is good and what is bad.

    Args:
        runs: Folders that `metareward run` made, finished or not.
        out: The file to write. Default: report.html in the run's folder; for several runs, comparison.html in the first one's.
        text: Print the same figures in the terminal instead.
    """
    if not runs:
        raise UserError("metareward report needs a run: metareward report RUN [RUN_B ...]")
    if text:
        from metareward.report.terminal import print_report

        if out is not None:
            raise UserError("--text prints and --out writes: give one of them")
        print_report(runs)
        return
    from metareward.report.page import write_report

    print(f"wrote {write_report(runs, out)}")


def show(
    run_dir: tyro.conf.Positional[Path],
    prompt_id: tyro.conf.Positional[str],
    *,
    iteration: int = 0,
    comparison_texts: bool = False,
) -> None:
    """Print one prompt's whole story: answers, scores, judgments, the pair chosen and why, comparisons, Elo.

    Args:
        run_dir: A folder that `metareward run` made, finished or not.
        prompt_id: As in the file iteration-1/prompts.jsonl of the run.
        iteration: Only this iteration; 0 for all that had the prompt.
        comparison_texts: Also print what the meta-judge wrote in every comparison.
    """
    from metareward.report.terminal import print_story

    print_story(run_dir, prompt_id, iteration, comparison_texts)


def report_after_run(run_dir: Path) -> None:
    """Write the report at the end of a run. Nothing that fails here may fail the run, whose work is done: it is told instead."""
    try:
        from metareward.report.page import write_report

        print(f"report: {write_report([run_dir])}")
    except UserError as error:
        logger.warning("no report was written: %s", error)
    except Exception as error:
        logger.warning(
            "no report was written (%s: %s): the run itself is complete; `metareward report %s` shows where it fails",
            type(error).__name__,
            error,
            run_dir,
        )
