"""The order of the stages and the iterations: the paper's algorithm, top to bottom (section 2).

Every stage looks for its own output and returns at once when it is there, so going on after a kill is the same as starting.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metareward.config import Recipe
from metareward.errors import UserError
from metareward.recipe_files import check
from metareward.run import ranks
from metareward.run.directory import RunDirectory
from metareward.run.metrics import Metrics
from metareward.run.spans import open_spans
from metareward.run.step_trace import ChosenSteps
from metareward.stages.actor_pairs import select_actor_pairs
from metareward.stages.compare import compare
from metareward.stages.context import Context
from metareward.stages.guard import guard
from metareward.stages.judge import judge
from metareward.stages.judge_pairs import select_judge_pairs
from metareward.stages.preflight import preflight
from metareward.stages.respond import respond
from metareward.stages.seed import seed
from metareward.stages.train import is_trained, train_policy

STAGES: dict[str, Callable[[Context, int], None]] = {
    "respond": respond,
    "judge": judge,
    "actor_pairs": select_actor_pairs,
    "compare": compare,
    "judge_pairs": select_judge_pairs,
    "train": train_policy,
}


def run(recipe: Recipe, root: Path, stop_after: int | None = None) -> bool:
    """The whole run, from wherever it stands to its end, or to the end of iteration `stop_after` (0: the seed stage). A
    collective.

    Returns False where there was nothing left to do.
    """
    if stop_after is not None and stop_after < 0:
        raise UserError(
            f"--stop-after {stop_after} is negative: give the number of an iteration, or 0 for the seed stage"
        )
    directory, recipe = open_directory(recipe, root)
    if is_trained(directory.iteration(len(recipe.iteration))):
        return False
    context = open_context(directory, recipe)
    with context.spans.stage("start", 0):
        context.spans.mark("data")
        preflight(context)
    run_seed(context)
    for number, settings in enumerate(context.recipe.iteration[:stop_after], 1):
        iterate(context, number, settings.meta_judge)
    if stop_after is None or stop_after >= len(recipe.iteration):
        context.metrics.event("finished", "run", len(recipe.iteration))
    context.close()
    return True


def iterate(context: Context, number: int, meta_judge: bool) -> None:
    """One iteration: M_t answers, judges and compares, and is trained on what it preferred to become M_{t+1}."""
    if is_trained(context.run.iteration(number)):
        return
    meta_judging = ("compare", "judge_pairs") if meta_judge else ()
    for name in ("respond", "judge", "actor_pairs", *meta_judging, "train"):
        with context.spans.stage(name, number):
            STAGES[name](context, number)
            guard(context, number, name)


def run_seed(context: Context) -> None:
    with context.spans.stage("seed", 0):
        seed(context)


def run_stage(recipe: Recipe, root: Path, name: str, iteration: int) -> None:
    """One stage alone, in a run directory that is there. A collective."""
    context = open_context(*open_directory(recipe, root))
    if name == "seed":
        run_seed(context)
    elif not 1 <= iteration <= len(context.recipe.iteration):
        raise UserError(
            f"the recipe has iterations 1 to {len(context.recipe.iteration)}, not {iteration}: set --iteration"
        )
    else:
        with context.spans.stage(name, iteration):
            STAGES[name](context, iteration)
            guard(context, iteration, name)
    context.close()


def open_directory(recipe: Recipe, root: Path) -> tuple[RunDirectory, Recipe]:
    """Check the recipe and open its run directory. A collective."""
    recipe = ranks.on_first(lambda: check(recipe))
    directory = RunDirectory(root.absolute())
    ranks.on_first(lambda: directory.open(recipe))
    return directory, recipe


def open_context(directory: RunDirectory, recipe: Recipe) -> Context:
    """What the stages are given. Starts the loggers, so not before there is something to log. A collective."""
    metrics = Metrics(directory.root, recipe.logging, ranks.is_first())
    settings, folder = recipe.logging, directory.root / "spans"
    chosen = ChosenSteps(settings.profile_steps, settings.profile_after, folder, ranks.rank())
    return Context(directory, recipe, metrics, open_spans(folder, chosen))
