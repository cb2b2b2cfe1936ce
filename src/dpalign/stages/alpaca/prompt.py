"""What the judge is asked: which of two answers is better, in one token, `m` for the first and `M` for the second.

The words are our own. Those of AlpacaEval 2's official annotator come with the package alpaca_eval
(`evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt`), and are taken as a prompt file.
"""

import re
from pathlib import Path
from typing import Final

PLACES: Final = ("instruction", "output_1", "output_2")
"""What a prompt must have a place for, in braces: `{output_1}` is the answer of m, `{output_2}` that of M."""

DEFAULT: Final = """\
<|im_start|>system
You compare answers of language models as a careful human reader would, and name the better one.
<|im_end|>
<|im_start|>user
Two models, m and M, were given the same instruction. Which of them answered it better?

The instruction:
<instruction>
{instruction}
</instruction>

The answer of m:
<answer model="m">
{output_1}
</answer>

The answer of M:
<answer model="M">
{output_2}
</answer>

Judge by how well each answer does what the instruction asks: whether it is right, helpful and to the point. The order \
of the two is arbitrary and says nothing. Reply with the name of the better model and nothing else, no quotes and no \
full stop: m or M.
<|im_end|>
"""

_TURN: Final = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_PLACE: Final = re.compile(r"\{(instruction|output_1|output_2)\}")


def read_prompt(path: Path | None) -> str:
    """A prompt file, or our own words.

    Raises:
        ValueError: a place is missing or there twice, or text stands outside the turns.
    """
    if path is None:
        return DEFAULT
    try:
        template = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such prompt file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from None
    for place in PLACES:
        if (count := len(re.findall(rf"\{{{place}\}}", template))) != 1:
            raise ValueError(
                f"{path}: {{{place}}} stands in it {count} times; it needs each of {', '.join(PLACES)} once"
            )
    if "<|im_start|>" in template and _TURN.sub("", template).strip():
        raise ValueError(f"{path}: {_TURN.sub('', template).strip()[:60]!r} stands outside its <|im_start|> turns")
    return template


def fill(template: str, instruction: str, output_1: str, output_2: str) -> list[dict[str, str]]:
    """The prompt as a chat: ChatML turns if the template has any, else one turn of the user's.

    What is filled in is never read again for places or turns, whatever an answer says.
    """
    values = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
    turns = [(role, text) for role, text in _TURN.findall(template)] or [("user", template)]
    return [{"role": role, "content": _PLACE.sub(lambda place: values[place[1]], text).strip()} for role, text in turns]
