"""The command line: `metareward COMMAND ...`, one function a command, its docstring the help.

The commands of a group (`metareward assess judge`) are in commands_*.py.

A user's mistake ends in one sentence on stderr and exit code 2; an interrupt in 130. Anything else keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from metareward import commands_profile, phases
from metareward.commands_assess import assess, assess_annotations, assess_judge, assess_responses
from metareward.commands_files import export, export_answers, export_pairs, import_, import_gguf
from metareward.commands_report import report, report_after_run, show
from metareward.config import Recipe
from metareward.errors import UserError

# The sections appear as --respond.temperature, without a --settings in front.
Settings = Annotated[Recipe, tyro.conf.arg(name="")]
StageName = Literal["seed", "respond", "judge", "actor_pairs", "compare", "judge_pairs", "train"]


def run(
    recipe: tyro.conf.Positional[str],
    *,
    run_dir: Path,
    stop_after: int | None = None,
    settings: Settings = Recipe(),  # noqa: B008
) -> None:
    """Run a recipe to its end, or go on with it from wherever a run in the same directory stopped.

    Every setting of the recipe can be given on the command line too, and wins: --respond.temperature 0.7. On many GPUs:
    torchrun --nproc-per-node 8 -m metareward run RECIPE --run-dir DIR.

    Args:
        recipe: A TOML file, or the name of a packaged one (`metareward recipes` lists them). It comes first.
        run_dir: The run's folder. One made by the same recipe is continued.
        stop_after: Stop at the end of this iteration; 0: after the seed stage. The same command without it goes on.
        settings: The recipe.
    """
    from metareward.loop import run as run_loop
    from metareward.run import ranks
    from metareward.run.summary import print_summary

    def work() -> None:
        worked = run_loop(settings, run_dir, stop_after)
        if ranks.is_first():
            print_summary(run_dir)
            if worked:
                report_after_run(run_dir)
            if stop_after is not None and stop_after < len(settings.iteration):
                print(
                    f"stopped after {f'iteration {stop_after}' if stop_after else 'the seed stage'}, as asked; "
                    f"the same command without --stop-after goes on."
                )
            else:
                print(f"{run_dir} is finished" + ("." if worked else " already; nothing was changed."))

    ranks.with_ranks(work)


def stage(
    name: tyro.conf.Positional[StageName], run_dir: tyro.conf.Positional[Path], *, iteration: int = 1
) -> None:
    """Run one stage of an existing run directory alone; it needs the files of the stages before it.

    A stage whose output is there does nothing: delete the output to have it made again.

    Args:
        name: The stage.
        run_dir: A folder that `metareward run` made; its recipe.toml says everything else.
        iteration: Counted from 1; the seed stage has none.
    """
    from metareward.loop import run_stage
    from metareward.run.directory import open_existing
    from metareward.run.ranks import with_ranks

    with_ranks(lambda: run_stage(open_existing(run_dir)[1], run_dir, name, iteration))


def summary(run_dir: tyro.conf.Positional[Path]) -> None:
    """Print the tables of a run: time and tokens of every stage, scores, pairs, biases and losses of every iteration.

    Args:
        run_dir: A folder that `metareward run` made, finished or not.
    """
    from metareward.run.summary import print_summary

    print_summary(run_dir)


def recipes(name: tyro.conf.Positional[str] = "") -> None:
    """List the packaged recipes, or print one: `metareward recipes llama3-8b.toml > mine.toml` is a start for your own.

    Args:
        name: A recipe of the list.
    """
    from metareward.recipe_files import find_recipe, packaged_recipes

    print(find_recipe(name).read_text(encoding="utf-8") if name else "\n".join(packaged_recipes()))


COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "stage": stage,
    "summary": summary,
    "profile": commands_profile.profile,
    "plan": commands_profile.plan,
    "report": report,
    "show": show,
    "recipes": recipes,
    "assess": assess,
    "export": export,
    "import": import_,
}
GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    "assess": {"judge": assess_judge, "responses": assess_responses, "annotations": assess_annotations},
    "export": {"pairs": export_pairs, "answers": export_answers},
    "import": {"gguf": import_gguf},
}
DESCRIPTION = (
    "Meta-Rewarding language models (arXiv 2407.19594): one model answers, judges its answers, compares its judgments, "
    "and is trained on its own preferences."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `metareward` and `python -m metareward`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("torch", "transformers", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with phases.command():
            dispatch(words)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(
            f"the disk is full while writing {error.filename or 'to the run directory'}: free some space and run the same "
            "command again, it goes on from where it stopped"
        )
    except KeyboardInterrupt:
        print("metareward: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def dispatch(words: list[str]) -> None:
    """Find the command and hand it the rest of the line."""
    if words and words[0] in GROUPS:
        command(words[1:], GROUPS[words[0]], f"metareward {words[0]}", COMMANDS[words[0]].__doc__ or "")
    elif words[:1] == ["run"] and not {"-h", "--help"} & set(words[1:2]):
        run_command(words[1:])
    else:
        command(words, COMMANDS, "metareward", DESCRIPTION)


def command(words: list[str], commands: dict[str, Callable[..., Any]], prog: str, description: str) -> None:
    tyro.extras.subcommand_cli_from_dict(
        commands, prog=prog, description=description, args=words or ["--help"]
    )


def run_command(words: list[str]) -> None:
    """`metareward run`: the recipe's values become the defaults of the options."""
    from metareward.recipe_files import find_recipe, load_recipe

    if not words or words[0].startswith("-"):
        raise UserError(
            "metareward run needs a recipe first: metareward run RECIPE --run-dir DIR [--section.setting VALUE]"
        )
    settings = load_recipe(find_recipe(words[0]))

    def run_with_defaults(
        recipe: tyro.conf.Positional[str],
        *,
        run_dir: Path,
        stop_after: int | None = None,
        settings: Settings = settings,
    ) -> None:
        run(recipe, run_dir=run_dir, stop_after=stop_after, settings=settings)

    run_with_defaults.__doc__ = run.__doc__
    tyro.cli(run_with_defaults, prog="metareward run", args=words)


def fail(sentence: str) -> None:
    print(f"metareward: {sentence}", file=sys.stderr)
    sys.exit(2)
