"""The lines and inputs that a model sees, named and versioned.

- a preference line tells the policy its direction v: `dpa-v1` (the released model's), `fig1` (the paper's figure 1),
  `world-v1` (short, for a tiny model);
- a condition line tells SteerLM the rewards to reach: `steerlm` (its authors' labels), `steerlm-100-v1` (points),
  `world-v1`;
- a reward input shows the reward model a chat and an answer, never a direction: `dpa-v1` (released), `world-v1`.

A preference line states the integers round(100 v). Halves round away from zero, and a value within 1e-9 of a half
counts as a half: Python and Jinja then write the same digits, even if their last bits differ.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, get_args

from dpalign.paper.direction import NAME, Preference, check_objective_names, name_hint

PreferenceTemplate = Literal["dpa-v1", "fig1", "world-v1"]
ConditionTemplate = Literal["steerlm", "steerlm-100-v1", "world-v1"]
RewardTemplate = Literal["dpa-v1", "world-v1"]
RewardInput = Literal["chat", "dpa-v1", "world-v1"]
"""What a reward model reads: its own chat template's text, or one of ours."""


Level = tuple[float, str]
"""A part of an arc: the highest second weight of a unit direction that it covers, and its words."""


class Message(TypedDict):
    """A turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


MISSING: Final = -100.0
"""SteerLM's mark of a missing label."""

_RELEASED = "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way."
_FIG1 = "You are a helpful assistant."
_RATING = "Your response should maximize weighted rating = "
_ATTRIBUTES = "Your response should have these attributes: "
_POINTS = "Your response should have these attributes, from 0 to 100: "
_RATE = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in "
    "these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity"
)
HALF: Final = 0.5 + 1e-9
"""Added before rounding down, in Python and in Jinja alike."""

_CONDITION_LINES: Final = {
    "steerlm": re.compile(rf".*{_ATTRIBUTES}({NAME}:[0-4](?:,{NAME}:[0-4])*)(?![\w:.]).*", re.DOTALL),
    "steerlm-100-v1": re.compile(rf".*{_POINTS}({NAME}:\d+(?:,{NAME}:\d+)*)(?![\w:.]).*", re.DOTALL),
    "world-v1": re.compile(rf"\s*({NAME} \d+(?: {NAME} \d+)*)\s*"),
}


def render_preference(preference: Preference, template: PreferenceTemplate, levels: Sequence[Level] = ()) -> str:
    """The system line that tells a policy its direction, for any number of objectives.

    `fig1` writes tenths as the figure does (0.8), and hundredths where they are needed (0.97).

    Args:
        levels: for two objectives, the words that end the line after the arithmetic (`levels_of`); () adds none.
    """
    require_known("preference template", template, PreferenceTemplate)
    line, plus, minus = line_pieces(template)
    for i, (name, weight) in enumerate(preference.weights.items()):
        n = _hundredths(weight)
        # In `fig1` the joint carries the sign, but the first term has none before it.
        number = str(n) if template != "fig1" else ("-" if n < 0 and i == 0 else "") + _decimal(n)
        line += ("" if i == 0 else minus if n < 0 else plus) + f"{name}*{number}"
    return f"{line}. {level_words(preference.v[1], levels)}" if levels else line


def levels_of(words: Sequence[str], low: float, high: float) -> tuple[Level, ...]:
    """Words for equal parts of an arc, from its low end to its high end.

    Args:
        low, high: degrees of the arc's ends, within -90 and 90.

    Raises:
        ValueError: an arc beyond -90 or 90, where two angles share a second weight.
    """
    if not words:
        return ()
    if not -90 <= low < high <= 90:
        raise ValueError(f"levels divide an arc within -90 and 90 degrees, and this one is {low:g} to {high:g}")
    ends = [low + (high - low) * (i + 1) / len(words) for i in range(len(words))]
    return tuple((round(math.sin(math.radians(end)), 4), text) for end, text in zip(ends, words, strict=True))


def level_words(weight: float, levels: Sequence[Level]) -> str:
    """The words of the first part that covers a second weight; beyond all parts, the last one's."""
    return next((words for end, words in levels if weight <= end), levels[-1][1])


def line_pieces(template: PreferenceTemplate) -> tuple[str, str, str]:
    """The pieces of a preference line: its opening, the joint before a plus term, the joint before a minus term."""
    match template:
        case "dpa-v1":
            return f"{_RELEASED} {_RATING}", " + ", " + "
        case "fig1":
            return f"{_FIG1} {_RATING}", " + ", " - "
        case "world-v1":
            return "", " ", " "


def render_condition(rewards: Mapping[str, float | None], template: ConditionTemplate) -> str:
    """The system line that tells SteerLM which rewards (0-100) to reach; missing ones (None, -100) are left out.

    `steerlm` states labels l of 0..4, where 20 l + 10 is the reward, clipped and rounded. The others state the
    rewards as integers. The paper does not say where the rewards go: here they end a line worded like `dpa-v1`.
    """
    require_known("condition template", template, ConditionTemplate)
    present = {name: value for name, value in rewards.items() if value is not None and value != MISSING}
    if not present:
        raise ValueError(f"no reward to condition on among {dict(rewards)}; give at least one")
    check_objective_names(list(present))
    for name, value in present.items():
        if not math.isfinite(value):
            raise ValueError(
                f"the condition's {name!r} is {value}; give a reward of 0-100, or None where it is missing"
            )
    match template:
        case "steerlm":
            labels = {name: _nearest((value - 10) / 20, 4) for name, value in present.items()}
            return f"{_RELEASED} {_ATTRIBUTES}{','.join(f'{name}:{label}' for name, label in labels.items())}"
        case "steerlm-100-v1":
            points = (f"{name}:{_nearest(value, 100)}" for name, value in present.items())
            return f"{_RELEASED} {_POINTS}{','.join(points)}"
        case "world-v1":
            return " ".join(f"{name} {_nearest(value, 100)}" for name, value in present.items())


def stated_reward(value: float, template: ConditionTemplate) -> float:
    """The reward that a condition line states for a reward of 0-100."""
    return 20.0 * _nearest((value - 10) / 20, 4) + 10 if template == "steerlm" else float(_nearest(value, 100))


def parse_condition(text: str, template: ConditionTemplate) -> dict[str, float]:
    """The rewards (0-100) that a condition line states: alone for `world-v1`, anywhere in a text for the others."""
    require_known("condition template", template, ConditionTemplate)
    line = _CONDITION_LINES[template].fullmatch(text)
    if not line:
        example = render_condition({"helpfulness": 90, "verbosity": 50}, template)
        raise ValueError(f"no condition line of {template!r} in {text[:200]!r} (one: {example!r})")
    words = re.split("[:, ]", line[1])
    check_objective_names(words[::2])
    values = [float(word) for word in words[1::2]]
    return dict(zip(words[::2], [20 * v + 10 for v in values] if template == "steerlm" else values, strict=True))


def reward_input_frame(messages: Sequence[Message], template: RewardTemplate) -> tuple[str, str]:
    """The text before and after the answer in the reward model's input; all answers to a prompt share it.

    System messages are left out: the released form has no place for them, and they would show the direction.
    """
    require_known("reward template", template, RewardTemplate)
    turns = dialogue(messages)
    match template:
        case "dpa-v1":
            chat = "".join(f"\n\n{role.capitalize()}: {content}" for role, content in turns)
            return f"{_RATE}{chat}\n\nAssistant: ", " [/INST]"
        case "world-v1":
            chat = "".join(f"{'rate' if role == 'user' else 'answer'}: {content}\n" for role, content in turns)
            return f"{chat}answer: ", "\nscore:"


def render_reward_input(messages: Sequence[Message], response: str, template: RewardTemplate) -> str:
    """The reward model's input for one answer: no chat template, no EOS (section 3.1, as released)."""
    before, after = reward_input_frame(messages, template)
    return before + response + after


def dialogue(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, content) of the turns without system messages.

    Raises:
        ValueError: user and assistant do not take turns, or the user has not the first and the last.
    """
    turns: list[tuple[str, str]] = [
        (message["role"], message["content"]) for message in messages if message["role"] != "system"
    ]
    for i, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"turn {i} is the {role}'s; a chat goes user, assistant, user and so on")
    if len(turns) % 2 == 0:
        raise ValueError(f"a chat of {len(turns)} turns does not end with the user's; there is nothing to answer")
    return turns


def _hundredths(weight: float) -> int:
    n = int(abs(100 * weight) + HALF)
    return -n if weight < 0 else n


def _decimal(hundredths: int) -> str:
    n = abs(hundredths)
    return f"{n // 100}.{n % 100 // 10}{n % 10 or ''}"


def _nearest(value: float, highest: int) -> int:
    return int(min(max(value, 0.0), float(highest)) + HALF)


def require_known(kind: str, name: object, choices: Any) -> None:
    """Raise ValueError unless the name is one of a Literal's choices."""
    if name not in get_args(choices):
        raise ValueError(f"unknown {kind} {name!r} ({name_hint(name, get_args(choices))})")
