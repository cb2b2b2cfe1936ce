"""The command `dpa`: verbs only. What they do is elsewhere, and heavy imports wait until a stage runs.

Every knob of a recipe is an option of every verb: what a verb itself does not know is handed to `recipe.load`.
"""

import argparse
import difflib
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from dpalign import __doc__ as what_this_is
from dpalign import __version__
from dpalign.dial.chat import command as chat
from dpalign.dial.doctor import command as examining
from dpalign.dial.export import command as exporting
from dpalign.dial.server import command as serving
from dpalign.pipeline import alpaca, runner
from dpalign.pipeline.steps import STAGES, notes
from dpalign.recipe import Recipe, load
from dpalign.recipe.localfiles import require_models
from dpalign.run.errors import plain_errors
from dpalign.run.folder import Run
from dpalign.run.ledger import LEDGER, STAGE_NAME
from dpalign.run.tables import field_docs, leaves, literal
from dpalign.stages.stage import Step

RECIPES: Final = Path(__file__).parent / "recipe" / "shipped"
"""The recipes that are installed with the package."""

INPUTS: Final = {
    "policy": "the model to sample from: a finished steerlm, sft or finetune folder, or a plain checkpoint",
    "candidates": "a finished sample folder",
    "scores": "a finished score folder, of the same candidates",
    "start": "the model to start from: a finished sft folder, or a plain checkpoint",
    "chosen": "a finished select folder",
    "pairs": "a finished pairs folder; for pairwise, a file of rows {prompt, chosen, rejected[, subset]}",
}
"""A stage's inputs that are not called after the stage that makes them."""

ASKED: Final[Mapping[str, dict[str, Any]]] = {
    "t": {"type": int, "metavar": "N", "help": "the iteration; 0 for what comes before the first"},
    "half": {"help": "the prompts to use"},
    "condition": {"help": "what answers are asked for"},
}

KNOBS_NOTE: Final = (
    "Any knob of the recipe can be set here: --section.key VALUE. `dpa run RECIPE --dry-run recipe` prints them all."
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours to print."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Verb:
    """One of the words that follow `dpa`."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    """Adds the verb's arguments to its parser."""
    do: Callable[[argparse.Namespace, Sequence[str]], None]
    """Takes the parsed arguments, and the words that override knobs."""
    note: str = KNOBS_NOTE


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says.

    Raises:
        SystemExit: code 2 after an error that the user can mend, said in one line; 130 after an interruption.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with plain_errors("dpa"):
        match words:
            case [] | ["-h" | "--help", *_]:
                print(help_text())
            case ["--version", *_]:
                print(f"dpalign {__version__}")
            case [name, *rest]:
                if name not in VERBS:
                    raise ValueError(
                        f"unknown verb {name!r}; the nearest is {_nearest(name, list(VERBS))} (see dpa --help)"
                    )
                verb, parser = VERBS[name], parser_of(name)
                own, overrides = split_overrides(rest, list(parser._option_string_actions))
                verb.do(parser.parse_args(own), overrides)


def parser_of(name: str) -> Parser:
    """The parser of one verb."""
    verb = VERBS[name]
    parser = Parser(f"dpa {name}", description=_sentence(verb.help), epilog=verb.note, allow_abbrev=False)
    verb.declare(parser)
    return parser


def help_text() -> str:
    """What `dpa --help` prints."""
    width = min(100, shutil.get_terminal_size().columns)
    column = 2 + max(map(len, VERBS))

    def listed(names: Sequence[str]) -> str:
        return "\n".join(
            textwrap.fill(
                VERBS[name].help, width, initial_indent=f"  {name:{column}}", subsequent_indent=" " * (column + 2)
            )
            for name in names
        )

    alone = [name for name in VERBS if name in STAGES]
    return (
        f"usage: dpa VERB ... (dpa VERB --help says more)\n\n{what_this_is}\n\n"
        f"The whole of it:\n{listed([name for name in VERBS if name not in STAGES])}\n\n"
        f"One stage alone, on files:\n{listed(alone)}\n\n"
        f"A RECIPE is a TOML file, or the name of one that is installed: {', '.join(shipped())}."
    )


def split_overrides(words: Sequence[str], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """A verb's own words, and those that override knobs: each `--key value` whose key is none of its `options`.

    Raises:
        ValueError: an option that is neither the verb's nor in a table of the recipe.
    """
    tables = list(Recipe.model_fields)
    own: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        option = word.partition("=")[0]
        if not option.startswith("--") or option in options:
            own.append(word)
            continue
        if option[2:].partition(".")[0] not in tables:
            known = [*options, *(f"--{key}" for key in field_docs(Recipe))]
            raise ValueError(f"unknown option {option}; the nearest is {_nearest(option, known)}")
        overrides.append(word)
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return own, overrides


def shipped() -> list[str]:
    """The names of the recipes that are installed."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_file(named: str) -> Path:
    """The recipe file that a command line means: a path, or the name of an installed one.

    Raises:
        ValueError: neither.
    """
    if Path(named).is_file() or named.endswith(".toml") or "/" in named:
        return Path(named)  # reading it says what is wrong with it
    if named not in shipped():
        raise ValueError(f"{named}: no such recipe file, and no installed recipe either ({', '.join(shipped())})")
    return RECIPES / f"{named}.toml"


def run_arguments(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/ and the recipe's name)")
    parser.add_argument("--until", metavar="STEP", help="the last step to take")
    what = "touch nothing; print the steps and the knobs that differ from the defaults, or the whole resolved recipe"
    parser.add_argument("--dry-run", nargs="?", const="steps", choices=("steps", "recipe"), help=what)


def run(arguments: argparse.Namespace, overrides: Sequence[str], compared: bool = False) -> None:
    """Take every step of a recipe that is not done yet; or say which they are."""
    recipe = load(recipe_file(arguments.recipe), overrides)
    folder = arguments.out or Path("runs") / recipe.name
    match arguments.dry_run:
        case "recipe":
            print(recipe.to_toml(), end="")
        case "steps":
            print(f"{steps_table(recipe, folder, arguments.until, compared)}\n\n{differences(recipe)}")
        case _:
            runner.execute(recipe, folder, arguments.until, compared)
            page = folder / "report" / "index.html"
            print(page if arguments.until is None else folder)
            if arguments.until is None:
                sys.stderr.write(next_commands(folder, page))


def next_commands(folder: Path, page: Path) -> str:
    """Where the page opens, and the commands that come next, as they must be typed here."""
    typed = Path(sys.argv[0])
    dpa = "python -m dpalign" if typed.name == "__main__.py" else str(typed) if len(typed.parts) > 1 else "dpa"
    commands = (f"export {shlex.quote(str(folder))} --out mine --reward", "chat mine", "serve mine")
    return f"\nOpen {page.resolve().as_uri()}\nNext:\n" + "".join(f"  {dpa} {command}\n" for command in commands)


def steps_table(recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False) -> str:
    """The steps of a run, one a line, and what of each is to do."""
    rows = [
        (step.name, " ".join(filter(None, (step.half, step.condition))), verdict)
        for step, verdict in runner.dry_run(recipe, folder, until, compared)
    ]
    name_width, how_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {name:{name_width}}  {how:{how_width}}  {verdict}" for name, how, verdict in rows]
    return "\n".join([*(notes(recipe) if compared else []), f"{len(rows)} steps into {folder}:", *lines])


def differences(recipe: Recipe) -> str:
    """The knobs that differ from the defaults, which are the paper's."""
    defaults = dict(leaves(Recipe(name=recipe.name).as_mapping()))
    rows = [
        f"  {key} = {literal(value)}" + (f"  (default {literal(defaults[key])})" if key in defaults else "")
        for key, value in leaves(recipe.as_mapping())
        if key not in defaults or defaults[key] != value
    ]
    return "\n".join([f"{len(rows)} knobs differ from the defaults (--dry-run recipe prints them all):", *rows])


def combine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the finished run folder of a seed")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write the page into")


def combine(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One page over the seeds of a recipe."""
    from dpalign.page.combine import combine as combine_runs

    if overrides:
        raise ValueError(f"combine reads finished runs, and no knobs: {' '.join(overrides)}")
    print(combine_runs(arguments.runs, arguments.out))


def alpaca_eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Fig. 5: answers to AlpacaEval's instructions, a judge, win rates against length."""
    recipe = load(recipe_file(arguments.recipe), overrides)
    print(alpaca.execute(arguments, recipe))


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """A policy as a plain folder for others to serve."""
    if overrides:
        raise ValueError(f"export takes what was trained, and no knobs: {' '.join(overrides)}")
    print(exporting.execute(arguments))


def doctor(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """What this machine can run, and whether a model's folder is sound."""
    if overrides:
        raise ValueError(f"doctor looks, and takes no knobs: {' '.join(overrides)}")
    said, well = examining.execute(arguments)
    print(said)
    if not well:
        sys.exit(1)


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """What a recipe will cost."""
    from dpalign.pipeline.plan.command import execute

    print(execute(arguments, load(recipe_file(arguments.recipe), overrides)))


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    from dpalign.pipeline.plan import command

    command.declare(parser)


def stage_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    stage = STAGES[kind]
    _add_recipe(parser)
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


def take_alone(kind: str, arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One stage on finished folders, wherever they lie; done before with the same inputs and knobs, it is skipped."""
    recipe = load(recipe_file(arguments.recipe), overrides)
    require_models(recipe)
    stage, out = STAGES[kind], Path(arguments.out)
    if not re.fullmatch(STAGE_NAME, out.name):
        raise ValueError(f"--out {out}: a stage's folder is named in lower-case letters, digits, - and _")
    if out.exists() and not (out / LEDGER).is_file():
        raise ValueError(f"--out {out}: stands already, and no stage wrote it; name another place")
    given = {name: getattr(arguments, name) for name in (*stage.inputs, *stage.optional)}
    inputs = {name: path.resolve() for name, path in given.items() if path is not None}
    for repeated in stage.repeated:
        inputs |= dict(_named_folder(repeated, word) for word in getattr(arguments, repeated))
    asked = {name: getattr(arguments, name) for name in stage.asks}
    if asked.get("condition") == "targets" and "annotate" not in inputs:
        raise ValueError(
            "--condition targets needs --annotate DIR: targets are drawn from the rewards of rated answers"
        )
    with Run.open(out.parent, recipe_text=None) as opened:
        runner.take(recipe, opened, Step(out.name, stage, inputs, **asked))
    print(out)


def _named_folder(repeated: str, word: str) -> tuple[str, Path]:
    """NAME=DIR of an input that may be given any number of times."""
    name, equals, folder = word.partition("=")
    if not equals or not name or not folder:
        raise ValueError(f"--{repeated} {word}: give NAME=DIR")
    return f"{repeated}-{name}", Path(folder).resolve()


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(shipped())
    parser.add_argument("recipe", metavar="RECIPE", help=f"a TOML file, or the name of an installed recipe: {names}")


def _nearest(word: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _stage_verb(kind: str) -> Verb:
    read = ", ".join(STAGES[kind].knob_names())
    note = f"{KNOBS_NOTE} This stage reads: {read}."
    return Verb(STAGES[kind].help, partial(stage_arguments, kind), partial(take_alone, kind), note)


VERBS: Final[Mapping[str, Verb]] = {
    "run": Verb("run a recipe, or go on with it: every step that is not done yet", run_arguments, run),
    "compare": Verb(
        "run a recipe with every system that the paper compares, tuned and measured alike",
        run_arguments,
        partial(run, compared=True),
    ),
    "plan": Verb("say what a recipe will cost: tokens, FLOPs, GPU-hours, memory, disk", plan_arguments, plan),
    "alpaca-eval": Verb(
        "answer AlpacaEval's instructions at several directions, have a judge compare, and draw Fig. 5",
        alpaca.declare,
        alpaca_eval,
    ),
    "chat": Verb(
        "chat in the terminal, with a dial; or answer one question, or those of a pipe",
        chat.declare,
        chat.chat,
        "",
    ),
    "serve": Verb(
        "answer chats over HTTP, as OpenAI's servers do, at the direction that each request asks for",
        serving.declare,
        serving.serve,
        "",
    ),
    "combine": Verb("put several seeds' runs on one page, with figures over the seeds", combine_arguments, combine, ""),
    "export": Verb(
        "write a policy as a plain Hugging Face folder, its dial in the chat template, with a model card",
        exporting.declare,
        export,
        "",
    ),
    "doctor": Verb(
        "say what this machine can run, and whether a model's folder is sound, with the command that mends it",
        examining.declare,
        doctor,
        "",
    ),
    **{kind: _stage_verb(kind) for kind in STAGES},
}
