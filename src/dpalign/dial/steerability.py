"""`dpa steerability`: measure how well any model is steered, with the report's figures and intervals over prompts.

OUT/answers/                the answers and their scores, in shards of prompts; the same command resumes
OUT/steerability.json       all figures, typed (`measure/steerability.py`)
OUT/table.md, front.png     the same for people

A model with a dial gets the direction through the dial. Any other model, in a folder or behind an OpenAI-compatible
URL, gets it in words: the preference line is its system message. The yardstick has the objectives, rewards and
directions. It is the model's own export, or another export (`--by`) to measure different models alike.
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpalign.data.own import EVALUATED_SPLITS, read_prompts
from dpalign.dial import TEMPERATURE
from dpalign.dial.chat.speakers import Ask, Remote, Speaker, base_of, open_local
from dpalign.dial.dial import Dial
from dpalign.dial.export.source import find_model, weights_folder
from dpalign.dial.server.engine import Limits, require_ranges
from dpalign.measure.answers import with_texts
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import Rewards
from dpalign.measure.reading import Reading, read_rewards
from dpalign.measure.record import rounded
from dpalign.measure.steerability import Steerability, steerability
from dpalign.measure.system import System
from dpalign.page.words import direction, number, said
from dpalign.paper.direction import Preference, Sphere, even_or_all, rng_for
from dpalign.paper.objectives import Objective, head_indices
from dpalign.rows import CANDIDATES, SCORES, Message, matrix_of, read_table, write_rows
from dpalign.runs.environment import API_KEY, take_secret
from dpalign.runs.folder import Run, Shard
from dpalign.runs.ledger import write_text
from dpalign.stages.feasibility import Feasibility

if TYPE_CHECKING:
    from dpalign.rewards.score import Scorer

VERSION: Final = 1
SHARD: Final = 8
"""Prompts per shard."""
DIRECTIONS: Final = 10
"""Even steps of a range, as in section 3.2."""


@dataclass(frozen=True)
class Yardstick:
    """The objectives, rewards and directions that measure a model."""

    dial: Dial
    scorer: "Scorer"
    reading: Reading
    directions: tuple[Preference, ...]

    @property
    def read(self) -> set[str]:
        """The heads that objectives read."""
        heads = self.reading.heads
        return {heads[h] for objective in self.reading.objectives for h in head_indices(objective, heads)}


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    text = "a model's folder: an export, a run, a policy, or any chat model; leave it out with --url"
    add("model", nargs="?", type=Path, metavar="MODEL", help=text)
    add("--url", metavar="URL", help="a server in place of a folder: `dpa serve`, or any of OpenAI's kind")
    add("--served", metavar="NAME", help="what to ask the server for (default: its own)")
    text = "an export or a run whose objectives, rewards and range are the yardstick (default: MODEL)"
    add("--by", type=Path, metavar="MODEL", help=text)
    text = "a reward folder or module:function that scores; of several rewards NAME=SOURCE, once each "
    text += "(default: those inside the yardstick)"
    add("--reward", metavar="SOURCE", action="append", default=[], help=text)
    text = "ask in words: the preference line as a system message, also of a model that has a dial"
    add("--prompted", action="store_true", help=text)
    text = "questions: jsonl, json, csv, parquet or a hub name, as in data.prompts"
    add("--prompts", required=True, metavar="FILE", help=text)
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--out", type=Path, required=True, metavar="DIR", help="output folder; the same command resumes in it")
    text = f"even steps of the range (default: {DIRECTIONS}; of a grid or a list always all its directions)"
    add("--directions", type=int, metavar="N", help=text)
    add("--samples", type=int, default=1, metavar="N", help="answers a prompt and direction (default: %(default)s)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help="default: %(default)s, as in section 3.2")
    add("--max-tokens", type=int, default=512, metavar="N", help="the longest answer (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--workers", type=int, default=32, metavar="N", help="answers drawn at a time (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of a folder's weights")
    text = "the environment variable with the server's key (default: %(default)s)"
    add("--api-key-env", default=API_KEY, metavar="VARIABLE", help=text)


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Measure the model; return the table.

    Raises:
        ValueError: bad input, no yardstick, or a server that refuses; finished shards are kept.
    """
    _check(arguments)
    prompts, report = read_prompts(arguments.prompts, "prompts", EVALUATED_SPLITS)
    if not prompts:
        raise ValueError(f"{arguments.prompts}: no prompts")
    prompts = dict(islice(prompts.items(), arguments.limit))
    yardstick = open_yardstick(arguments)
    with Run.open(arguments.out, None) as run:
        for reason, count in report.filtered.items():
            run.log(f"{report.file}: {count} rows left out: {reason}")
        answers, how = _answers(run, arguments, yardstick, prompts)
        about = {"how": how, "model": arguments.url or str(arguments.model)}
        measures = figures(answers, yardstick, Bootstrap(arguments.seed), about)
        write_text(arguments.out / "steerability.json", measures.model_dump_json(indent=2) + "\n")
        table = table_of(measures)
        write_text(arguments.out / "table.md", table)
        if len(yardstick.dial.objectives) == 2:
            from dpalign.page.drawing import png
            from dpalign.page.figures import front

            (arguments.out / "front.png").write_bytes(png(front(measures.summary).canvas))
    return f"{table}\n{arguments.out / 'steerability.json'}"


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.url is None):
        raise ValueError("name a MODEL folder, or a server with --url: one of the two")
    if arguments.url is not None:
        base_of(arguments.url, arguments.api_key_env)  # refuse a URL with a secret before any file records it
    if arguments.url is not None and arguments.by is None:
        raise ValueError("--url: name the yardstick with --by, an export whose objectives and rewards measure")
    for name, least in (("directions", 2), ("samples", 1), ("max_tokens", 1), ("workers", 1), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")
    require_ranges({"temperature": arguments.temperature})


def open_yardstick(arguments: argparse.Namespace) -> Yardstick:
    """Open the yardstick that the command line names.

    Raises:
        ValueError: no contract, no rewards, a head is missing in the rewards, or not all directions of a list.
    """
    from dpalign.dial.rewards import open_scorer
    from dpalign.stages.stage import installed
    from dpalign.train.contract import FILE, read_contract

    path = arguments.by or arguments.model
    _, model, contract_folder = find_model(path)
    contract = read_contract(contract_folder)
    if contract is None:
        raise ValueError(f"{contract_folder / FILE}: no such file: {path} is no yardstick; name one with --by")
    names, n = contract.names, arguments.directions
    grid_VK = even_or_all(contract.population or Sphere(len(names)), n or DIRECTIONS)
    if n not in (None, len(grid_VK)):
        raise ValueError(f"--directions {n}: {path} lists {len(grid_VK)} directions; leave it out to take them all")
    if len(grid_VK) < 2:
        raise ValueError(f"{path}: lists 1 direction, and steering turns between at least 2; name another with --by")
    with installed():
        scorer = open_scorer(model, contract, arguments.reward, dtype=arguments.dtype)
    if scorer is None:
        raise ValueError(f"{path}: no rewards inside to measure with; name them with --reward")
    objectives = [Objective(name, heads) for name, heads in contract.objectives.items()]
    for objective in objectives:
        head_indices(objective, scorer.heads)
    directions = tuple(Preference.from_vector(v_K, names) for v_K in grid_VK.tolist())
    return Yardstick(Dial.of(contract), scorer, Reading(tuple(scorer.heads), tuple(objectives)), directions)


# --- the answers ---


def _reward_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return the local folders among the user's rewards (DIR or NAME=DIR), to be hashed."""
    named = {word: Path(word if Path(word).is_dir() else word.partition("=")[2] or word) for word in given}
    return {f"--reward {word}": weights_folder(folder) for word, folder in named.items() if folder.is_dir()}


def _answers(
    run: Run, arguments: argparse.Namespace, yardstick: Yardstick, prompts: Mapping[str, Sequence[Message]]
) -> tuple[Path, str]:
    """Draw and score the answers; return their folder, and how the model got the direction."""
    read = ("samples", "temperature", "max_tokens", "seed", "dtype", "prompted", "reward", "url", "served")
    knobs = {name: getattr(arguments, name) for name in read}
    knobs |= {"directions": len(yardstick.directions), "prompts": list(prompts)}
    inputs = {"model": arguments.model, "by": arguments.by, **_reward_folders(arguments.reward)}
    with run.stage(
        "answers", VERSION, {name: path.resolve() for name, path in inputs.items() if path is not None}, knobs
    ) as work:
        if not work.done:
            with contextlib.closing(_speaker(arguments)) as speaker:
                ask = _asking(arguments, speaker, yardstick.dial)
                write_text(work.folder / "how.txt", "a line in words" if ask.in_words else "its own dial")
                for shard in work.shards(-(-len(prompts) // SHARD), "answers/part-{:05d}.parquet"):
                    part = list(prompts.items())[shard.index * SHARD : (shard.index + 1) * SHARD]
                    _fill(shard, part, ask, yardstick, arguments)
    return work.output, (work.output / "how.txt").read_text(encoding="utf-8")


def _speaker(arguments: argparse.Namespace) -> Speaker:
    if arguments.model is not None:
        limits = Limits(max_concurrent=arguments.workers, max_queue=arguments.workers)
        return open_local(arguments.model, limits, rows=arguments.workers, dtype=arguments.dtype, reward=False)
    key = (take_secret(arguments.api_key_env) or "").strip() or None
    return Remote(arguments.url, model=arguments.served, key=key, key_name=arguments.api_key_env)


@dataclass(frozen=True)
class Asking:
    """How a model is asked for a direction."""

    speaker: Speaker
    dial: Dial
    in_words: bool
    temperature: float
    max_tokens: int

    def answer(self, messages: Sequence[Message], direction: Preference, seed: int) -> tuple[str, bool]:
        """Draw an answer; return it, and whether it ended by itself and is not empty."""
        if self.in_words:
            line: Message = {"role": "system", "content": self.dial.line(direction)}
            messages, asked = [line, *messages], None
        else:
            asked = direction
        text, finish = "", None
        with contextlib.closing(
            self.speaker.stream(Ask(messages, asked, self.temperature, seed, self.max_tokens))
        ) as pieces:
            for piece in pieces:
                text += piece.text
                finish = piece.finish or finish
        return text, finish == "stop" and bool(text.strip())


def _asking(arguments: argparse.Namespace, speaker: Speaker, dial: Dial) -> Asking:
    in_words = arguments.prompted or speaker.dial is None
    if not in_words and speaker.dial is not None and speaker.dial.objectives != dial.objectives:
        own, wanted = ", ".join(speaker.dial.objectives), ", ".join(dial.objectives)
        raise ValueError(f"{speaker.name} weighs {own}, and the yardstick {wanted}; ask it in words with --prompted")
    return Asking(speaker, dial, in_words, arguments.temperature, arguments.max_tokens)


def _fill(
    shard: Shard,
    prompts: Sequence[tuple[str, Sequence[Message]]],
    ask: Asking,
    yardstick: Yardstick,
    arguments: argparse.Namespace,
) -> None:
    """Write a shard's answers, drawn in parallel, and their scores on every head."""
    asked = [
        (identity, messages, v, s)
        for identity, messages in prompts
        for v in range(len(yardstick.directions))
        for s in range(arguments.samples)
    ]

    def draw(one: tuple[str, Sequence[Message], int, int]) -> tuple[str, bool]:
        identity, messages, v, s = one
        seed = int(rng_for(arguments.seed, "steerability", identity, v, s).integers(2**31))
        return ask.answer(messages, yardstick.directions[v], seed)

    with ThreadPoolExecutor(arguments.workers) as pool:
        answers = list(pool.map(draw, asked))
    shown = [(messages, text) for (_, messages, _, _), (text, _) in zip(asked, answers, strict=True)]
    reward_NH = yardstick.scorer.score(shown)
    rows, scores = [], []
    for (identity, messages, v, s), (text, whole), reward_H in zip(asked, answers, reward_NH.tolist(), strict=True):
        key = {"prompt_id": identity, "t": 0, "condition_index": v, "sample": s}
        condition = list(yardstick.directions[v].v)
        rows.append(
            {
                **key,
                "condition_kind": "direction",
                "condition": condition,
                "messages": list(messages),
                "response": text,
                "tokens": None,
                "finished": whole,
            }
        )
        scores.append({**key, "rewards": reward_H})
    write_rows(shard.path.parent.parent / "scores" / shard.path.name, scores, SCORES)
    write_rows(shard.path, rows, CANDIDATES)
    shard.tally.add(len(rows), len(rows), scored=len(rows))


# --- the figures ---


def figures(folder: Path, yardstick: Yardstick, bootstrap: Bootstrap, about: dict[str, str]) -> Steerability:
    """Compute all figures of the answers in a folder."""
    system = System(Path(about["model"]).name or about["model"], "iteration", iteration=1)
    rewards: Rewards = with_texts(
        read_rewards(folder, system, yardstick.reading, truth=False), Feasibility().repetition
    )
    shape = (*rewards.reward_PVSK.shape[:3], -1)
    head_PVSH = matrix_of(read_table(folder / "scores", SCORES, ["rewards"])["rewards"]).reshape(shape)
    heads, names = yardstick.reading.heads, yardstick.reading.names
    return rounded(steerability(rewards, head_PVSH, heads, sorted(yardstick.read), names, bootstrap, about))


def table_of(measures: Steerability) -> str:
    """Return the figures as Markdown tables."""
    (measured,) = measures.summary.systems.values()
    figures, names = measured.figures, measures.summary.objectives
    length = measured.length
    rows: list[tuple[str, str]] = [
        ("E_v J(v) (MIP)", said(figures.objective)),
        ("hypervolume, from the ends of the scale", said(figures.hypervolume, 0)),
        ("tau (control)", said(figures.kendall_tau, 2)),
        (f"span of {names[-1]}, points", said(figures.span)),
        ("regret", said(figures.regret)),
        ("miscalibration, 0 if even", said(measures.miscalibration, 2)),
        ("words at the last direction over the first", said(length.last_to_first if length else None, 2)),
    ]
    lines = [f"{measures.model}, asked by {measures.how}", "", "| figure | value (95%) |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", f"| direction | {' | '.join(names)} | v . r | words | degenerate |", "|---" * (len(names) + 4) + "|"]
    for point, worth in zip(measured.points, figures.objective_by_direction, strict=True):
        cells = [said(point.rewards[name]) for name in names] + [said(worth), said(point.words, 0)]
        share = "" if point.degenerate is None else f"{number(100 * point.degenerate.value, 0)}%"
        lines.append(f"| {direction(point)} | {' | '.join(cells)} | {share} |")
    if measures.side_effects:
        lines += ["", "| side effect on | first | last | change |", "|---|---|---|---|"]
        for head in measures.side_effects:
            lines.append(f"| {head.head} | {said(head.first)} | {said(head.last)} | {said(head.change, sign=True)} |")
    return "\n".join(lines) + "\n"
