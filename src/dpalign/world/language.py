"""Questions and answers of the world.

A prompt asks for a few things at a stated depth; an answer is a list of sentences:

    explain fox, tea and iron.
    fox is red and hunts mice. tea is hot. that is a good question.

A claim about a thing states its trait, and may add its detail. The depth word (`name`, `sketch`,
`describe`, `explain`) states the weight of detail; things named earlier matter more.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

THINGS: Final = {
    "fox": ("red", "hunts mice"),
    "tea": ("hot", "calms people"),
    "iron": ("hard", "makes ships"),
    "owl": ("wise", "sees everything"),
    "rope": ("long", "ties boats"),
    "moon": ("pale", "moves oceans"),
    "oak": ("old", "feeds pigs"),
    "salt": ("white", "keeps meat"),
    "river": ("deep", "turns mills"),
    "bell": ("loud", "wakes monks"),
    "coal": ("black", "heats homes"),
    "silk": ("soft", "dresses kings"),
    "bee": ("busy", "brings honey"),
    "snow": ("cold", "covers roads"),
    "lamp": ("bright", "guides ships"),
    "horse": ("fast", "pulls carts"),
    "glass": ("clear", "shows faces"),
    "desert": ("dry", "hides bones"),
    "whale": ("huge", "eats shrimp"),
    "mint": ("green", "cures headaches"),
    "drum": ("round", "leads dances"),
    "gold": ("rare", "buys land"),
    "wolf": ("grey", "follows sheep"),
    "cork": ("light", "seals bottles"),
    "lemon": ("sour", "cleans copper"),
    "storm": ("wild", "breaks trees"),
    "cave": ("dark", "shelters bats"),
    "needle": ("sharp", "mends shirts"),
    "bread": ("warm", "fills children"),
    "snail": ("slow", "ruins gardens"),
    "crown": ("heavy", "marks queens"),
    "feather": ("thin", "writes letters"),
}
"""Each thing, its trait and its detail: the facts of the world."""

DEPTHS: Final = {"name": 0.04, "sketch": 0.2, "describe": 0.35, "explain": 0.5}
"""The share of helpfulness that lies in detail; covering the things asked for takes the rest."""

EARLIER_MATTERS: Final = 0.6
"""Weight of each thing, as a share of the weight of the thing before it."""

FILLERS: Final = (
    "that is a good question",
    "there is much to say",
    "as everyone knows well",
    "let me think about it",
    "i hope that this helps",
)
"""Sentences that say nothing."""

_PROMPT = re.compile(rf"({'|'.join(DEPTHS)}) ([a-z, ]+)\.")
_CLAIM = re.compile(r"([a-z]+) is ([a-z]+)(?: and ([a-z]+ [a-z]+))?")


@dataclass(frozen=True)
class Task:
    """The request of a prompt."""

    depth: str
    things: tuple[str, ...]

    @property
    def detail_weight(self) -> float:
        return DEPTHS[self.depth]

    @property
    def weights(self) -> tuple[float, ...]:
        """The importance of each thing; they sum to 1."""
        raw = [EARLIER_MATTERS**i for i in range(len(self.things))]
        return tuple(w / sum(raw) for w in raw)


@dataclass(frozen=True)
class Claim:
    """A sentence about a thing: its trait, and perhaps its detail."""

    thing: str
    trait: str
    detail: str | None = None

    @property
    def right(self) -> bool:
        fact = THINGS.get(self.thing)
        return fact is not None and self.trait == fact[0] and self.detail in (None, fact[1])


def fact(thing: str, detailed: bool = False) -> Claim:
    """The true claim about a thing."""
    trait, detail = THINGS[thing]
    return Claim(thing, trait, detail if detailed else None)


def say_prompt(task: Task) -> str:
    *first, last = task.things
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{task.depth} {listed}."


def say_claim(claim: Claim) -> str:
    return f"{claim.thing} is {claim.trait}" + (f" and {claim.detail}" if claim.detail else "")


def say(sentences: Sequence[Claim | str]) -> str:
    """An answer: claims and fillers, each ended by a full stop."""
    return " ".join(f"{s if isinstance(s, str) else say_claim(s)}." for s in sentences)


def read_prompt(text: str) -> Task:
    """The task of a prompt; ValueError if the text is no prompt of this world."""
    match = _PROMPT.fullmatch(text)
    things = tuple(re.split(r", | and ", match[2])) if match else ()
    if not match or any(thing not in THINGS for thing in things) or len(set(things)) != len(things):
        raise ValueError(
            f"not a prompt of this world: {text!r} (one looks like {say_prompt(Task('name', ('fox', 'tea')))!r})"
        )
    return Task(match[1], things)


def read_answer(text: str) -> list[Claim | str]:
    """The sentences of any text: claims, and plain strings for all else."""
    sentences = [s.strip() for s in text.split(".")]
    return [Claim(*m.groups()) if (m := _CLAIM.fullmatch(s)) else s for s in sentences if s]
