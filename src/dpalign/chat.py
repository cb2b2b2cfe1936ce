"""Chat templates: the format of a chat's turns, with the dial inside.

A chat style formats the turns: `zephyr`, `world-v1`. `chat_template` writes the style as the Jinja text of a policy
folder; `render_chat` renders the same text in Python. The style `model` keeps the base model's own template:
`OwnChat.template` writes the dial in front of it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from dpalign.paper.direction import check_objective_names
from dpalign.paper.prompts import HALF, Level, Message, PreferenceTemplate, line_pieces, require_known

ChatStyle = Literal["zephyr", "world-v1", "model"]
PromptStyle = Literal["own", "zephyr-sft", "zephyr-dpo"]
"""How a chat is written for a model without a dial. own: in the recipe's form (a named checkpoint: in its own
template). The others: as Zephyr's authors wrote their training rows. Both write an empty system turn where a chat has
no system message. SFT's rows begin with BOS, DPO's do not."""
Place = Literal["system", "user"]
"""Where a system message goes: in a turn of its own, or before the first words of the user."""
Switch = bool | int | float | str
"""A value of a chat template's own argument, such as Qwen3's `enable_thinking`."""


def with_system_line(messages: Sequence[Message], line: str, style: ChatStyle) -> list[Message]:
    """The chat with a preference or condition line in its system message, after the user's own system text."""
    require_known("chat style", style, ChatStyle)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    own = messages[0]["content"]
    return [{"role": "system", "content": f"{own}{_JOINTS[style]}{line}" if own else line}, *messages[1:]]


def render_chat(
    messages: Sequence[Message],
    style: ChatStyle,
    *,
    empty_system: bool = False,
    add_generation_prompt: bool = False,
    eos: str = "</s>",
    bos: str = "",
) -> str:
    """The chat as text, exactly as `chat_template(style, ...)` renders it in Jinja."""
    gap, closes = _layout(style)
    close = eos + gap if closes else ""
    text = bos
    if empty_system and (not messages or messages[0]["role"] != "system"):
        text += f"<|system|>{gap}{close}"
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
    levels: Sequence[Level] = (),
    bos: str = "",
) -> str:
    """The Jinja chat template of a policy folder; it needs no code of ours to steer the policy.

    With a preference template, apply_chat_template(preference={"helpfulness": 0.8, "verbosity": -0.6}) writes the
    system line; over two objectives angle=-37 does too. Without either, the prompt has no preference.

    Args:
        style: the format of the turns.
        preference_template: the line the policy was trained on; None for a model that takes no preference.
        objectives: names in the recipe's order; given if and only if there is a preference template.
        empty_system: write an empty system turn where a chat has none, as Zephyr's SFT and DPO do.
        eos: the tokenizer's end of sequence, which ends an answer.
        levels: what the line says in words, beside its arithmetic.
        bos: the text that begins a chat, if the model was trained with one.

    Raises:
        ValueError: an unknown style or template; objectives without a preference template, or the reverse.
    """
    gap, closes = _layout(style)
    values: dict[str, object] = {
        "JOINT": _JOINTS[style],
        "SYSTEM": f"<|system|>{gap}",
        "USER": f"<|user|>{gap}",
        "ASSISTANT": f"<|assistant|>{gap}",
        "CLOSE": eos + gap if closes else "",
        "EOS": eos,
        "GAP": gap,
        "EMPTY": empty_system,
    }
    begin = _fill("{{- @BOS@ -}}\n", {"BOS": bos}) if bos else ""
    return _dial(preference_template, objectives, levels) + begin + _fill(_JINJA_TURNS, values)


def styled_template(style: PromptStyle, bos: str | None, eos: str) -> str:
    """The Jinja chat template in the form of Zephyr's training rows.

    Raises:
        ValueError: the style is "own"; or it is SFT's, which needs a BOS, and there is none.
    """
    match style:
        case "zephyr-sft" if bos:
            return chat_template("zephyr", empty_system=True, eos=eos, bos=bos)
        case "zephyr-dpo":
            return chat_template("zephyr", empty_system=True, eos=eos)
    raise ValueError(f"prompt style {style!r}, and the tokenizer's bos_token is {bos!r}: Zephyr's SFT began with one")


@dataclass(frozen=True)
class OwnChat:
    """A model's own chat template, and how a policy writes its chats with it; `engines/templates.py` detects this."""

    base: str
    """The template's text, as shipped with the model."""
    place: Place = "system"
    """Where the template takes a system message, and so the dial's line."""
    opening: str = ""
    """What the template writes before an answer, if that has special tokens, such as a channel's. Decoding drops them,
    so the prompt ends with it."""
    switches: Mapping[str, Switch] = field(default_factory=dict)
    """Values of the template's own arguments that the policy was trained with. A caller may override them."""
    stop: str = ""
    """The token that ends an answer."""

    def template(
        self,
        preference_template: PreferenceTemplate | None = None,
        objectives: Sequence[str] | None = None,
        levels: Sequence[Level] = (),
    ) -> str:
        """The Jinja chat template of a policy folder: the dial, and after it the base model's own text, unchanged.

        Raises:
            ValueError: objectives without a preference template, or the reverse; an unknown template.
        """
        values = {"JOINT": _JOINTS["model"], "GAP": _GAP, "ABSENT": _NO_TURN}
        text = _dial(preference_template, objectives, levels)
        text += _fill(_JINJA_SYSTEM if self.place == "system" else _JINJA_USER, values)
        for name, value in self.switches.items():
            text += f"{{%- set {name} = {name} if {name} is defined else {json.dumps(value)} -%}}\n"
        text += _BASE_BEGINS + self.base
        return text.removesuffix("\n") + _fill(_JINJA_OPENING, {"OPENING": self.opening}) if self.opening else text

    def placed(self, messages: Sequence[Message]) -> list[Message]:
        """A chat in the form that the base's own template takes.

        If the template has no system role, the system message opens the first user turn.

        Raises:
            ValueError: no user's turn follows the system message.
        """
        if self.place == "system" or not messages or messages[0]["role"] != "system":
            return list(messages)
        (system, *rest) = messages
        if not rest or rest[0]["role"] != "user":
            raise ValueError(_NO_TURN)
        if not system["content"]:
            return rest
        return [{"role": "user", "content": f"{system['content']}{_GAP}{rest[0]['content']}"}, *rest[1:]]


def base_text(template: str) -> str:
    """The model's own chat template inside a text of `OwnChat.template`; any other template as it is."""
    _, begins, rest = template.partition(_BASE_BEGINS)
    if not begins:
        return template
    base, ends, _ = rest.partition(_BASE_ENDS)
    return f"{base}\n" if ends else base  # `template` removed the last newline; Jinja ignores one


def _dial(
    preference_template: PreferenceTemplate | None, objectives: Sequence[str] | None, levels: Sequence[Level] = ()
) -> str:
    """The Jinja text that reads a direction into `dial.line`, or refuses one."""
    if (preference_template is None) != (objectives is None):
        raise ValueError(
            f"preference_template={preference_template!r}, objectives={objectives!r}: give both or neither"
        )
    if preference_template is None or objectives is None:
        return _JINJA_PLAIN
    require_known("preference template", preference_template, PreferenceTemplate)
    check_objective_names(objectives)
    opening, plus, minus = line_pieces(preference_template)
    values = {"NAMES": list(objectives), "KNOWN": ", ".join(objectives), "HALF": HALF, "OPENING": opening}
    values |= {"PLUS": plus, "MINUS": minus, "DECIMALS": preference_template == "fig1"}
    return _fill(_JINJA_DIAL, values | {"LEVELS": [list(level) for level in levels]})


def _fill(jinja: str, values: Mapping[str, object]) -> str:
    """Put values in their @PLACES@ as JSON, which Jinja reads too."""
    return re.sub(r"@([A-Z]+)@", lambda place: json.dumps(values[place[1]], ensure_ascii=False), jinja)


_JINJA_PLAIN = """\
{%- if (preference is defined and preference is not none) or (angle is defined and angle is not none) -%}
  {{- raise_exception("this model takes no preference; use a policy trained on directions") -}}
{%- endif -%}
{%- set dial = namespace(line=none) -%}
"""

_JINJA_DIAL = """\
{%- set names = @NAMES@ -%}
{%- set dial = namespace(weights=[], largest=0.0, squares=0.0, line=none, words=none) -%}
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
  {%- for level in @LEVELS@ -%}
    {%- if dial.words is none and (loop.last or dial.weights[1] / dial.largest / dial.squares ** 0.5 <= level[0]) -%}
      {%- set dial.words = level[1] -%}
      {%- set dial.line = dial.line ~ ". " ~ dial.words -%}
    {%- endif -%}
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

_GAP: Final = "\n\n"
"""Between a system message and the user's first words, where both share the user's turn."""
_NO_TURN: Final = "this model has no system role: a system message opens the user's first turn, and none follows it"

# The base's own template reads `messages` as changed here. It must not see our arguments: it may be one of ours.
# A server may pass texts as lists of parts, and some templates read only the first part.
_JINJA_SYSTEM = """\
{%- set preference = none -%}
{%- set angle = none -%}
{%- if dial.line is not none -%}
  {%- set dial.own = messages[0]["content"] if messages and messages[0]["role"] == "system" else none -%}
  {%- set dial.rest = messages if dial.own is none else messages[1:] -%}
  {%- if not dial.own -%}
    {%- set dial.own = dial.line -%}
  {%- elif dial.own is string -%}
    {%- set dial.own = dial.own ~ @JOINT@ ~ dial.line -%}
  {%- else -%}
    {%- set dial.last = [{"type": "text", "text": dial.own[-1]["text"] ~ @JOINT@ ~ dial.line}] -%}
    {%- set dial.own = dial.own[:-1] + dial.last -%}
  {%- endif -%}
  {%- set messages = [{"role": "system", "content": dial.own}] + dial.rest -%}
{%- endif -%}
"""

_JINJA_USER = """\
{%- set preference = none -%}
{%- set angle = none -%}
{%- set dial.own = messages[0]["content"] if messages and messages[0]["role"] == "system" else none -%}
{%- if dial.own is not none or dial.line is not none -%}
  {%- set dial.rest = messages if dial.own is none else messages[1:] -%}
  {%- set dial.own = dial.own or "" -%}
  {%- if dial.own is not string -%}
    {%- set dial.own = dial.own | map(attribute="text") | join(@JOINT@) -%}
  {%- endif -%}
  {%- if dial.line is not none -%}
    {%- set dial.own = dial.own ~ @JOINT@ ~ dial.line if dial.own else dial.line -%}
  {%- endif -%}
  {%- if not dial.rest or dial.rest[0]["role"] != "user" -%}
    {{- raise_exception(@ABSENT@) -}}
  {%- endif -%}
  {%- set dial.ask = dial.rest[0]["content"] -%}
  {%- if dial.own and dial.ask is string -%}
    {%- set dial.ask = dial.own ~ @GAP@ ~ dial.ask -%}
  {%- elif dial.own and dial.ask and dial.ask[0]["type"] == "text" -%}
    {%- set dial.ask = [{"type": "text", "text": dial.own ~ @GAP@ ~ dial.ask[0]["text"]}] + dial.ask[1:] -%}
  {%- elif dial.own -%}
    {%- set dial.ask = [{"type": "text", "text": dial.own}] + dial.ask -%}
  {%- endif -%}
  {%- set messages = [{"role": "user", "content": dial.ask}] + dial.rest[1:] -%}
{%- endif -%}
"""

# The comment ends its line as a block does, and the base begins a new line, so Jinja trims nothing of the base.
_BASE_BEGINS: Final = "{#- dpalign: the model's own chat template begins on the next line #}\n"
_BASE_ENDS: Final = "{%+ if add_generation_prompt %}{# dpalign: an answer opens with this #}"
_JINJA_OPENING: Final = _BASE_ENDS + "{{ @OPENING@ }}{% endif %}"

_JOINTS: Final[Mapping[ChatStyle, str]] = {"zephyr": "\n", "world-v1": " ", "model": "\n"}
"""Between the user's own system text and the line."""


def _layout(style: ChatStyle) -> tuple[str, bool]:
    """(text after a tag and after a closed turn, whether EOS closes every turn)."""
    require_known("chat style", style, ChatStyle)
    match style:
        case "zephyr":
            return "\n", True
        case "world-v1":
            return "", False
        case "model":
            raise ValueError('the chat style "model" keeps the model\'s own template: OwnChat writes it')
