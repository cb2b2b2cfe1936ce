"""What a line of a chat means: a message, or a command that begins with a slash."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dpalign.dial.best_of import SPREAD
from dpalign.dial.chat import arc
from dpalign.dial.chat.session import Session
from dpalign.dial.chat.speakers import Speaker
from dpalign.dial.dial import Dial
from dpalign.page.words import degrees
from dpalign.paper.direction import Preference, name_hint


class Leave(Exception):
    """The chat is over."""


@dataclass(frozen=True)
class Command:
    """One command: what follows it, what it does in words, and what does it."""

    takes: str
    help: str
    do: Callable[[Session, str], None]


def obey(session: Session, line: str) -> None:
    """Do what a line says.

    Raises:
        ValueError: a command that is unknown or cannot be done, or a speaker that refuses; the chat is unchanged.
        Leave: the user wants to go.
    """
    if line.startswith("//"):
        session.ask(line[1:])
    elif not line.startswith("/"):
        session.ask(line)
    else:
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            known = [f"/{one}" for one in COMMANDS]
            raise ValueError(f"unknown command /{name} ({name_hint(f'/{name}', known)}); a message begins with //")
        COMMANDS[name].do(session, rest.strip())


def _the_dial(session: Session) -> Dial:
    if session.dial is None:
        raise ValueError(f"{session.speaker.name} takes no directions, as far as is known (--objectives names them)")
    return session.dial


def _dial(session: Session, rest: str) -> None:
    dial = _the_dial(session)
    if rest in ("off", "none"):
        session.preference = None
    elif rest:
        session.preference = dial.parse(rest)
    session.compared = None
    if rest and session.preference is not None:
        session.terminal.say(
            f"{session.label(session.preference)}  maximize {arc.words(dial, session.preference)}", "dim"
        )
        if warning := dial.warning(session.preference):
            session.terminal.say(warning, "warning")
    else:
        session.terminal.draw(arc.drawn(session.terminal, dial, session.preference))


def _compare(session: Session, rest: str) -> None:
    dial = _the_dial(session)
    if rest in ("", "off") and session.compared is not None:
        session.compared = None
        return
    pair = two_directions(dial, rest)
    for preference in pair:
        if warning := dial.warning(preference):
            session.terminal.say(warning, "warning")
    if session.turns:
        session.compare(session.turns[-1].question, pair, session.turns[:-1])
    else:
        session.compared = pair
        session.terminal.say("The next message is answered at both.", "dim")


def two_directions(dial: Dial, words: str) -> tuple[Preference, Preference]:
    """`-45 0`, or any two directions with a bar between them.

    Raises:
        ValueError: not two, or one that the dial refuses.
    """
    parts = words.split("|") if "|" in words else words.split()
    if len(parts) != 2:
        raise ValueError(f"give two directions, such as /compare -45 0, or with a bar between them; not {words!r}")
    return dial.parse(parts[0]), dial.parse(parts[1])


def _best(session: Session, rest: str) -> None:
    if rest in ("off", "1"):
        session.best_of = session.spread = None
    elif rest:
        n, _, spread = rest.partition(" ")
        within = _a_number(f"best {n}", spread.strip(), most=180) if spread else None
        session.best_of, session.spread = best_of(session.speaker, n, "/best"), within
    if session.best_of is None:
        session.terminal.say("one answer is drawn", "dim")
        return
    spread = degrees(SPREAD if session.spread is None else session.spread)
    text = f"the best of {session.best_of} answers drawn within {spread} of the direction, by the reward model"
    session.terminal.say(text, "dim")


def best_of(speaker: Speaker, n: str, where: str) -> int:
    """How many answers the best is chosen from.

    Args:
        n: as the user wrote it, after the command or option `where`.

    Raises:
        ValueError: no whole number, too many, or nothing that chooses.
    """
    if not speaker.max_best_of:
        raise ValueError(
            f"{where} {n}: no reward model here to choose: start with --reward DIR, or with a server that has one"
        )
    if not n.isdecimal() or not 2 <= int(n) <= speaker.max_best_of:
        raise ValueError(f"{where} {n}: give a whole number from 2 to {speaker.max_best_of}")
    return int(n)


def _score(session: Session, rest: str) -> None:
    if rest not in ("", "on", "off"):
        raise ValueError(f"/score {rest}: give on or off")
    if not session.speaker.scores:
        raise ValueError("no reward model here: start with --reward DIR, or with a server that has one")
    session.scoring = rest == "on" if rest else not session.scoring
    session.terminal.say(f"rewards are {'shown' if session.scoring else 'not shown'}", "dim")


def _system(session: Session, rest: str) -> None:
    if rest == "off":
        session.system = ""
    elif rest:
        session.system = rest
    session.terminal.say(f"system message: {session.system or 'none'}", "dim")


def _memory(session: Session, rest: str) -> None:
    if rest not in ("", "on", "off"):
        raise ValueError(f"/memory {rest}: give on or off")
    session.memory = rest == "on" if rest else not session.memory
    what = "is read with those before it" if session.memory else "stands alone"
    session.terminal.say(f"each message {what}", "dim")


def _seed(session: Session, rest: str) -> None:
    if rest:
        session.seed = int(_a_number("seed", rest, whole=True))
    session.terminal.say(f"seed {session.seed}", "dim")


def _temperature(session: Session, rest: str) -> None:
    if rest:
        session.temperature = _a_number("temperature", rest, most=2)
    session.terminal.say(f"temperature {session.temperature:g}", "dim")


def _tokens(session: Session, rest: str) -> None:
    if rest:
        session.max_tokens = None if rest == "off" else int(_a_number("tokens", rest, least=1, whole=True))
    session.terminal.say(f"longest answer: {session.max_tokens or 'as the model allows'}", "dim")


def _a_number(what: str, text: str, *, least: float = 0, most: float = math.inf, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or math.isinf(value) or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        limits = f"from {least:g}" + (f" to {most:g}" if math.isfinite(most) else " up")
        raise ValueError(f"/{what} {text}: give {kind} {limits}")
    return value


def _retry(session: Session, rest: str) -> None:
    if not session.turns:
        raise ValueError("nothing to answer again yet")
    session.retry()


def _clear(session: Session, rest: str) -> None:
    session.turns.clear()
    session.compared = None
    session.terminal.say("a new chat", "dim")


def _save(session: Session, rest: str) -> None:
    if not rest:
        raise ValueError("/save: name a file")
    path = Path(rest).expanduser()
    session.save(path)
    session.terminal.say(f"saved to {path}", "dim")


def _help(session: Session, rest: str) -> None:
    rows = [(f"/{name} {command.takes}".rstrip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    session.terminal.draw([f"  {session.terminal.styled(f'{left:{width}}', 'bold')}  {right}" for left, right in rows])
    session.terminal.say("  Ctrl-C stops an answer, Ctrl-D leaves; a line that ends in \\ goes on in the next.", "dim")


def _leave(session: Session, rest: str) -> None:
    raise Leave


COMMANDS: Final[Mapping[str, Command]] = {
    "dial": Command("[DIRECTION|off]", "turn to -30, or helpfulness=0.8 verbosity=-0.6; alone: show the dial", _dial),
    "compare": Command("A B", "answer the last message, or the next, at two directions side by side", _compare),
    "best": Command("[N [DEGREES]|off]", "show the best of N answers around the direction, by the reward model", _best),
    "score": Command("[on|off]", "show what the reward model gives each answer", _score),
    "system": Command("[TEXT|off]", "the system message before the chat", _system),
    "memory": Command("[on|off]", "whether a message is read with those before it", _memory),
    "seed": Command("[N]", "what decides the draws: the same seed, the same answer", _seed),
    "temperature": Command("[T]", "0 takes the likeliest word each time", _temperature),
    "tokens": Command("[N|off]", "the longest answer", _tokens),
    "retry": Command("", "answer the last message again, with the next seed, where the dial stands now", _retry),
    "clear": Command("", "begin a new chat", _clear),
    "save": Command("FILE", "write the chat to a JSON file", _save),
    "help": Command("", "these commands", _help),
    "quit": Command("", "leave", _leave),
}
