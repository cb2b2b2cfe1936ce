"""The rewards that score a policy's answers in use: those of its contract, in the same points as in training.

A reward model lies inside the export, or where the user says. A function from outside this package runs only if the
user names it: a downloaded folder must not choose which code runs here.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpalign.paper.prompts import RewardInput
from dpalign.rewards.knobs import FUNCTION_NAME
from dpalign.runs.hub import local_model
from dpalign.runs.modelfolder import CONFIG, require_fit
from dpalign.train.contract import Contract, RewardRecord

if TYPE_CHECKING:
    from dpalign.rewards.score import Scorer

log = logging.getLogger(__name__)

BATCH_TOKENS: Final = 8192
"""Tokens per forward pass of a reward model, padding included."""
OWN_MODULE: Final = "dpalign.rewards.functions:"
"""Prefix of the package's own reward functions, which run without being named by the user."""


def open_scorer(
    model: Path, contract: Contract, given: Sequence[str] = (), *, template: RewardInput | None = None, dtype: str
) -> "Scorer | None":
    """Open the user's rewards, or else the export's; None without either.

    Args:
        model: the policy's folder.
        given: a folder, hub name or module:function; with several rewards, each as NAME=SOURCE.
        template: how a reward model reads a chat; None: as the contract says.

    Raises:
        ValueError: a reward cannot be opened, or one is missing although others are given.
    """
    if contract.rewards:
        return _combined(model, contract, given, template, dtype)
    if len(given) > 1:
        raise ValueError(f"--reward: {len(given)} are given, and this model knows one; give one")
    inside = model / contract.reward if contract.reward else None
    source = given[0] if given else str(inside) if inside is not None and inside.is_dir() else None
    return None if source is None else _opened(source, contract.heads, template or contract.reward_template, dtype)


def _combined(
    model: Path, contract: Contract, given: Sequence[str], template: RewardInput | None, dtype: str
) -> "Scorer | None":
    from dpalign.rewards.score import CombinedScorer

    named = _by_name([record.name for record in contract.rewards], given)
    sources = {record.name: named.get(record.name) or _own_source(model, record) for record in contract.rewards}
    for record in contract.rewards:
        if sources[record.name] is None:
            missing = f"{_what(record)}; give --reward {record.name}={record.source or 'DIR'}"
            if given:
                raise ValueError(f"--reward: reward {record.name!r} is missing: {missing}")
            log.warning("no rewards are shown: reward %r is %s", record.name, missing)
            return None
        if len(record.scale) != len(record.heads):
            raise ValueError(f"reward {record.name!r} has no scale on record; export the policy from its run again")
    parts = [
        (f"[rewards.{record.name}]", _opened(str(sources[record.name]), record.heads, template or record.input, dtype))
        for record in contract.rewards
    ]
    heads = [f"{record.name}/{head}" for record in contract.rewards for head in record.heads]
    return CombinedScorer(heads, parts, [scale for record in contract.rewards for scale in record.scale])


def _by_name(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Return the user's source of each reward, by name."""
    named = {}
    for word in given:
        name, equals, source = word.partition("=")
        if not equals and len(names) == 1:
            name, source = names[0], word
        if name not in names or not source:
            raise ValueError(f"--reward {word}: give NAME=DIR or NAME=module:function, NAME one of {', '.join(names)}")
        named[name] = source
    return named


def _own_source(model: Path, record: RewardRecord) -> str | None:
    """Return a reward's default source: inside the export, or in this package."""
    if record.folder is not None and (model / record.folder / CONFIG).is_file():
        return str(model / record.folder)
    return record.source if record.kind == "function" and record.source.startswith(OWN_MODULE) else None


def _what(record: RewardRecord) -> str:
    match record.kind:
        case "function":
            return f"the Python function {record.source}"
        case "model":
            return f"the model {record.source}, which is not in this folder"
        case "trained":
            return "a model that is not in this folder"


def _opened(source: str, heads: Sequence[str], form: RewardInput | None, dtype: str) -> "Scorer":
    from dpalign.rewards.score import FunctionScorer, ModelScorer

    if FUNCTION_NAME.fullmatch(source) and not Path(source).exists():
        return FunctionScorer(source, heads)
    if form is None:
        raise ValueError(f"{source}: nobody said how this reward model reads a chat; give --reward-template")
    source = local_model(source)
    folder = Path(source) / "model" if (Path(source) / "model").is_dir() else Path(source)
    if folder.is_dir():
        require_fit(folder)
    scorer = ModelScorer(
        str(folder) if folder.exists() else source, heads, template=form, batch_tokens=BATCH_TOKENS, dtype=dtype
    )
    if len(scorer.heads) != len(heads):
        raise ValueError(f"{source}: has the heads {list(scorer.heads)}, and {list(heads)} are read")
    return scorer
