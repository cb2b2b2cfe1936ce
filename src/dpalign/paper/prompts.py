"""The lines and inputs that a model sees, named and versioned, with the parsers that read them back.

- a preference line tells the policy its direction v: `dpa-v1` (the released model's), `fig1` (the paper's figure 1),
  `world-v1` (short, for a tiny model);
- a condition line tells SteerLM the rewards to reach: `steerlm` (its authors' labels), `world-v1`;
- a reward input shows the reward model a chat and an answer, never a direction: `dpa-v1` (released), `world-v1`.

A preference line states the integers round(100 v). Halves go away from zero, and what lies within 1e-9 of a half
counts as one, so that Python and Jinja write the same digits whatever their last bits.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from dpalign.paper.direction import Preference, check_objective_names, name_hint

if TYPE_CHECKING:
    from dpalign.rows import Message

PreferenceTemplate = Literal["dpa-v1", "fig1", "world-v1"]
ConditionTemplate = Literal["steerlm", "world-v1"]
RewardTemplate = Literal["dpa-v1", "world-v1"]

MISSING: Final = -100.0
"""SteerLM's mark of a label that a row lacks."""

_RELEASED = "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way."
_FIG1 = "You are a helpful assistant."
_RATING = "Your response should maximize weighted rating = "
_ATTRIBUTES = "Your response should have these attributes: "
_RATE = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in "
    "these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity"
)
HALF: Final = 0.5 + 1e-9
"""What rounding adds: Python and Jinja write the same digits with it."""

_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
_INTEGER = rf"{_NAME}\*-?\d+"
_DECIMAL = rf"{_NAME}\*-?\d+\.\d+"
_END = r"(?![\w*]|\.\d| [+-] )"
_PREFERENCE_LINES: Final = {
    "dpa-v1": re.compile(rf"weighted rating = ({_INTEGER}(?: \+ {_INTEGER})*){_END}"),
    "fig1": re.compile(rf"weighted rating = ({_DECIMAL}(?: [+-] {_NAME}\*\d+\.\d+)*){_END}"),
    "world-v1": re.compile(rf"(?<![\w*.-])(?<![=+-] )({_INTEGER}(?: {_INTEGER})*){_END}"),
}
_TERM = re.compile(rf"(?:([+-]) )?({_NAME})\*(-?[\d.]+)")
_CONDITION_LINES: Final = {
    "steerlm": re.compile(rf".*{_ATTRIBUTES}({_NAME}:[0-4](?:,{_NAME}:[0-4])*)(?![\w:.]).*", re.DOTALL),
    "world-v1": re.compile(rf"\s*({_NAME} \d+(?: {_NAME} \d+)*)\s*"),
}


def render_preference(preference: Preference, template: PreferenceTemplate) -> str:
    """The system line that tells a policy its direction, for any number of objectives.

    `fig1` writes the hundredths only where there are any: the figure's 0.8, and 0.97 for what it does not show.
    """
    known("preference template", template, PreferenceTemplate)
    parts = [(name, _hundredths(w)) for name, w in preference.weights.items()]
    match template:
        case "dpa-v1":
            return f"{_RELEASED} {_RATING}{' + '.join(f'{name}*{n}' for name, n in parts)}"
        case "world-v1":
            return " ".join(f"{name}*{n}" for name, n in parts)
        case "fig1":
            (first, n), *rest = parts
            line = f"{_FIG1} {_RATING}{first}*{'-' if n < 0 else ''}{_decimal(n)}"
            return line + "".join(f" {'-' if n < 0 else '+'} {name}*{_decimal(n)}" for name, n in rest)


def line_pieces(template: PreferenceTemplate) -> tuple[str, str, str]:
    """What a preference line is made of: its opening, and what stands before a further plus or minus term."""
    match template:
        case "dpa-v1":
            return f"{_RELEASED} {_RATING}", " + ", " + "
        case "fig1":
            return f"{_FIG1} {_RATING}", " + ", " - "
        case "world-v1":
            return "", " ", " "


def parse_preference(text: str, template: PreferenceTemplate) -> Preference:
    """Read a direction back from its line, wherever in a text it stands; exact to the digits that the line states.

    Raises:
        ValueError: the text holds no such line or several, names an objective twice, or weighs nothing.
    """
    known("preference template", template, PreferenceTemplate)
    found = _PREFERENCE_LINES[template].findall(text)
    if len(found) != 1:
        example = render_preference(Preference.from_angle(-15, ("helpfulness", "verbosity")), template)
        others = [other for other, line in _PREFERENCE_LINES.items() if other != template and line.search(text)]
        meant = f"; it reads as {' or '.join(others)}" if others and not found else ""
        raise ValueError(f"{len(found)} preference lines of {template!r} in {_shown(text)} (one: {example!r}){meant}")
    terms = [(name, float(n) * (-1 if sign == "-" else 1)) for sign, name, n in _TERM.findall(found[0])]
    scale = 1 if template == "fig1" else 100
    return Preference.from_vector([n / scale for _, n in terms], tuple(name for name, _ in terms))


def render_condition(rewards: Mapping[str, float | None], template: ConditionTemplate) -> str:
    """The system line that tells SteerLM which rewards (0-100) to reach; those missing (None, -100) are left out.

    `steerlm` states the labels 0..4 of which 20 l + 10 are rewards, clipped and rounded; `world-v1` the rewards as
    integers. The paper does not say where the labels stand: here they end a system line worded like `dpa-v1`.
    """
    known("condition template", template, ConditionTemplate)
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
        case "world-v1":
            return " ".join(f"{name} {_nearest(value, 100)}" for name, value in present.items())


def stated_reward(value: float, template: ConditionTemplate) -> float:
    """The reward that a condition line states for a reward of 0-100."""
    return 20.0 * _nearest((value - 10) / 20, 4) + 10 if template == "steerlm" else float(_nearest(value, 100))


def parse_condition(text: str, template: ConditionTemplate) -> dict[str, float]:
    """The rewards (0-100) that a condition line states: anywhere in a text for `steerlm`, alone for `world-v1`."""
    known("condition template", template, ConditionTemplate)
    found = _CONDITION_LINES[template].fullmatch(text)
    if not found:
        example = render_condition({"helpfulness": 90, "verbosity": 50}, template)
        raise ValueError(f"no condition line of {template!r} in {_shown(text)} (one: {example!r})")
    words = re.split("[:, ]", found[1])
    check_objective_names(words[::2])
    values = [float(word) for word in words[1::2]]
    return dict(zip(words[::2], [20 * v + 10 for v in values] if template == "steerlm" else values, strict=True))


def reward_input_frame(messages: "Sequence[Message]", template: RewardTemplate) -> tuple[str, str]:
    """What stands before and after the answer in the reward model's input; all answers of a prompt share it.

    System messages are left out: the released form has no place for them, and the direction must not be seen.
    """
    known("reward template", template, RewardTemplate)
    turns = _dialogue(messages)
    match template:
        case "dpa-v1":
            said = "".join(f"\n\n{role.capitalize()}: {content}" for role, content in turns)
            return f"{_RATE}{said}\n\nAssistant: ", " [/INST]"
        case "world-v1":
            said = "".join(f"{'rate' if role == 'user' else 'answer'}: {content}\n" for role, content in turns)
            return f"{said}answer: ", "\nscore:"


def render_reward_input(messages: "Sequence[Message]", response: str, template: RewardTemplate) -> str:
    """The reward model's input for one answer: no chat template, no EOS (section 3.1, as released)."""
    before, after = reward_input_frame(messages, template)
    return before + response + after


def _dialogue(messages: "Sequence[Message]") -> list[tuple[str, str]]:
    """(role, content) of the turns, system messages left out; they alternate, from the user to the user."""
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


def known(kind: str, name: object, choices: Any) -> None:
    """ValueError unless a template of that name exists."""
    if name not in get_args(choices):
        raise ValueError(f"unknown {kind} {name!r} ({name_hint(name, get_args(choices))})")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:197]}...")
