"""`dpa chat`: its options, who answers, and the three ways to ask: a terminal, lines of a pipe, one question."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dpalign.dial import TEMPERATURE
from dpalign.paper.prompts import RewardInput
from dpalign.runs.environment import API_KEY, take_secret

if TYPE_CHECKING:
    from dpalign.dial.chat.session import Session
    from dpalign.dial.chat.speakers import Speaker
    from dpalign.dial.chat.terminal import Terminal
    from dpalign.dial.dial import Dial
    from dpalign.paper.direction import Preference


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign]  # options may precede the question
    parser._negative_number_matcher = re.compile(r"^-[\d.][^\s]*$")  # --dial -30 is a value, no option
    add = parser.add_argument
    text = "an export, a policy's or a run's folder, unless --url is given; then a question to answer and be done"
    add("words", nargs="*", metavar="MODEL [QUESTION]", help=text)
    text = "a server to chat with in place of a model here: `dpa serve`, or any of OpenAI's kind"
    add("--url", metavar="URL", help=text)
    add("--model", dest="served", metavar="NAME", help="what to ask the server for (default: its own)")
    text = "of the server's model, comma-separated, where the server is none of ours and cannot tell"
    add("--objectives", metavar="NAMES", help=text)
    text = "-30, 'helpfulness=0.8 verbosity=-0.6', or none for the plain model (default: the first objective alone)"
    add("--dial", metavar="DIRECTION", help=text)
    text = "a reward folder or module:function, to show what each answer earns; of several rewards NAME=SOURCE, "
    text += "once each (default: those inside MODEL, if any; quiet in a pipe)"
    add("--reward", metavar="SOURCE", action="append", default=[], help=text)
    text = "draw so many answers around the direction, and take the one that the reward model rates best at it"
    add("--best", metavar="N", help=text)
    text = "how the reward model reads a chat: chat, dpa-v1 or world-v1 (default: what MODEL's dpa.json says)"
    add("--reward-template", choices=get_args(RewardInput), help=text)
    add("--system", metavar="TEXT", help="the system message before the chat")
    text = "0 takes the likeliest word each time (default: %(default)s, as in section 3.2)"
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help=text)
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same answer (default: %(default)s)")
    add("--max-tokens", type=int, metavar="N", help="the longest answer (default: 2048, as far as the context goes)")
    text = "each message stands alone, as it always does for models of the small world: they know no second question"
    add("--no-memory", action="store_true", help=text)
    add("--once", action="store_true", help="all of stdin is one question; else each of its lines is a turn")
    add("--no-history", action="store_true", help="keep no questions for the next chat")
    text = "of the weights: auto, float32, bfloat16 or float16 (default: %(default)s, as they are stored)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 leaves the choice to torch")
    text = "the environment variable with the server's key (default: %(default)s)"
    add("--api-key-env", default=API_KEY, metavar="VARIABLE", help=text)


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> None:
    """Chat until the user leaves.

    Raises:
        ValueError: an option, a folder, a server or a question is wrong; says what to do.
    """
    model, question = _checked(arguments)
    from dpalign.dial.chat import terminal

    quiet = question is not None or arguments.once or not sys.stdin.isatty() or not sys.stdout.isatty()
    screen = terminal.terminal_of_process(quiet)
    screen.say(f"opening {arguments.url or model}", "dim")
    with contextlib.closing(_speaker(arguments, model)) as speaker:
        session = open_session(arguments, speaker, screen)
        if question is not None:
            answer_all(session, [question], commands=False)
        elif arguments.once:
            answer_all(session, [sys.stdin.read().strip()], commands=False)
        elif quiet:
            answer_all(session, (line.rstrip("\n") for line in sys.stdin))
        else:
            screen.read = _reader(speaker, None if arguments.no_history else terminal.history_file())
            converse(session)


def _checked(arguments: argparse.Namespace) -> tuple[Path | None, str | None]:
    """Check the options; returns the model and the question among the words."""
    from dpalign.dial.server.engine import require_ranges

    words = list(arguments.words)
    if arguments.url is None and not words:
        raise ValueError("name a MODEL folder, or a server with --url")
    model = Path(words.pop(0)) if arguments.url is None else None
    if len(words) > 1:
        raise ValueError(f"one question, in quotes; not {len(words)} words: {' '.join(words)[:60]}")
    if arguments.url is None and (arguments.served or arguments.objectives):
        raise ValueError("--model and --objectives go with --url: a folder's own dpa.json tells them")
    if arguments.url is not None and arguments.reward:
        raise ValueError("--reward goes with a MODEL folder: a server scores with its own")
    require_ranges(vars(arguments))
    if words and not words[0].strip():
        raise ValueError("an empty question")
    return model, words[0] if words else None


def _speaker(arguments: argparse.Namespace, model: Path | None) -> "Speaker":
    from dpalign.dial.chat.speakers import Remote, open_local

    if model is not None:
        from dpalign.dial.server.engine import Limits

        options = {name: getattr(arguments, name) for name in ("reward", "reward_template", "dtype", "threads")}
        return open_local(model, Limits(), rows=Limits.max_n, **options)
    key = (take_secret(arguments.api_key_env) or "").strip() or None
    names = [name.strip() for name in (arguments.objectives or "").split(",") if name.strip()]
    return Remote(arguments.url, model=arguments.served, objectives=names, key=key, key_name=arguments.api_key_env)


def open_session(arguments: argparse.Namespace, speaker: "Speaker", screen: "Terminal") -> "Session":
    """A session with the settings of the command line.

    Raises:
        ValueError: a direction that the model does not take.
    """
    from dpalign.dial.chat.session import Session, count_of_best

    return Session(
        speaker,
        screen,
        preference=first_direction(speaker.dial, arguments.dial),
        system=arguments.system,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        best_of=None if arguments.best is None else count_of_best(speaker, arguments.best, "--best"),
        scoring=speaker.about.max_best_of > 0 and (not screen.quiet or bool(arguments.reward)),
        memory=not arguments.no_memory and not (speaker.dial is not None and speaker.dial.template == "world-v1"),
    )


def first_direction(dial: "Dial | None", wish: str | None) -> "Preference | None":
    """The first direction: the user's wish, else the first objective alone, or the middle of an arc that lacks it.

    Raises:
        ValueError: a direction for a model without a dial, or one that it refuses.
    """
    if dial is None:
        if wish not in (None, "none", "off"):
            raise ValueError(f"--dial {wish}: this model takes no directions, as far as is known")
        return None
    if wish is not None:
        return None if wish in ("none", "off") else dial.parse(wish)
    first = dial.read({dial.objectives[0]: 1.0})
    assert first is not None
    if dial.arc is not None and dial.warning(first) is not None:
        return dial.read(angle=sum(dial.arc) / 2)
    return first


def answer_all(session: "Session", lines: Iterable[str], commands: bool = True) -> None:
    """Answer questions one after the other; only the answers go to stdout.

    Raises:
        ValueError: an empty question, a bad command or a refusal; after it, later questions would get other answers.
    """
    from dpalign.dial.chat.session import Leave, obey

    session.warn(session.preference)
    for line in lines:
        if not line.strip():
            if not commands:
                raise ValueError("an empty question")
            continue
        try:
            obey(session, line) if commands else session.ask(line)
        except Leave:
            return
        if session.turns and session.turns[-1].finish == "stopped":
            raise KeyboardInterrupt


def converse(session: "Session") -> None:
    """Read and answer until the user leaves; no error ends it."""
    from dpalign.dial.chat.session import Leave, obey

    screen = session.terminal
    _greet(session)
    while True:
        try:
            line = _read(session)
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if not line.strip():
            continue
        try:
            obey(session, line.strip())
        except Leave:
            return
        except ValueError as error:
            screen.say(str(error), "bold red")
        except KeyboardInterrupt:
            screen.say("(stopped)", "dim")
        screen.say()


def _greet(session: "Session") -> None:
    """Show who answers, the dial, what to ask and what to type."""
    say, speaker = session.terminal.say, session.speaker
    say(speaker.name, "bold")
    if speaker.about.note:
        say(speaker.about.note)
    if speaker.dial is not None:
        session.draw_dial()
    else:
        say("This model takes no directions, as far as is known.", "dim")
    if speaker.about.questions:
        say("\n  ".join(["Try one of these:", *speaker.about.questions]))
    best = ", /best 4 takes the best of four" if speaker.about.max_best_of >= 4 else ""
    say(f"/dial -30 turns, /compare -45 0 shows two{best}, /help says more.", "dim")
    if not session.memory:
        say("Each message stands alone.", "dim")
    say()


def _read(session: "Session") -> str:
    """Read a message; a line that ends in a backslash goes on in the next."""
    directions = session.compared or (session.preference,)
    where = " | ".join(map(session.label, directions))
    if session.best_of is not None:
        where += f" best of {session.best_of}"
    line = session.terminal.read(f"{where} \N{HEAVY RIGHT-POINTING ANGLE QUOTATION MARK ORNAMENT} ".lstrip())
    while line.endswith("\\"):
        line = line[:-1] + "\n" + session.terminal.read("\N{HORIZONTAL ELLIPSIS} ")
    return line


def _reader(speaker: "Speaker", history: Path | None) -> Callable[[str], str]:
    from dpalign.dial.chat.session import COMMANDS
    from dpalign.dial.chat.terminal import line_reader

    names = () if speaker.dial is None else tuple(f"{name}=" for name in speaker.dial.objectives)
    return line_reader({name: command.help for name, command in COMMANDS.items()}, names, history)
