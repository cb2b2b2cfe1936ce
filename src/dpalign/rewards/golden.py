"""Golden scores: a reward model's scores of some answers, so that users can check how they ask it.

The reward stage writes them for each of its models. An export puts them beside their model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dpalign.paper.prompts import Message, render_reward_input
from dpalign.runs.folder import write_json

if TYPE_CHECKING:
    from dpalign.rewards.score import ModelScorer, Scorer

FILE: Final = "golden_scores.json"
ONLY: Final = "reward"
"""The reward's name in a run that names none."""
_PLAIN: Final = ("What is tea?", ("A drink.", "Tea is a hot drink made of leaves. People like it."), "And coffee?")
_WORLD: Final = ("explain tea and iron.", ("tea is hot.", "tea is hot. iron is hard and makes ships."), "name fox.")


@dataclass(frozen=True)
class GoldenScore:
    """A chat that ends with an answer, and its raw rewards."""

    messages: tuple[Message, ...]
    text: str
    """What the model reads, special tokens included."""
    scores: Mapping[str, float]
    """By head, before any scale."""


@dataclass(frozen=True)
class GoldenModel:
    """The golden scores of one model."""

    scores: tuple[GoldenScore, ...]
    dtype: str
    """The type in which the model was scored."""
    template: str | None
    """The chat template that writes what the model reads; None if its own does."""


def golden_of(scorer: "Scorer", dtype: str) -> dict[str, GoldenModel]:
    """Return the golden scores of every model in a scorer, by its reward's name; functions have none."""
    from dpalign.rewards.score import CombinedScorer, ModelScorer

    parts = scorer.parts if isinstance(scorer, CombinedScorer) else [(f"[rewards.{ONLY}]", scorer)]
    return {
        named.removeprefix("[rewards.").removesuffix("]"): _of_model(one, dtype)
        for named, one in parts
        if isinstance(one, ModelScorer)
    }


def _of_model(scorer: "ModelScorer", dtype: str) -> GoldenModel:
    from dpalign.rewards.inputs import template_for

    tokenizer, form = scorer.tokenizer, scorer.reader.form
    template = template_for(tokenizer, form)
    first, answers, second = _WORLD if form == "world-v1" else _PLAIN
    asked: Message = {"role": "user", "content": first}
    again: Message = {"role": "user", "content": second}
    chats: list[tuple[list[Message], str]] = [([asked], answer) for answer in answers]
    chats.append(([asked, {"role": "assistant", "content": answers[1]}, again], answers[0]))
    rows = []
    for (messages, answer), reward_H in zip(chats, scorer.score(chats).tolist(), strict=True):
        chat: list[Message] = [*messages, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
        assert form == "chat" or render_reward_input(messages, answer, form) in text, (form, text)
        rows.append(GoldenScore(tuple(chat), text, dict(zip(scorer.heads, reward_H, strict=True))))
    return GoldenModel(tuple(rows), dtype, template)


def departure(measured: GoldenModel, scorer: "Scorer", dtype: str) -> str:
    """Describe the first golden answer that a scorer rates differently, beyond rounding; empty if it agrees on all.

    Heads are compared by name, so heads in another order differ too.
    """
    heads = list(scorer.heads)
    found_NH = scorer.score([(one.messages[:-1], one.messages[-1]["content"]) for one in measured.scores])
    share = 1e-3 if measured.dtype == dtype == "float32" else 0.03  # bfloat16 differs from machine to machine
    for head in measured.scores[0].scores:
        if head not in heads:
            return f"no head {head!r}, which the golden scores have"
        highest = max(abs(one.scores[head]) for one in measured.scores)
        for one, found in zip(measured.scores, found_NH[:, heads.index(head)].tolist(), strict=True):
            if not abs(found - one.scores[head]) <= share * highest + 1e-4:  # NaN is no agreement
                answer = one.messages[-1]["content"]
                return f"{head} of {answer[:60]!r} is {found:.4g}, golden {one.scores[head]:.4g}"
    return ""


def require_golden(named: str, scorer: "Scorer", measured: GoldenModel | None, dtype: str) -> None:
    """Refuse a reward model that does not give its own golden scores: the form or the model is another one.

    Raises:
        ValueError: names the reward, the answer and both scores.
    """
    if measured is not None and (difference := departure(measured, scorer, dtype)):
        raise ValueError(
            f"{named}: {difference} ({FILE}); the model is asked in another form than it was measured in (`input`), "
            "its heads are in another order, or its weights are others"
        )


def write_golden(folder: Path, models: Mapping[str, GoldenModel]) -> None:
    """Write the golden scores of a reward stage; an empty object if all its rewards are functions."""
    write_json(folder / FILE, {name: asdict(model) for name, model in models.items()})


def read_golden(folder: Path) -> dict[str, GoldenModel]:
    """Read the golden scores of a reward stage; empty if it wrote none.

    Raises:
        ValueError: the file is damaged.
    """
    return {name: _model(folder / FILE, value) for name, value in _read(folder / FILE).items()}


def golden_for(folder: Path, name: str) -> GoldenModel | None:
    """Return the golden scores of one reward of a reward stage; `ONLY` names those in a model's own folder.

    Raises:
        ValueError: the file is damaged.
    """
    content = _read(folder / FILE)
    if isinstance(content.get("scores"), list):  # a model's own folder, such as an export
        return _model(folder / FILE, content) if name == ONLY else None
    return _model(folder / FILE, content[name]) if name in content else None


def write_model_golden(folder: Path, model: GoldenModel) -> None:
    """Write the golden scores beside the model."""
    write_json(folder / FILE, asdict(model))


def read_model_golden(folder: Path) -> GoldenModel | None:
    """Read the golden scores beside a model; None if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    content = _read(folder / FILE)
    return _model(folder / FILE, content) if content else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable JSON ({error}); export the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; export the model again")
    return content


def _model(path: Path, content: Mapping[str, Any]) -> GoldenModel:
    try:
        rows: Sequence[Mapping[str, Any]] = content["scores"]
        scores = tuple(
            GoldenScore(tuple(row["messages"]), row["text"], {h: float(x) for h, x in row["scores"].items()})
            for row in rows
        )
        return GoldenModel(scores, content["dtype"], content["template"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no golden scores ({type(error).__name__}: {error}); export again") from error
