"""`dpa alpaca-eval`: answers at each direction, judged by the package alpaca_eval, and Fig. 5.

OUT/outputs-POINT/   a policy's answers in AlpacaEval's form (one resumable stage per direction)
OUT/judgements/      the package's cache of judgements (alpaca_judge.py)
OUT/figure/          alpaca.json, table.md, fig5.svg, fig5.png

A point is one system at one direction. A policy with a `dpa.json` is asked for directions. Any other model
answers plainly, or under system lines of the user's choice (SteerLM's targets, a wish for brevity).
Without a judge the command ends with the answers; `--outputs-from OUT` judges them on another machine.
"""

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpalign.data.sources import read_source, shorten
from dpalign.measure.alpaca import AlpacaSummary, Judged, differences_of, figures_of
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.paper_curves import FIG_5
from dpalign.paper.direction import Arc, Preference, evaluation_grid
from dpalign.paper.prompts import render_preference
from dpalign.pipeline.alpaca_judge import OFFICIAL, Judge, Pair, win_rates
from dpalign.pipeline.shipped import recipe_file
from dpalign.recipe import Recipe, load
from dpalign.rows import CANDIDATES, prompt_id, read_table, user_prompt, write_rows
from dpalign.runs.environment import settle_threads, take_secret
from dpalign.runs.errors import without_credentials
from dpalign.runs.folder import Run, Work
from dpalign.runs.ledger import sha256_of, write_json
from dpalign.stages.sample import Condition, draw, open_engine
from dpalign.stages.stage import installed
from dpalign.stages.training import Checkpoint, checkpoint_of
from dpalign.train.contract import Contract, read_contract

VERSION: Final = 1
EVEN_STEPS: Final = 7
"""Even steps over the trained arc if no directions are named. Fig. 5 has 7 points of DPA."""
OUTPUTS: Final = "outputs.json"
SYSTEM: Final = "system.json"


@dataclass(frozen=True)
class Point:
    """One system at one direction: one answer to each instruction."""

    system: str
    label: str = ""
    """Distinguishes it from the system's other points; "" for a system of one point."""
    line: str | None = None
    """The system line that it answers under."""
    weights: dict[str, float] | None = None
    """The direction, by objective."""
    angle: float | None = None
    """Degrees, for two objectives."""
    policy: Checkpoint | None = None
    """The checkpoint that answers; None if the answers exist."""
    outputs: Path | None = None
    """The file of the answers, if they exist."""

    @property
    def name(self) -> str:
        return f"{self.system}@{self.label}" if self.label else self.system

    @property
    def slug(self) -> str:
        """The name as part of a file name: `dpa@-7.5` is dpa-minus-7_5."""
        text = re.sub(r"(?<![\w])-(?=[\d.])", "minus-", self.name.replace("@", "\0")).replace(".", "_").lower()
        return re.sub(r"[^a-z0-9_-]+", "-", text).strip("-")


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser._negative_number_matcher = re.compile(r"^-[\d.][\d.,+-]*$")  # --angles -15,-30 is a value, not an option
    add = parser.add_argument
    text = "a policy folder, stage folder or checkpoint, or NAME=FOLDER; one with a dpa.json is steered"
    add("policies", nargs="*", metavar="POLICY", help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="output folder; the same command resumes in it")
    add("--instructions", type=Path, metavar="FILE", help="the benchmark's instructions (default: the reference's)")
    add("--reference", type=Path, metavar="FILE", help="answers to compare with, in AlpacaEval's form")
    text = "existing answers, in AlpacaEval's form; NAME@LABEL=FILE for one point of a curve"
    add("--outputs", action="append", default=[], metavar="NAME=FILE", help=text)
    text = "all answers in the --out folder of an earlier command, for instance from another machine"
    add("--outputs-from", action="append", type=Path, default=[], metavar="DIR", help=text)
    text = "directions in degrees, such as 0,-15,-30,-45 (default: 7 even steps of the policy's trained arc)"
    add("--angles", type=_numbers, default=(), metavar="LIST", help=text)
    text = "a direction by objective, such as 0.8,-0.6 (repeatable)"
    add("--weights", type=_numbers, action="append", default=[], metavar="LIST", help=text)
    text = "a system line for a POLICY in place of directions, such as SteerLM's targets (repeatable)"
    add("--line", action="append", default=[], metavar="NAME=TEXT", help=text)
    add("--limit", type=int, metavar="N", help="only the first N instructions")
    text = "base URL of an OpenAI-compatible judge, such as http://127.0.0.1:8000/v1"
    add("--judge-url", metavar="URL", help=text)
    add("--judge-model", metavar="NAME", help="the judge's name on its server (default: the annotator's own)")
    text = f"an annotator of alpaca_eval, or a folder with its configs.yaml (default with a judge: {OFFICIAL})"
    add("--annotator", metavar="NAME", help=text)
    text = "more fields of each request to the judge, as a JSON object"
    add("--judge-extra", type=_object, default={}, metavar="JSON", help=text)
    text = "the environment variable with the key for --judge-url (default: no key is sent)"
    add("--api-key-env", metavar="VARIABLE", help=text)
    add("--workers", type=int, default=4, metavar="N", help="concurrent requests to --judge-url (default: %(default)s)")
    add("--retry-failed", action="store_true", help="ask again for failed judgements, which may cost again")
    add("--difficulty", type=Path, metavar="FILE", help="AlpacaEval's df_gamed.csv; adds length-controlled win rates")
    add("--paper", action="store_true", help="draw the paper's points behind ours")
    text = "a recipe with the knobs of sampling and resampling (default: %(default)s)"
    add("--recipe", default="paper", metavar="RECIPE", help=text)
    add(
        "--dry-run",
        action="store_true",
        help="print what is left to sample, and at most how many judgements; touch nothing",
    )


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Do the work that is left; return the text to print.

    Raises:
        ValueError: bad input, or a judge that cannot be asked; answers and judgements so far are kept.
    """
    _check(arguments)
    recipe = load(recipe_file(arguments.recipe), overrides)
    source, limit = arguments.instructions or arguments.reference, arguments.limit
    instructions = read_instructions(source, limit)
    points = points_of(arguments)
    for path in [arguments.reference, *(point.outputs for point in points)]:  # before anything is sampled or paid for
        if path is not None:
            read_outputs(path, instructions, part=limit is not None)
    judge = _judge(arguments, recipe)
    if arguments.dry_run:
        return _forecast(arguments.out, points, instructions, judge)
    with Run.open(arguments.out, recipe.to_toml()) as run:
        answered = _answer(run, recipe, points, source, instructions)
        if judge is None:
            return "\n".join(str(point.outputs) for point in answered)
        _judge_and_draw(run, recipe, arguments, judge, answered, instructions)
    folder = arguments.out / "figure"
    return f"{(folder / 'table.md').read_text(encoding='utf-8')}\n{folder / 'fig5.svg'}"


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that do not go together."""
    if arguments.instructions is None and arguments.reference is None:
        raise ValueError("no instructions: give --instructions FILE, or --reference FILE whose rows hold them")
    url, judged = arguments.judge_url, arguments.judge_url or arguments.judge_model or arguments.annotator
    if judged and arguments.reference is None:
        raise ValueError("a judge compares with a reference: give --reference FILE")
    if url is None and arguments.api_key_env is not None:
        raise ValueError("--api-key-env goes with --judge-url; without it alpaca_eval reads OPENAI_API_KEY itself")
    if arguments.api_key_env is not None and not os.environ.get(arguments.api_key_env, "").strip():
        raise ValueError(f"--api-key-env {arguments.api_key_env}: that environment variable is not set")
    if url is not None and not re.match(r"https?://[^/]", url):
        raise ValueError(
            f"--judge-url {without_credentials(url)}: give the base of a server, such as http://127.0.0.1:8000/v1"
        )
    if url is not None and not (arguments.judge_model or arguments.annotator):
        raise ValueError("--judge-url needs --judge-model, the judge's name on that server")
    if (arguments.limit is not None and arguments.limit < 1) or arguments.workers < 1:
        raise ValueError("--limit and --workers must be above 0")


def _judge(arguments: argparse.Namespace, recipe: Recipe) -> Judge | None:
    if not (arguments.judge_url or arguments.judge_model or arguments.annotator):
        return None
    return Judge(
        arguments.out / "judgements",
        annotator=arguments.annotator or OFFICIAL,
        model=arguments.judge_model,
        url=arguments.judge_url,
        key=None if arguments.api_key_env is None else (take_secret(arguments.api_key_env) or "").strip(),
        extra=arguments.judge_extra,
        workers=arguments.workers,
        seed=recipe.seed,
    )


def _forecast(out: Path, points: Sequence[Point], instructions: Sequence[str], judge: Judge | None) -> str:
    """The answers that are left to sample, and the largest number of judgements."""
    lines = []
    for point in points:
        done = point.outputs is not None or (out / f"outputs-{point.slug}" / OUTPUTS).is_file()
        lines.append(f"{point.name}: {'answers exist' if done else f'{len(instructions)} answers to sample'}")
    if judge is not None:
        lines.append(f"judge {judge.name}: at most {len(points) * len(instructions)} requests, less those kept")
    return "\n".join(lines)


# Systems


def points_of(arguments: argparse.Namespace) -> list[Point]:
    """Every system of the command line at each of its directions; a system's points from the highest angle down.

    Raises:
        ValueError: no system, two of one name, or directions that a policy cannot take.
    """
    lines: dict[str, list[str]] = {}
    for word in arguments.line:
        name, equals, line = word.partition("=")
        if not name or not equals:
            raise ValueError(f"--line {word}: give NAME=TEXT, the policy's name and the line")
        lines.setdefault(name, []).append(line)
    points = []
    for word in arguments.policies:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            name, folder = "", word
        policy = checkpoint_of(Path(folder))
        model = Path(policy.source)
        if not model.is_dir():
            raise ValueError(f"{model}: no such folder; a policy is a local checkpoint (fetch one of the hub's first)")
        name = name or (model.parent if model.name == "model" else model.resolve()).name
        points += _policy_points(name, policy, arguments, lines.get(name, ()))
    if unused := set(lines) - {point.system for point in points}:
        raise ValueError(f"--line {min(unused)}=...: no POLICY is called {min(unused)!r}; name one NAME=FOLDER")
    if (arguments.angles or arguments.weights) and not any(point.weights for point in points):
        raise ValueError("--angles and --weights: no POLICY here takes directions (it needs its dpa.json beside it)")
    points += [_existing_point(word) for word in arguments.outputs]
    points += [point for folder in arguments.outputs_from for point in _earlier_points(folder)]
    if not points:
        raise ValueError("no systems: name a POLICY, or answers with --outputs or --outputs-from")
    slugs = [point.slug for point in points]
    if not all(slugs):
        raise ValueError(f"{points[slugs.index('')].name!r}: no name for a system; use letters and digits")
    if twice := [point.name for point in points if slugs.count(point.slug) > 1]:
        raise ValueError(f"two systems of one name: {twice[0]!r} and {twice[1]!r}; give each its own")
    systems = [point.system for point in points]
    return sorted(points, key=lambda point: (systems.index(point.system), -(point.angle or 0.0)))


def _policy_points(name: str, policy: Checkpoint, arguments: argparse.Namespace, lines: Sequence[str]) -> list[Point]:
    contract = read_contract(Path(policy.source))
    if contract is None or lines:
        if len(lines) > 1:
            return [Point(name, f"line-{i}", line, policy=policy) for i, line in enumerate(lines, start=1)]
        return [Point(name, line=lines[0] if lines else None, policy=policy)]
    points = []
    try:
        for label, preference in _directions(contract, arguments.angles, arguments.weights):
            angle = round(preference.angle, 6) + 0.0 if len(preference.v) == 2 else None
            line = render_preference(preference, contract.template, contract.levels)
            points.append(Point(name, label, line, preference.weights, angle, policy))
    except ValueError as error:
        raise ValueError(f"{policy.source}: {error}") from error
    return points


def _directions(
    contract: Contract, angles: Sequence[float], weights: Sequence[Sequence[float]]
) -> list[tuple[str, Preference]]:
    """(label, direction) of the command line, or even steps over the trained arc."""
    names = contract.names
    if not angles and not weights:
        if contract.arc is None or len(names) != 2:
            raise ValueError(f"its directions are of {', '.join(names)} and of no arc; give them with --weights")
        grid_VK = evaluation_grid(Arc(*contract.arc), EVEN_STEPS)
        angles = [round(Preference.from_vector(v_K, names).angle, 6) + 0.0 for v_K in grid_VK.tolist()]
    directions = [(f"{angle:g}", Preference.from_angle(angle, names)) for angle in angles]
    return directions + [(",".join(f"{w:g}" for w in v_K), Preference.from_vector(v_K, names)) for v_K in weights]


def _existing_point(word: str) -> Point:
    """NAME=FILE, or NAME@LABEL=FILE for a point of a curve."""
    name, _, file = word.partition("=")
    system, _, label = name.partition("@")
    if not system or not file:
        raise ValueError(f"--outputs {word}: give NAME=FILE, or NAME@LABEL=FILE for a point of a curve")
    angle = None
    with contextlib.suppress(ValueError):
        angle = float(label)
    return Point(system, label, angle=angle, outputs=Path(file))


def _earlier_points(out: Path) -> list[Point]:
    """All finished answers of an earlier command."""
    folders = [path for path in sorted(out.glob("outputs-*")) if not path.suffix and (path / SYSTEM).is_file()]
    if not folders:
        raise ValueError(f"--outputs-from {out}: no finished answers here (outputs-*/{OUTPUTS})")
    systems = [json.loads((folder / SYSTEM).read_text(encoding="utf-8"))["point"] for folder in folders]
    return [Point(**point, outputs=folder / OUTPUTS) for point, folder in zip(systems, folders, strict=True)]


# The benchmark's files: rows of {"instruction", "output", "generator"}, JSON or JSON lines, in the benchmark's order


def read_instructions(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` rows of the column `instruction`.

    Raises:
        ValueError: no rows, fewer than `limit`, or an empty instruction.
    """
    instructions = [row.text("instruction") for row in read_source(str(path))]
    if not instructions or not all(text.strip() for text in instructions):
        raise ValueError(f"{path}: no instructions, or an empty one; there is nothing to answer")
    if limit is not None and limit > len(instructions):
        raise ValueError(f"{path}: {len(instructions)} instructions; --limit {limit} is more")
    return instructions[:limit]


def read_outputs(path: Path, instructions: Sequence[str], *, part: bool = False) -> list[str]:
    """A system's answers to exactly these instructions. An empty answer is allowed; a missing one is an error.

    Args:
        part: the instructions are only the benchmark's first, so the file may have more rows.

    Raises:
        ValueError: the number of rows differs, an instruction differs (names its index and both texts), an answer is
            no text, or all answers are empty.
    """
    rows = list(read_source(str(path)))
    for i, (row, wanted) in enumerate(zip(rows, instructions, strict=False)):
        if (text := row.text("instruction")) != wanted:
            raise ValueError(
                f"{path}: the instruction at index {i} is {shorten(repr(text), 120)}, and the benchmark's is "
                f"{shorten(repr(wanted), 120)}; instructions must be the benchmark's, letter by letter and in order"
            )
    if len(rows) < len(instructions) or (len(rows) > len(instructions) and not part):
        raise ValueError(f"{path}: {len(rows)} rows for {len(instructions)} instructions (--limit N takes the first N)")
    texts = [row.text("output") for row in rows[: len(instructions)]]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path}: all {len(texts)} outputs are empty; was the model sampled at all?")
    return texts


# Answers


def _answer(
    run: Run, recipe: Recipe, points: Sequence[Point], source: Path, instructions: Sequence[str]
) -> list[Point]:
    """The points with their answers: one stage per direction of a policy, resumed by shard."""
    knobs = {
        "seed": recipe.seed,
        "threads": recipe.threads,
        "temperature": recipe.evaluation.temperature,
        "max_new_tokens": recipe.sampling.max_new_tokens,
        "rows": recipe.sampling.rows,
        "shard": recipe.sampling.shard,
        "dtype": recipe.model.dtype,
        "chat": recipe.model.chat,
        **{f"chat_kwargs.{name}": value for name, value in recipe.model.chat_kwargs.items()},
        "engine": recipe.engines.sampling,
        "tensor_parallel": recipe.engines.tensor_parallel,
        "instructions": len(instructions),
    }
    answered, engine, engines_policy = [], None, None
    for point in points:
        if point.policy is None:
            answered.append(point)
            continue
        inputs = {"policy": Path(point.policy.source).resolve(), "instructions": source.resolve()}
        own = {"line": point.line} | ({} if point.policy.style == "own" else {"prompt": point.policy.style})
        with run.stage(f"outputs-{point.slug}", VERSION, inputs, knobs | own) as work:
            if not work.done:
                if engines_policy != point.policy:
                    engine = None  # frees its memory before the next model loads
                    settle_threads(recipe.threads, for_torch=True)
                    with installed():
                        engine, engines_policy = open_engine(recipe, point.policy, alone=True), point.policy
                _sample(work, recipe, engine, point, instructions)
        answered.append(replace(point, outputs=work.folder / OUTPUTS))
    return answered


def _sample(work: Work, recipe: Recipe, engine: Any, point: Point, instructions: Sequence[str]) -> None:
    """Sample one answer to each instruction, by shard; then write the file in AlpacaEval's form."""
    size, weights = recipe.sampling.shard, tuple((point.weights or {}).values())
    condition = Condition("plain" if point.weights is None else "direction", weights, point.line)
    for shard in work.shards(-(-len(instructions) // size), "answers/part-{:05d}.parquet"):
        part = [user_prompt(text) for text in instructions[shard.index * size : (shard.index + 1) * size]]
        rows = draw(
            engine,
            recipe,
            [({"prompt_id": prompt_id(messages), "messages": messages}, [condition]) for messages in part],
            1,
            recipe.evaluation.temperature,
            key=(recipe.seed, "alpaca-eval", point.line or ""),
            t=0,
            tally=shard.tally,
        )
        write_rows(shard.path, rows, CANDIDATES)
    answers = read_table(work.folder / "answers", CANDIDATES, ["response", "finished"])
    texts: list[str] = answers["response"].to_pylist()
    pairs = zip(instructions, texts, strict=True)
    write_json(work.folder / OUTPUTS, [{"instruction": i, "output": o, "generator": point.name} for i, o in pairs])
    own = {name: getattr(point, name) for name in ("system", "label", "line", "weights", "angle")}
    empty = sum(not text.strip() for text in texts)
    cut = answers["finished"].to_pylist().count(False) - empty
    write_json(work.folder / SYSTEM, {"point": own, "answers": len(texts), "cut": cut, "empty": empty})
    if cut or empty:
        work.run.log(f"{point.name}: {cut} answers were cut at max_new_tokens, {empty} are empty")


# Fig. 5


def _judge_and_draw(
    run: Run,
    recipe: Recipe,
    arguments: argparse.Namespace,
    judge: Judge,
    points: Sequence[Point],
    instructions: Sequence[str],
) -> None:
    """Judge every point and write OUT/figure."""
    from dpalign.page.alpaca import write_figure

    part, bootstrap = arguments.limit is not None, Bootstrap(recipe.seed, recipe.evaluation.bootstrap)
    reference = read_outputs(arguments.reference, instructions, part=part)
    generator = str(next(read_source(str(arguments.reference))).values.get("generator", arguments.reference.stem))
    judged = []
    for point in points:
        assert point.outputs is not None
        texts = read_outputs(point.outputs, instructions, part=part)
        pairs = [Pair(*row) for row in zip(instructions, reference, texts, strict=True)]
        preference_P = judge.preferences(point.name, point.slug, pairs, run.log, retry_failed=arguments.retry_failed)
        metrics = win_rates(pairs, preference_P, (generator, point.name), arguments.difficulty)
        length_P = np.array([len(text) for text in texts], dtype=np.float64)
        judged.append(Judged(point.system, point.label, point.angle, preference_P, length_P, metrics))
    summary = AlpacaSummary(
        points=tuple(figures_of(point, bootstrap) for point in judged),
        differences=differences_of(judged, bootstrap),
        judge={"name": judge.name, **judge.identity},
        reference={
            "generator": generator,
            "length": sum(map(len, reference)) / len(reference),
            "instructions": len(instructions),
            "sha256": sha256_of(arguments.reference),
        },
        intervals=asdict(bootstrap),
        paper=FIG_5 if arguments.paper else None,
    )
    write_figure(run.folder / "figure", summary)


# Values of the command line


def _numbers(text: str) -> tuple[float, ...]:
    numbers: tuple[float, ...] = ()
    with contextlib.suppress(ValueError):
        numbers = tuple(float(word) for word in text.split(","))
    if not numbers or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of finite numbers, such as 0,-15,-30")
    return numbers


def _object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
