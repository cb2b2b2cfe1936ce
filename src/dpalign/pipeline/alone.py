"""`dpa STAGE`: one stage alone, on finished folders anywhere on the disk."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dpalign.pipeline import runner
from dpalign.pipeline.shipped import add_recipe, recipe_file
from dpalign.pipeline.steps import STAGES
from dpalign.recipe import ITERATIONS, load
from dpalign.recipe.localfiles import require_models
from dpalign.runs.folder import Run
from dpalign.runs.ledger import STAGE_NAME, read_ledger
from dpalign.runs.stopping import stoppable
from dpalign.stages.stage import Step

INPUTS: Final = {
    "policy": "the model to sample from: a finished steerlm, sft or policy folder, or a plain checkpoint",
    "candidates": "a finished sample folder",
    "answers": "a finished sample folder of plain answers, for data that have none",
    "scores": "a finished score folder, of the same candidates",
    "start": "the model to start from: a finished sft or policy folder, or a plain checkpoint",
    "chosen": "a finished select folder",
    "evaluate": "a finished evaluate folder, of the same policy",
    "pairs": "a finished pairs or contrast folder; for pairwise, a file of rows {prompt, chosen, rejected[, subset]}",
}
"""Help of the inputs that are not named after the stage that makes them."""

ASKED: Final[Mapping[str, dict[str, Any]]] = {
    "t": {"type": int, "metavar": "N", "help": "the iteration; 0 for what comes before the first"},
    "half": {"help": "the prompts to use"},
    "condition": {"help": "what answers are asked for"},
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb's stage, as the stage declares them."""
    stage = STAGES[parser.get_default("verb")]
    parser.epilog = f"{parser.epilog} This stage reads: {', '.join(stage.knob_names())}."
    add_recipe(parser)
    where = "the folder to write; the one it lies in keeps the log and the lock"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=where)
    for name in (*stage.inputs, *stage.optional):
        what = INPUTS.get(name, f"a finished {name} folder")
        needed = name in stage.inputs
        what += "" if needed else "; left out where the recipe needs none"
        parser.add_argument(f"--{name}", type=Path, required=needed, metavar="DIR", help=what)
    for repeated in stage.repeated:
        what = f"a finished folder of any name, any number of times: the stage calls it {repeated}-NAME"
        parser.add_argument(f"--{repeated}", action="append", default=[], metavar="NAME=DIR", help=what)
    for name, choices in stage.asks.items():
        parser.add_argument(f"--{name}", required=True, choices=choices or None, **ASKED[name])


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Run the stage; skip it if it is done with the same inputs and knobs."""
    recipe = load(recipe_file(arguments.recipe), overrides)
    require_models(recipe)
    stage, out = STAGES[arguments.verb], Path(arguments.out)
    if not re.fullmatch(STAGE_NAME, out.name):
        raise ValueError(f"--out {out}: a stage's folder is named in lower-case letters, digits, - and _")
    if out.exists():
        try:
            read_ledger(out)
        except ValueError as error:
            raise ValueError(f"--out {out}: stands already, and no stage wrote it; name another place") from error
    folders = {name: getattr(arguments, name) for name in (*stage.inputs, *stage.optional)}
    inputs = {name: path.resolve() for name, path in folders.items() if path is not None}
    for repeated in stage.repeated:
        inputs |= dict(_named_folder(repeated, word) for word in getattr(arguments, repeated))
    options = {name: getattr(arguments, name) for name in stage.asks}
    if not 0 <= options.get("t", 0) <= ITERATIONS:
        raise ValueError(f"--t {options['t']}: an iteration, 0 to {ITERATIONS}")
    if options.get("condition") == "targets" and "annotate" not in inputs:
        raise ValueError(
            "--condition targets needs --annotate DIR: targets are drawn from the rewards of rated answers"
        )
    if options.get("condition") == "hints" and not recipe.data.hints:
        raise ValueError("--condition hints: data.hints is empty; write the hints to answer under")
    for name, path in inputs.items():
        if not path.exists():
            raise ValueError(f"stage {out.name}, input {name}: {path} is missing; name a finished folder")
    with stoppable(), Run.open(out.parent, recipe_text=None) as opened:
        runner.take(recipe, opened, Step(out.name, stage, inputs, **options))
    return str(out)


def _named_folder(repeated: str, word: str) -> tuple[str, Path]:
    """Read NAME=DIR of an input that may be repeated."""
    name, equals, folder = word.partition("=")
    if not equals or not name or not folder:
        raise ValueError(f"--{repeated} {word}: give NAME=DIR")
    return f"{repeated}-{name}", Path(folder).resolve()
