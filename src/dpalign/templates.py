"""Every string a model sees, named and versioned, with the parsers that read it back.

- a preference line tells the policy its direction v: `dpa-v1` (the released model's), `fig1` (the paper's figure 1),
  `world-v1` (short, for a tiny model);
- a condition line tells SteerLM the rewards to reach: `steerlm` (its authors' labels), `world-v1`;
- a reward input shows the reward model a chat and an answer, never a direction: `dpa-v1` (released), `world-v1`;
- a chat style sets out the turns: `zephyr`, `world-v1`. `chat_template` writes it as the Jinja text of a policy
  folder; `render_chat` is the same in Python.

A preference line states the integers round(100 v). Halves go away from zero, and what lies within 1e-9 of a half
counts as one, so that Python and Jinja write the same digits whatever their last bits.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from dpalign.preference import Preference, check_objective_names, name_hint

if TYPE_CHECKING:
    from dpalign.records import Message

PreferenceTemplate = Literal["dpa-v1", "fig1", "world-v1"]
ConditionTemplate = Literal["steerlm", "world-v1"]
RewardTemplate = Literal["dpa-v1", "world-v1"]
ChatStyle = Literal["zephyr", "world-v1"]

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
_HALF = 0.5 + 1e-9

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
    _known("preference template", template, PreferenceTemplate)
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


def parse_preference(text: str, template: PreferenceTemplate) -> Preference:
    """Read a direction back from its line, wherever in a text it stands; exact to the digits that the line states.

    Raises:
        ValueError: the text holds no such line or several, names an objective twice, or weighs nothing.
    """
    _known("preference template", template, PreferenceTemplate)
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
    _known("condition template", template, ConditionTemplate)
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
    _known("condition template", template, ConditionTemplate)
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
    _known("reward template", template, RewardTemplate)
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


def with_system_line(messages: "Sequence[Message]", line: str, style: ChatStyle) -> "list[Message]":
    """The chat with a preference or condition line in its system message, after what the user put there."""
    *_, joint = _layout(style)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    own = messages[0]["content"]
    return [{"role": "system", "content": f"{own}{joint}{line}" if own else line}, *messages[1:]]


def render_chat(
    messages: "Sequence[Message]",
    style: ChatStyle,
    *,
    empty_system: bool = False,
    add_generation_prompt: bool = False,
    eos: str = "</s>",
) -> str:
    """The chat as text, exactly as `chat_template(style, ...)` renders it in Jinja."""
    gap, closes, _ = _layout(style)
    close = eos + gap if closes else ""
    text = f"<|system|>{gap}{close}" if empty_system and (not messages or messages[0]["role"] != "system") else ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a message of role {role!r}; known: system, user, assistant")
        text += f"<|{role}|>{gap}{content}{eos + gap if role == 'assistant' else close}"
    return text + (f"<|assistant|>{gap}" if add_generation_prompt else "")


def chat_template(
    style: ChatStyle,
    preference_template: PreferenceTemplate | None = None,
    objectives: Sequence[str] | None = None,
    empty_system: bool = False,
    eos: str = "</s>",
) -> str:
    """The Jinja chat template of a policy folder, steered with none of our code installed.

    With a preference template, `preference={"helpfulness": 0.8, "verbosity": -0.6}` (over two objectives also
    `angle=-37`) given to apply_chat_template writes the system line; without either the model is the plain one.

    Args:
        style: how turns are set out.
        preference_template: the line the policy was trained on; None for a model that takes no preference.
        objectives: names in the recipe's order; given exactly when there is a preference template.
        empty_system: write an empty system turn where there would be none, as Zephyr's SFT and DPO have it.
        eos: the tokenizer's end of sequence, which ends an answer.
    """
    if (preference_template is None) != (objectives is None):
        raise ValueError(
            f"preference_template={preference_template!r}, objectives={objectives!r}: give both or neither"
        )
    gap, closes, joint = _layout(style)
    values: dict[str, object] = {
        "JOINT": joint,
        "SYSTEM": f"<|system|>{gap}",
        "USER": f"<|user|>{gap}",
        "ASSISTANT": f"<|assistant|>{gap}",
        "CLOSE": eos + gap if closes else "",
        "EOS": eos,
        "GAP": gap,
        "EMPTY": empty_system,
    }
    if preference_template is None or objectives is None:
        return _fill(_JINJA_PLAIN + _JINJA_TURNS, values)
    _known("preference template", preference_template, PreferenceTemplate)
    check_objective_names(objectives)
    match preference_template:
        case "dpa-v1":
            opening, plus, minus = f"{_RELEASED} {_RATING}", " + ", " + "
        case "fig1":
            opening, plus, minus = f"{_FIG1} {_RATING}", " + ", " - "
        case "world-v1":
            opening, plus, minus = "", " ", " "
    values |= {"NAMES": list(objectives), "KNOWN": ", ".join(objectives), "HALF": _HALF}
    values |= {"OPENING": opening, "PLUS": plus, "MINUS": minus, "DECIMALS": preference_template == "fig1"}
    return _fill(_JINJA_DIAL + _JINJA_TURNS, values)


def _fill(jinja: str, values: Mapping[str, object]) -> str:
    """Put values in their @PLACES@: JSON's strings, lists, numbers and booleans are Jinja's too."""
    return re.sub(r"@([A-Z]+)@", lambda place: json.dumps(values[place[1]], ensure_ascii=False), jinja)


_JINJA_PLAIN = """\
{%- if (preference is defined and preference is not none) or (angle is defined and angle is not none) -%}
  {{- raise_exception("this model takes no preference; use a policy trained on directions") -}}
{%- endif -%}
{%- set dial = namespace(line=none) -%}
"""

_JINJA_DIAL = """\
{%- set names = @NAMES@ -%}
{%- set dial = namespace(weights=[], largest=0.0, squares=0.0, line=none) -%}
{%- if angle is defined and angle is not none -%}
  {%- if preference is defined and preference is not none -%}
    {{- raise_exception("give a preference or an angle, not both") -}}
  {%- endif -%}
  {%- if names | length != 2 -%}
    {{- raise_exception("an angle names a direction of two objectives; give weights for: " ~ @KNOWN@) -}}
  {%- endif -%}
  {%- if angle is not number or angle is boolean or angle - angle != 0 -%}
    {{- raise_exception("angle is " ~ angle ~ "; give a finite number of degrees") -}}
  {%- endif -%}
  {#- Jinja has no cosine and no sine: their series, over half a turn at most. -#}
  {%- set x = ((angle + 180) % 360 - 180) * 0.017453292519943295 -%}
  {%- set wave = namespace(cos=1.0, sin=x, even=1.0, odd=x) -%}
  {%- for i in range(1, 16) -%}
    {%- set wave.even = 0 - wave.even * x * x / ((2 * i - 1) * (2 * i)) -%}
    {%- set wave.odd = 0 - wave.odd * x * x / ((2 * i) * (2 * i + 1)) -%}
    {%- set wave.cos = wave.cos + wave.even -%}
    {%- set wave.sin = wave.sin + wave.odd -%}
  {%- endfor -%}
  {%- set dial.weights = [wave.cos, wave.sin] -%}
{%- elif preference is defined and preference is not none -%}
  {%- if preference is not mapping -%}
    {{- raise_exception("preference is " ~ preference ~ "; give weights by name for: " ~ @KNOWN@) -}}
  {%- endif -%}
  {%- for name in preference if name not in names -%}
    {{- raise_exception("preference names an unknown objective '" ~ name ~ "' (known: " ~ @KNOWN@ ~ ")") -}}
  {%- endfor -%}
  {%- for name in names -%}
    {%- set w = preference[name] if name in preference else 0 -%}
    {%- if w is not number or w is boolean or w - w != 0 -%}
      {{- raise_exception("weight of '" ~ name ~ "' is " ~ w ~ "; give a finite number") -}}
    {%- endif -%}
    {%- set dial.weights = dial.weights + [w] -%}
  {%- endfor -%}
{%- endif -%}
{%- if dial.weights -%}
  {%- for w in dial.weights -%}
    {%- set dial.largest = [dial.largest, w | abs] | max -%}
  {%- endfor -%}
  {%- if dial.largest == 0 -%}
    {{- raise_exception("all weights are zero: that is no direction; weigh at least one of: " ~ @KNOWN@) -}}
  {%- endif -%}
  {%- for w in dial.weights -%}
    {%- set dial.squares = dial.squares + (w / dial.largest) * (w / dial.largest) -%}
  {%- endfor -%}
  {%- set dial.line = @OPENING@ -%}
  {%- for w in dial.weights -%}
    {%- set n = ((100 * (w / dial.largest / dial.squares ** 0.5)) | abs + @HALF@) | int -%}
    {%- set minus = w < 0 and n > 0 -%}
    {%- set joint = "" if loop.first else @MINUS@ if minus else @PLUS@ -%}
    {%- set digits = (n // 100) ~ "." ~ (n % 100 // 10) ~ (n % 10 if n % 10 else "") if @DECIMALS@ else n -%}
    {%- set sign = "-" if minus and (loop.first or not @DECIMALS@) else "" -%}
    {%- set dial.line = dial.line ~ joint ~ names[loop.index0] ~ "*" ~ sign ~ digits -%}
  {%- endfor -%}
{%- endif -%}
"""

_JINJA_TURNS = """\
{%- set own = messages[0]["content"] if messages and messages[0]["role"] == "system" else none -%}
{%- set system = "" if @EMPTY@ and own is none else own -%}
{%- if dial.line is not none -%}
  {%- set system = own ~ @JOINT@ ~ dial.line if own else dial.line -%}
{%- endif -%}
{%- if system is not none -%}
  {{- @SYSTEM@ ~ system ~ @CLOSE@ -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message["content"] is not string -%}
    {{- raise_exception("message " ~ loop.index0 ~ ": its content is no text; this model reads text alone") -}}
  {%- elif message["role"] == "user" -%}
    {{- @USER@ ~ message["content"] ~ @CLOSE@ -}}
  {%- elif message["role"] == "assistant" -%}
    {{- @ASSISTANT@ -}}
    {%- generation -%}{{- message["content"] ~ @EOS@ -}}{%- endgeneration -%}
    {{- @GAP@ -}}
  {%- elif message["role"] != "system" -%}
    {{- raise_exception("a message of role '" ~ message["role"] ~ "' (known: system, user, assistant)") -}}
  {%- elif not loop.first -%}
    {{- @SYSTEM@ ~ message["content"] ~ @CLOSE@ -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- @ASSISTANT@ -}}
{%- endif -%}
"""


def _layout(style: ChatStyle) -> tuple[str, bool, str]:
    """(what follows a tag and a closed turn, whether EOS closes every turn, what joins the user's system and ours)."""
    _known("chat style", style, ChatStyle)
    match style:
        case "zephyr":
            return "\n", True, "\n"
        case "world-v1":
            return "", False, " "


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
    n = int(abs(100 * weight) + _HALF)
    return -n if weight < 0 else n


def _decimal(hundredths: int) -> str:
    n = abs(hundredths)
    return f"{n // 100}.{n % 100 // 10}{n % 10 or ''}"


def _nearest(value: float, highest: int) -> int:
    return int(min(max(value, 0.0), float(highest)) + _HALF)


def _known(kind: str, name: object, choices: Any) -> None:
    if name not in get_args(choices):
        raise ValueError(f"unknown {kind} {name!r} ({name_hint(name, get_args(choices))})")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:197]}...")
