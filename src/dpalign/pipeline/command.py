"""`dpa run` and `dpa compare`: take every step of a recipe that is not done yet, or list the steps."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dpalign.pipeline import runner
from dpalign.pipeline.ready import lacking
from dpalign.pipeline.shipped import add_recipe, recipe_file
from dpalign.pipeline.steps import notes
from dpalign.recipe import Recipe, load
from dpalign.rewards.golden import read_golden
from dpalign.runs.stopping import stoppable
from dpalign.runs.tables import leaves, literal
from dpalign.stages.preference import asked_in_words


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/ and the recipe's name)")
    parser.add_argument("--until", metavar="STEP", help="the last step to take")
    what = "touch nothing; print the steps, and the knobs that differ from the defaults"
    parser.add_argument("--dry-run", action="store_true", help=what)
    parser.add_argument("--print-recipe", action="store_true", help="touch nothing; print the recipe with every knob")


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Take every step that is not done yet, or list the steps. Returns the text to print."""
    recipe, compared = load(recipe_file(arguments.recipe), overrides), arguments.verb == "compare"
    folder = arguments.out or Path("runs") / recipe.name
    if arguments.print_recipe:
        return recipe.to_toml().rstrip("\n")
    if arguments.dry_run:
        table = steps_table(recipe, folder, arguments.until, compared)
        return f"{table}\n\nUsers ask for: {asked_in_words(recipe)}.\n\n{differences(recipe)}"
    with stoppable():
        runner.execute(recipe, folder, arguments.until, compared)
    if arguments.until is not None:
        return str(folder)
    page = folder / "report" / "index.html"
    sys.stderr.write(next_commands(folder, page))
    return str(page)


def next_commands(folder: Path, page: Path) -> str:
    """The page's address and the next commands, as the user must type them here."""
    typed = Path(sys.argv[0])
    dpa = "python -m dpalign" if typed.name == "__main__.py" else str(typed) if len(typed.parts) > 1 else "dpa"
    reward = " --reward" if read_golden(folder / "reward") else ""
    commands = (f"export {shlex.quote(str(folder))} --out mine{reward}", "chat mine", "serve mine")
    return f"\nOpen {page.resolve().as_uri()}\nNext:\n" + "".join(f"  {dpa} {command}\n" for command in commands)


def steps_table(recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False) -> str:
    """The steps of a run, one a line, each done or to do and why; then what this machine lacks."""
    verdicts = runner.dry_run(recipe, folder, until, compared)
    rows = [(step.name, " ".join(filter(None, (step.half, step.condition))), verdict) for step, verdict in verdicts]
    name_width, how_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {name:{name_width}}  {how:{how_width}}  {verdict}" for name, how, verdict in rows]
    if missing := lacking(recipe, [step for step, verdict in verdicts if verdict != "done"]):
        lines += ["", "A run on this machine would be refused:", *(f"  {one}" for one in missing)]
    return "\n".join([*(notes(recipe) if compared else []), f"{len(rows)} steps into {folder}:", *lines])


def differences(recipe: Recipe) -> str:
    """The knobs that differ from the defaults, which are the paper's."""
    defaults, values = (dict(leaves(one.as_mapping())) for one in (Recipe(name=recipe.name), recipe))
    unset = {
        f"rewards.{name}.{key}"
        for name, reward in recipe.rewards.items()
        for key in reward.as_mapping().keys() - reward.model_dump(exclude_defaults=True).keys()
    }
    rows = [
        f"  {key} = {literal(value)}" + (f"  (default {literal(defaults[key])})" if key in defaults else "")
        for key, value in values.items()
        if key not in unset and (key not in defaults or defaults[key] != value)
    ]
    rows += [f"  no {key}  (default {literal(default)})" for key, default in defaults.items() if key not in values]
    return "\n".join([f"{len(rows)} knobs differ from the defaults (--print-recipe prints them all):", *rows])
