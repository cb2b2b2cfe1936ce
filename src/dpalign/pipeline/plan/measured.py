"""What a run folder tells about the next one: how many rows, how long, and how fast they went."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from dpalign.rows import CANDIDATES, CONVERSATIONS, PROMPTS, RATED, read_table, shards
from dpalign.run.ledger import LEDGER, Ledger, read_ledger
from dpalign.stages.cost import Sizes

KINDS: Final = {"sampling": ("sample", "sampled"), "scoring": ("score", "scored")}
TRAININGS: Final = ("reward", "judge", "sft", "steerlm", "policy")
"""How the steps begin whose updates are of whole conversations."""


@dataclass(frozen=True)
class Rates:
    """Per second, on the machine that made the run; 0 where it has not got so far."""

    sampling: float = 0.0
    """Tokens of answers drawn."""
    scoring: float = 0.0
    """Answers scored."""
    training: float = 0.0
    """Tokens trained on."""


def measure(run: Path, assumed: Sizes) -> tuple[Sizes, Rates]:
    """The sizes of a run's own data and answers, and its rates; what it has not made yet stays as assumed.

    Raises:
        ValueError: the folder holds no finished stage.
    """
    ledgers = {path.parent.name: read_ledger(path.parent) for path in sorted(run.glob(f"*/{LEDGER}"))}
    if not ledgers:
        raise ValueError(f"--run {run}: no finished stage in this folder; name a run folder, or leave --run out")
    sizes = assumed
    if "data" in ledgers:
        sizes = _data(run / "data", sizes)
    samples = {name: ledger for name, ledger in ledgers.items() if _is(name, "sample")}
    if samples:
        sizes = _answers([run / name for name in samples], list(samples.values()), sizes)
        if (run / "data" / "chats").exists():
            sizes = replace(sizes, chat=_chat_tokens(run / "data" / "chats", run / next(iter(samples))))
    rates: dict[str, float] = {}
    for what, (stage, unit) in KINDS.items():
        rates[what] = _rate([ledger for name, ledger in ledgers.items() if _is(name, stage)], unit)
    trained = [ledger for name, ledger in ledgers.items() if any(_is(name, kind) for kind in TRAININGS)]
    return sizes, Rates(training=_rate(trained, "trained"), **rates)


def _is(name: str, stage: str) -> bool:
    """Whether a step is the loop's own of this stage: sample-2, and no contender's."""
    return name == stage or name.startswith(f"{stage}-")


def _rate(ledgers: Sequence[Ledger], unit: str) -> float:
    worked = [ledger for ledger in ledgers if ledger["tokens"].get(unit) and ledger["seconds"] > 0]
    seconds = sum(ledger["seconds"] for ledger in worked)
    return sum(ledger["tokens"][unit] for ledger in worked) / seconds if seconds else 0.0


def _data(data: Path, sizes: Sizes) -> Sizes:
    """Rows by what they are for."""
    splits = read_table(data / "prompts", PROMPTS, ["split"])["split"].to_pylist()
    sources = read_table(data / "train", RATED, ["source"])["source"]
    others = int(pc.sum(pc.equal(sources, "helpsteer")).as_py() or 0)
    prompts = (splits.count("D1") + splits.count("D2")) / 2
    chats = data / "chats"
    return replace(
        sizes,
        prompts=prompts,
        rated=(len(sources) - others) / (2 * prompts) if prompts else sizes.rated,
        others=float(others),
        chats=float(read_table(chats, CONVERSATIONS, ["origin"]).num_rows) if chats.exists() else sizes.chats,
        evaluated=float(splits.count("validation")),
        tuning=float(splits.count("tuning")),
    )


def _answers(folders: Sequence[Path], ledgers: Sequence[Ledger], sizes: Sizes) -> Sizes:
    """Tokens of answers as they were counted; of prompts by their letters, at as many a token as the answers have."""
    rows = sum(ledger["counts"]["out"] for ledger in ledgers)
    tokens = sum(ledger["tokens"]["sampled"] for ledger in ledgers)
    written = sum(sum(ledger["sizes"].values()) for ledger in ledgers)
    first = shards(folders[0])[0]
    table = read_table(first, CANDIDATES, ["messages"])
    prompt = _letters(table["messages"]) / table.num_rows * _tokens_a_letter(first)
    return replace(sizes, answer=tokens / rows, prompt=prompt, text_bytes=written / tokens)


def _tokens_a_letter(shard: Path) -> float:
    table = read_table(shard, CANDIDATES, ["response", "tokens"])
    letters = pc.sum(pc.utf8_length(table["response"])).as_py()
    return float(pc.sum(table["tokens"]).as_py()) / max(1, int(letters))


def _chat_tokens(chats: Path, samples: Path) -> float:
    table = read_table(chats, CONVERSATIONS, ["messages", "response"])
    letters = _letters(table["messages"]) + int(pc.sum(pc.utf8_length(table["response"])).as_py())
    return float(letters / table.num_rows * _tokens_a_letter(shards(samples)[0]))


def _letters(messages: pa.ChunkedArray) -> int:
    """Of all messages' contents."""
    return sum(_letters_of(chunk) for chunk in messages.chunks)


def _letters_of(messages: Any) -> int:
    contents = pc.struct_field(pc.list_flatten(messages), "content")
    return int(pc.sum(pc.utf8_length(contents)).as_py() or 0)


def described(rates: Rates) -> Iterator[str]:
    """The rates in words."""
    for figure, words in (
        (rates.sampling, "tokens sampled"),
        (rates.scoring, "answers scored"),
        (rates.training, "tokens trained"),
    ):
        yield f"{figure:,.0f} {words} a second" if figure else f"no {words} yet"
