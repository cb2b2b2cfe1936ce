"""`dpa new`: a short recipe of your own, from four questions: the model, the rewards, the data, the machine."""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar, cast

from dpalign.data.sources import read_source
from dpalign.recipe import load
from dpalign.rewards.knobs import FUNCTION_NAME
from dpalign.runs.hub import may_be_named
from dpalign.runs.modelfolder import template_of
from dpalign.runs.tables import literal

_T = TypeVar("_T")

Machine = Literal["cpu", "gpu", "gpus"]
MACHINES: Final[tuple[Machine, ...]] = ("cpu", "gpu", "gpus")
BASE: Final = "one-gpu"
"""The recipe that a new one extends."""
FUNCTIONS: Final = ("words", "log_words", "sentences", "reading_grade", "markdown_share")
"""Rewards that come with the package, by the names of their functions."""
VALIDATION: Final = 300
"""The validation prompts of that recipe."""
CHATS: Final = "HuggingFaceH4/ultrachat_200k"
"""What a base model is fine-tuned on first (section 3.1)."""

QUESTIONS: Final = {
    "model": "Which model? A hub name or a folder.",
    "reward": (
        "What rates an answer? Two or more, with commas: reward models (hub names or folders), functions of your own "
        f"(module:function), or {', '.join(FUNCTIONS)}. NAME= before one gives it a name."
    ),
    "data": "Which prompts? Files, folders or hub names, with commas; docs/data.md shows the forms.",
    "machine": f"Which machine? {', '.join(MACHINES)}.",
}

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Reward:
    """One reward, which is one objective."""

    name: str
    source: str
    is_function: bool


@dataclass(frozen=True)
class Wishes:
    """The answers to the four questions."""

    model: str
    rewards: Sequence[Reward]
    data: Sequence[str]
    machine: Machine


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    add("file", nargs="?", type=Path, default=Path("mine.toml"), metavar="FILE", help="default: %(default)s")
    add("--model", metavar="MODEL", help="a hub name or a folder")
    text = f"a reward model, module:function, or {', '.join(FUNCTIONS)}; give two or more"
    add("--reward", action="append", metavar="[NAME=]REWARD", help=text)
    add(
        "--data",
        action="append",
        metavar="DATA",
        help="prompts, with or without answers: a file, a folder or a hub name",
    )
    add("--machine", choices=MACHINES, help="what it will run on")
    parser.epilog = "What is not given is asked for, on a terminal. No file is overwritten."


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Write the recipe; returns its path.

    Raises:
        ValueError: the file exists already, or an answer gives no valid recipe.
    """
    file: Path = arguments.file
    if file.suffix != ".toml":
        raise ValueError(f"{file}: a recipe's file ends in .toml")
    if file.exists():
        raise ValueError(f"{file}: exists already; name another file")
    given: dict[str, str | None] = {}
    for name in QUESTIONS:
        words = getattr(arguments, name)
        given[name] = ",".join(words) if isinstance(words, list) else words
    lacking = [name for name, words in given.items() if words is None]
    if lacking and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError(f"give {', '.join(f'--{name}' for name in lacking)}; on a terminal they are asked for")
    write(file, wishes(given, ask))
    sys.stderr.write(f"Next:\n  dpa run {file} --dry-run\n  dpa plan {file}\n  dpa run {file}\n")
    return str(file)


def wishes(given: Mapping[str, str | None], ask: Callable[[str, Callable[[str], object]], str]) -> Wishes:
    """The four answers: from the command line, or asked for.

    Args:
        ask: called with a question's name and the function that reads its answer, which raises ValueError at a bad one.

    Raises:
        ValueError: a given answer is bad; says what is accepted.
    """

    def answer(name: str, read: Callable[[str], _T]) -> _T:
        words = given[name]
        return read(ask(name, read) if words is None else words)

    return Wishes(
        answer("model", read_model),
        answer("reward", read_rewards),
        answer("data", read_data),
        answer("machine", read_machine),
    )


def write(file: Path, wished: Wishes) -> None:
    """Write the recipe to a new file.

    Raises:
        ValueError: the file exists, a row of the data cannot be read, or the recipe is refused; then no file is left.
    """
    text = "\n".join(lines(file.stem, wished)) + "\n"
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise ValueError(f"{file}: exists already; name another file") from None
    try:
        load(file)
    except ValueError:
        file.unlink()
        raise


def ask(name: str, read: Callable[[str], object]) -> str:
    """The answer to a question, asked on the terminal until it can be read."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.document import Document
    from prompt_toolkit.validation import ValidationError, Validator

    class Readable(Validator):
        def validate(self, document: Document) -> None:
            try:
                read(document.text)
            except ValueError as error:
                raise ValidationError(message=str(error)) from None

    session: PromptSession[str] = PromptSession()
    default = detected() if name == "machine" else ""
    return session.prompt(
        f"{QUESTIONS[name]}\n> ", validator=Readable(), validate_while_typing=False, default=default
    ).strip()


# --- answers ---


def read_model(words: str) -> str:
    """A hub name or a folder.

    Raises:
        ValueError: neither.
    """
    model = words.strip()
    if not _is_model(model):
        raise ValueError(f"model {model!r}: no folder, and no hub name such as Qwen/Qwen3-0.6B")
    return model


def read_rewards(words: str) -> list[Reward]:
    """Rewards as the user names them: the models first, then the functions.

    Raises:
        ValueError: fewer than two, one that is no reward, or two of one name.
    """
    rewards: list[Reward] = []
    for part in _parts(words):
        name, equals, source = part.partition("=")
        if not equals:
            name, source = "", part
        source = f"dpalign.rewards.functions:{source}" if source in FUNCTIONS else source
        is_function = bool(FUNCTION_NAME.fullmatch(source)) and not Path(source).exists()
        if not is_function and not _is_model(source):
            raise ValueError(
                f"reward {source!r}: no folder, no hub name such as Skywork/Skywork-Reward-V2-Qwen3-0.6B, no "
                f"module:function, and none of {', '.join(FUNCTIONS)}"
            )
        name = name or (source.rpartition(":")[2] if is_function else "quality")
        if not _NAME.fullmatch(name):
            raise ValueError(f"reward {part!r}: {name!r} is no name: a letter, then letters, digits, '_' or '-'")
        if name in [other.name for other in rewards]:
            raise ValueError(f"reward {part!r}: {name!r} is another's name; write NAME={source}")
        rewards.append(Reward(name, source, is_function))
    if len(rewards) < 2:
        raise ValueError(f"rewards {words.strip()!r}: a direction weighs at least two; add one, such as words")
    return sorted(rewards, key=lambda reward: reward.is_function)


def read_data(words: str) -> list[str]:
    """Files, folders or hub names.

    Raises:
        ValueError: no source, or one that does not exist.
    """
    sources = _parts(words)
    if not sources:
        raise ValueError("data: name at least one file, folder or hub name")
    for source in sources:
        if not Path(source).exists() and not _is_named(source.partition(":")[0]):
            raise ValueError(f"data {source!r}: no such file or folder, and no hub name such as openbmb/UltraFeedback")
    return sources


def read_machine(words: str) -> Machine:
    """One of the three kinds.

    Raises:
        ValueError: another word.
    """
    if words.strip() not in MACHINES:
        raise ValueError(f"machine {words.strip()!r}: one of {', '.join(MACHINES)}")
    return cast("Machine", words.strip())


def gpus() -> int:
    """How many GPUs this machine has, by nvidia-smi."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.splitlines())


def detected() -> Machine:
    """The kind of this machine."""
    return MACHINES[min(gpus(), 2)]


def _parts(words: str) -> list[str]:
    return [part for part in (part.strip() for part in words.split(",")) if part]


def _is_model(source: str) -> bool:
    return Path(source).is_dir() or _is_named(source)


def _is_named(source: str) -> bool:
    """Whether a text is OWNER/NAME on the hub."""
    return "/" in source and may_be_named(source)


# --- the recipe ---


def lines(name: str, wished: Wishes) -> Iterator[str]:
    """The recipe's lines."""
    yield f"# What this leaves out comes from the recipe {BASE}. All knobs: dpa run {name}.toml --print-recipe"
    yield f"extends = {literal(BASE)}"
    yield f"name = {literal(name)}"
    if wished.machine == "gpus":
        processes = max(2, 1 << gpus().bit_length() - 1 if gpus() else 2)
        yield _said('launcher = "torchrun"', "one process a GPU in training; docs/scale.md says more")
        yield f"processes = {processes}"
    yield from ("", "[model]", f"base = {literal(wished.model)}")
    chats = Path(wished.model).is_dir() and template_of(Path(wished.model)) is None
    if not chats:
        yield _said('chat = "model"', "its own chat template; a base model has none: leave this and [sft] out")
    if wished.machine == "cpu":
        yield _said('dtype = "float32"', "half precision is slower on most CPUs")
    if not chats:
        yield from ("", "[sft]", _said(f"checkpoint = {literal(wished.model)}", "an instruct model needs no SFT"))
    for i, reward in enumerate(wished.rewards):
        said = "each reward is an objective, fitted to 0-100" if i == 0 else ""
        yield from ("", _said(f"[rewards.{reward.name}]", said))
        yield f"{'function' if reward.is_function else 'model'} = {literal(reward.source)}"
    yield from ("", *directions(wished.rewards))
    yield from ("", _said("[data]", "rows = [...] in place of prompts learns from their answers too"))
    yield f"prompts = {literal(wished.data)}"
    if (rows := _rows(wished.data)) is not None and rows < 10 * VALIDATION:
        yield _said(f"validation_prompts = {max(2, rows // 10)}", f"a tenth of the {rows} rows")
        yield _said("tuning = 0", "`dpa compare` needs a share, such as 0.1")
    yield _said("judge = 0", "a second opinion would need ratings under these names")
    if chats:
        yield _said(f"sft = {literal(CHATS)}", "chats that the base model learns from first")
    if wished.machine == "cpu":
        yield from ("", _said("[sampling]", "a trial; leave this table out on a GPU"))
        yield from ("prompts = 64", "n = 4", "max_new_tokens = 128", "rows = 32")
        yield from ("", "[evaluation]", "directions = 5")


def directions(rewards: Sequence[Reward]) -> Iterator[str]:
    """The table [preference]: users may want more or less of a function, and more of anything else."""
    first, second, *others = (reward.name for reward in rewards)
    both_ways = any(reward.is_function for reward in rewards[1:])
    if not others:
        yield _said("[preference]", "the directions that users may ask for, in degrees")
        if both_ways:
            yield _said("low = -45", f"{first} and less {second}, in equal parts; 0 is {first} alone")
            yield _said("high = 45", f"{first} and more {second}, in equal parts")
        else:
            yield _said("low = 0", f"{first} alone")
            yield _said("high = 90", f"{second} alone")
        return
    yield _said("[preference]", "the directions that users may ask for")
    if both_ways:
        yield 'distribution = "cone"'
        center = literal([1, *[0] * (1 + len(others))])
        yield _said(f"center = {center}", f"{first} alone, and up to 45 degrees to all sides: more or less of the rest")
    else:
        yield _said('distribution = "simplex"', "more of each, in any mixture")


def _rows(sources: Sequence[str]) -> int | None:
    """How many rows the files have together; None if one is a folder or on the hub."""
    if not all(Path(source).is_file() for source in sources):
        return None
    counts = {source: sum(1 for _ in read_source(source)) for source in sources}
    if empty := [source for source, count in counts.items() if not count]:
        raise ValueError(f"data {empty[0]!r}: no rows in it")
    return sum(counts.values())


def _said(line: str, comment: str) -> str:
    return f"{line:32} # {comment}" if comment else line
