"""Chat templates: the format of a chat's turns, with the dial inside.

A chat style formats the turns: `zephyr`, `world-v1`. `chat_template` writes the style as the Jinja text of a policy
folder; `render_chat` renders the same text in Python.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from dpalign.paper.direction import check_objective_names
from dpalign.paper.prompts import HALF, PreferenceTemplate, line_pieces, require_known
from dpalign.rows import Message

ChatStyle = Literal["zephyr", "world-v1"]


def with_system_line(messages: Sequence[Message], line: str, style: ChatStyle) -> list[Message]:
    """The chat with a preference or condition line in its system message, after the user's own system text."""
    *_, joint = _layout(style)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": line}, *messages]
    own = messages[0]["content"]
    return [{"role": "system", "content": f"{own}{joint}{line}" if own else line}, *messages[1:]]


def render_chat(
    messages: Sequence[Message],
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
    """The Jinja chat template of a policy folder; it needs no code of ours to steer the policy.

    With a preference template, apply_chat_template(preference={"helpfulness": 0.8, "verbosity": -0.6}) writes the
    system line; over two objectives angle=-37 does too. Without either, the prompt has no preference.

    Args:
        style: the format of the turns.
        preference_template: the line the policy was trained on; None for a model that takes no preference.
        objectives: names in the recipe's order; exactly when there is a preference template.
        empty_system: write an empty system turn where a chat has none, as Zephyr's SFT and DPO do.
        eos: the tokenizer's end of sequence, which ends an answer.

    Raises:
        ValueError: an unknown style or template; objectives without a preference template, or the reverse.
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
    require_known("preference template", preference_template, PreferenceTemplate)
    check_objective_names(objectives)
    opening, plus, minus = line_pieces(preference_template)
    values |= {"NAMES": list(objectives), "KNOWN": ", ".join(objectives), "HALF": HALF}
    values |= {"OPENING": opening, "PLUS": plus, "MINUS": minus, "DECIMALS": preference_template == "fig1"}
    return _fill(_JINJA_DIAL + _JINJA_TURNS, values)


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
    """(text after a tag and after a closed turn, whether EOS closes every turn, joint between system text and line)."""
    require_known("chat style", style, ChatStyle)
    match style:
        case "zephyr":
            return "\n", True, "\n"
        case "world-v1":
            return "", False, " "
