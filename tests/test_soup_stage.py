"""The evaluation of soups on tiny experts in the world: a mixture a direction, as if one policy were steered."""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import MICRO
from dpalign.engines.engine import Request
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.pipeline.runner import take as take_step
from dpalign.recipe import Recipe, changed, load
from dpalign.rewards.score import FunctionScorer
from dpalign.rows import CANDIDATES, HEADS, PROMPTS, SCORES, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from dpalign.stages import shards
from dpalign.stages import soup as soups
from dpalign.stages.sample import open_engine
from dpalign.stages.score import scored_rows
from dpalign.stages.stage import Job, Step
from dpalign.train import soups as mixing
from dpalign.train.soups import mix
from dpalign.world.language import Task, say_prompt

RECIPE = load(
    MICRO,
    [
        *("--rewards.true.function", "dpalign.world.truth:score", "--rewards.true.heads", json.dumps(HEADS)),
        *("--rewards.true.scale", "[1, 0]", "--data.judge", "0", "--sampling.shard", "2"),
        *("--sampling.max_new_tokens", "16", "--evaluation.directions", "3"),
    ],
)
"""Three directions (0, -22.5 and -45 degrees), two answers each, two prompts a shard."""

ASKED = [user_prompt(say_prompt(Task("name", things))) for things in (("fox",), ("tea", "owl"), ("salt", "iron"))]
LONG = user_prompt(say_prompt(Task("explain", ("fox", "tea", "owl", "oak", "salt", "iron", "wolf", "moon"))) * 9)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, tokens = tmp_path_factory.mktemp("experts"), tiny.tokenizer()
    return [tiny.write_model(folder / f"expert-{e}", tokens, seed=e, scale=0.5) for e in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three validation prompts, one that is too long, and one of another split."""
    folder = tmp_path_factory.mktemp("data")
    splits = [*((p, "validation") for p in [*ASKED, LONG]), (user_prompt("name moon."), "D1")]
    rows = [{"prompt_id": prompt_id(p), "messages": p, "split": split} for p, split in splits]
    write_rows(folder / "prompts" / "part-00000.parquet", rows, PROMPTS)
    return folder


def take(run: Path, inputs: Mapping[str, Path], recipe: Recipe = RECIPE) -> Path:
    with Run.open(run, None, {}) as opened:
        take_step(recipe, opened, Step("soup", soups.soup, inputs))
    return run / "soup"


@pytest.fixture(scope="module")
def inputs(data: Path, experts: Sequence[Path]) -> dict[str, Path]:
    return {"data": data, "reward": data, "expert-1": experts[0], "expert-2": experts[1]}


@pytest.fixture(scope="module")
def soup(inputs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished one; read it, do not write into it."""
    return take(tmp_path_factory.mktemp("run"), inputs)


def outputs(folder: Path) -> Mapping[str, str]:
    return read_ledger(folder)["outputs"]


def test_its_answers_are_those_of_a_steered_system(soup: Path) -> None:
    """By prompt, then direction, then sample; two prompts in the first shard and one in the second."""
    rows = list(read_rows(soup / "answers", CANDIDATES))
    order = [(prompt_id(p), v, sample) for p in ASKED for v in range(3) for sample in range(2)]
    assert [(row["prompt_id"], row["condition_index"], row["sample"]) for row in rows] == order
    files = [f"{part}/part-0000{shard}.parquet" for part in ("answers", "scores", "truth") for shard in (0, 1)]
    assert set(outputs(soup)) == {*files, "soup.json"}
    assert len(list(read_rows(soup / "answers" / "part-00001.parquet", CANDIDATES))) == 6
    assert {row["condition_kind"] for row in rows} == {"direction"}
    assert [row["messages"] for row in rows[::6]] == ASKED  # no system line: the weights carry the direction
    for part in ("scores", "truth"):
        scored = list(read_rows(soup / part, SCORES))
        assert [(row["prompt_id"], row["condition_index"], row["sample"]) for row in scored] == order
    rewards, truth = ([row["rewards"] for row in read_rows(soup / part, SCORES)] for part in ("scores", "truth"))
    assert rewards == truth  # the scorer here is the truth
    directions = [row["condition"] for row in rows[:6:2]]
    np.testing.assert_allclose(directions, [[1, 0], [0.92388, -0.38268], [0.70711, -0.70711]], atol=1e-5)


def test_each_answer_is_drawn_plainly_from_its_directions_mixture(
    soup: Path, experts: Sequence[Path], tmp_path: Path
) -> None:
    """Mixed by hand at the weights of each direction between (1, 0) and (0, -1), and scored by hand."""
    rows = list(read_rows(soup / "answers", CANDIDATES))
    scores = list(read_rows(soup / "scores", SCORES))
    for v, w in enumerate((1.0, 0.7071067811865475, 0.5)):  # 0.92388 / (0.92388 + 0.38268) is the root of a half
        mix(experts, (w, 1 - w), tmp_path / f"mixture-{v}")
        engine = TransformersEngine(str(tmp_path / f"mixture-{v}"), rows=64)
        requests = [Request(tuple(p), 2, (RECIPE.seed, "evaluate", prompt_id(p), v)) for p in ASKED]
        settings = {"temperature": RECIPE.evaluation.temperature, "max_new_tokens": 16}
        drawn = [*engine.sample(requests[:2], **settings), *engine.sample(requests[2:], **settings)]  # by shard
        expected = [(a.text, a.tokens, a.finished) for answers in drawn for a in answers]
        told = [(r["response"], r["tokens"], r["finished"]) for r in rows if r["condition_index"] == v]
        assert told == expected
    scorer = FunctionScorer("dpalign.world.truth:score", HEADS)
    assert [row["rewards"] for row in scores] == [row["rewards"] for row in scored_rows(scorer, rows)]
    assert len({row["response"] for row in rows}) > 9


def test_beside_its_answers_it_keeps_what_it_counted_its_mixtures_and_what_they_take(
    soup: Path, experts: Sequence[Path]
) -> None:
    """Three prompts, three directions, two answers; one prompt is too long. No mixture and no waiting answers stay."""
    ledger, figures = read_ledger(soup), json.loads((soup / "soup.json").read_text())
    rows = list(read_rows(soup / "answers", CANDIDATES))
    assert ledger["counts"] == {"in": 19, "out": 18, "filtered": {"prompt too long": 1}}
    assert ledger["tokens"] == {"sampled": sum(row["tokens"] for row in rows), "scored": 18, "trained": 0}
    assert figures["experts"] == [[1.0, 0.0], [0.0, -1.0]]
    weights, directions = ([mixture[key] for mixture in figures["mixtures"]] for key in ("weights", "direction"))
    np.testing.assert_allclose(weights, [[1, 0], [0.70711, 0.29289], [0.5, 0.5]], atol=1e-5)
    np.testing.assert_allclose(directions, [[1, 0], [0.92388, -0.38268], [0.70711, -0.70711]], atol=1e-5)
    one = len(tiny.weights(experts[0]))
    assert figures["bytes"] == {"experts": 2 * one, "one_model": one}
    seconds = json.loads((soup / "times.json").read_text())["switch_seconds"]
    assert list(seconds) == ["0", "1", "2"]
    assert all(0 < taken < 60 for taken in seconds.values())
    assert "times.json" not in outputs(soup)  # which are fingerprinted
    kept = {"answers", "scores", "truth", "soup.json", "times.json", "ledger.json"}
    assert {path.name for path in soup.iterdir()} == kept


class Stopped(Exception):
    pass


def stop_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises when it is called for the `call`-th time."""
    calls = 0

    def stopping(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return function(*given, **named)

    return stopping


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mix", 1),  # before the first mixture stands
        ("write_rows", 4),  # within the second direction, the first of whose two shards is drawn
        ("open_engine", 3),  # a mixture stands, and nothing is drawn from it yet
        ("with_scores", 2),  # all is drawn, and the first shard of two is scored
    ],
)
def test_stopped_and_gone_on_with_it_ends_in_the_same_bytes(
    soup: Path, inputs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    with monkeypatch.context() as patched:
        module = {"mix": mixing, "write_rows": shards}.get(name, soups)
        patched.setattr(module, name, stop_at(call, getattr(module, name)))
        with pytest.raises(Stopped):
            take(tmp_path, inputs)
    assert (tmp_path / "soup.partial").is_dir()
    again = take(tmp_path, inputs)
    assert outputs(again) == outputs(soup)
    assert read_ledger(again)["counts"] == read_ledger(soup)["counts"]
    assert read_ledger(again)["tokens"] == read_ledger(soup)["tokens"]


def test_a_lost_last_shard_is_made_again_to_the_same_bytes(
    soup: Path, inputs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once of answers that still wait to be scored: nothing is drawn again; once of answers that are lost too."""
    with monkeypatch.context() as patched:
        patched.setattr(soups, "with_scores", stop_at(2, soups.with_scores))
        with pytest.raises(Stopped):
            take(tmp_path, inputs)
    partial = tmp_path / "soup.partial"
    kept = Path(shutil.copytree(tmp_path, tmp_path.with_name("kept")))
    (partial / "answers" / "part-00000.parquet").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(mixing, "mix", stop_at(1, mix))
        assert outputs(take(tmp_path, inputs)) == outputs(soup)
    for second in (1, 3, 5):  # of two shards for each direction
        (kept / "soup.partial" / "resume" / f"drawn-0000{second}.parquet").unlink()
    again = take(kept, inputs)
    assert outputs(again) == outputs(soup)
    assert read_ledger(again)["tokens"] == read_ledger(soup)["tokens"]


def test_one_mixture_at_a_time_is_on_the_disk_and_in_memory(
    inputs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the next is mixed, the last one's files are deleted and its model is gone."""
    weights: list[list[str]] = []
    models: list[weakref.ref[Any]] = []
    living: list[int] = []

    def looking(experts: Sequence[Path], w_E: Any, output: Path) -> None:
        weights.append([path.name for path in output.parent.rglob("*.safetensors")])
        living.append(sum(model() is not None for model in models))
        mix(experts, w_E, output)

    def remembering(recipe: Recipe, folder: str, *, alone: bool) -> Any:
        engine: Any = open_engine(recipe, folder, alone=alone)
        models.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr(mixing, "mix", looking)
    monkeypatch.setattr(soups, "open_engine", remembering)
    take(tmp_path, inputs)
    assert weights == [[], [], []]
    assert living == [0, 0, 0]


def test_a_judge_scores_the_same_answers(
    soup: Path, inputs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpalign.stages import evaluate as stages

    judge = FunctionScorer("dpalign.world.truth:score", HEADS)
    monkeypatch.setattr(stages, "judge_scorer", lambda recipe, stage, annotate: judge)
    judged = take(tmp_path, {**inputs, "judge": inputs["data"]})
    same = {file: sha for file, sha in outputs(judged).items() if not file.startswith("judged/")}
    assert same == outputs(soup)
    assert {file for file in outputs(judged) if file not in same} == {
        *("judged/part-00000.parquet", "judged/part-00001.parquet"),
    }
    assert read_ledger(judged)["tokens"]["scored"] == 36


@pytest.mark.parametrize(
    ("directions", "other", "parts"),
    [
        ([[1.0, 0.0], [0.8, -0.6], [0.0, -1.0]], "expert-2", ["soups.experts has 3", "expert-3", "expert-1, expert-2"]),
        ([[1.0, 0.0], [0.0, -1.0]], "expert-brief", ["soups.experts has 2", "expert-1, expert-brief"]),
        ([[1.0, 0.0], [0.9397, -0.3420]], "expert-2", ["direction (0.9239, -0.3827)", "(1, 0), (0.9397, -0.342)"]),
    ],
)
def test_experts_that_do_not_fit_their_directions_are_refused_before_anything_is_drawn(
    inputs: dict[str, Path], tmp_path: Path, directions: list[list[float]], other: str, parts: list[str]
) -> None:
    """One too few, one without a number, and two at 0 and -20 degrees, which cannot answer at -22.5."""
    inputs = {other if name == "expert-2" else name: path for name, path in inputs.items()}
    with pytest.raises(ValueError, match=r".") as error:
        take(tmp_path, inputs, changed(RECIPE, {"soups.experts": directions}))
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)
    assert not list((tmp_path / "soup.partial").rglob("*.parquet"))


def test_ten_experts_stand_in_the_order_of_their_numbers(inputs: dict[str, Path], tmp_path: Path) -> None:
    """As text expert-10 would come before expert-2."""
    many = [[1.0, -float(e)] for e in range(10)]
    recipe = changed(RECIPE, {"soups.experts": many})
    given = {f"expert-{e}": Path(shutil.copytree(inputs["expert-1"], tmp_path / f"e{e}")) for e in range(1, 11)}
    work: Any = None
    job = Job(recipe, work, dict(sorted(given.items())))
    assert [path.name for path in soups.experts_of(job)] == [f"e{e}" for e in range(1, 11)]


def test_it_runs_alone_on_files(
    soup: Path, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpalign import cli

    own = {name: path for name, path in inputs.items() if not name.startswith("expert")}
    words = [word for name, path in own.items() for word in (f"--{name}", str(path))]
    words += [word for e in (1, 2) for word in ("--expert", f"{e}={inputs[f'expert-{e}']}")]
    knobs = ["--rewards.true.function", "dpalign.world.truth:score", "--rewards.true.heads", json.dumps(HEADS)]
    knobs += ["--rewards.true.scale", "[1, 0]", "--data.judge", "0", "--sampling.shard", "2"]
    knobs += ["--sampling.max_new_tokens", "16", "--evaluation.directions", "3"]
    cli.main(["soup", str(MICRO), "--out", str(tmp_path / "soup"), *words, *knobs])
    assert capsys.readouterr().out == f"{tmp_path / 'soup'}\n"
    assert outputs(tmp_path / "soup") == outputs(soup)
