"""Shards made by the actors of a local Ray: the same bytes as in one process, whatever dies on the way."""

import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ray_work
import tiny
from conftest import MICRO, running, wait_until
from dpalign import recipe
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES
from dpalign.rows import CANDIDATES, HEADS, PROMPTS, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs import folder as runs
from dpalign.runs.knobs import Cluster
from dpalign.runs.ledger import read_ledger
from dpalign.runs.shards import Attempts, ShardActor, joined, reconcile, require_cluster_room
from dpalign.stages.stage import Job, Step
from dpalign.world.language import THINGS
from test_scoring import write_classifier

SMALL = [
    *("--sampling.n", "2", "--sampling.shard", "2", "--sampling.prompts", "0", "--sampling.max_new_tokens", "12"),
    *("--preference.directions", "2", "--launcher", "inprocess", "--cluster.actors", "2"),
]
RAY = ["--cluster.address", "local"]
SHARDS = 12


def write_prompts(folder: Path, texts: list[str]) -> Path:
    rows = [{"prompt_id": prompt_id(user_prompt(t)), "messages": user_prompt(t), "split": "D1"} for t in texts]
    write_rows(folder / "prompts" / "part-00000.parquet", rows, PROMPTS)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of two prompts."""
    pairs = itertools.islice(itertools.combinations(THINGS, 2), 2 * SHARDS)
    return write_prompts(tmp_path_factory.mktemp("data"), [f"explain {one} and {other}." for one, other in pairs])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_folder: Path) -> Path:
    """The sampling stage as one process does it."""
    inputs = {"policy": tiny_folder, "data": data}
    return ray_work.take(tmp_path_factory.mktemp("alone"), recipe.load(MICRO, SMALL), "sample", inputs)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """A Ray that the tests share: what finds one running does not start its own."""
    import ray

    tests = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [before])])
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    os.environ["PYTHONPATH"] = before


def told(stage: Path) -> dict[str, Any]:
    """What a ledger says of a stage's work, its times apart."""
    ledger = read_ledger(stage)
    return {key: ledger[key] for key in ("outputs", "digest", "counts", "tokens", "fingerprint")}  # type: ignore[literal-required]


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_an_actor_and_then_the_driver_are_killed_and_every_row_is_there_once_with_the_same_bytes(
    tmp_path: Path, data: Path, tiny_folder: Path, alone: Path
) -> None:
    watch, run = tmp_path / "watch", tmp_path / "run"
    watch.mkdir()
    script = Path(__file__).parent / "ray_work.py"
    command = [sys.executable, script, run, MICRO, tiny_folder, data, "watched", *SMALL, *RAY]
    paths = [str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = os.environ | {"WATCH": str(watch), "PYTHONPATH": os.pathsep.join(paths)}
    partial = run / "sample-2.partial"

    def made() -> set[str]:
        return {path.name for path in partial.glob(".stage/tallies/*.json")}

    with (tmp_path / "driver.txt").open("w") as screen:
        driver = subprocess.Popen(command, env=surroundings, stdout=screen, stderr=screen)
        try:
            wait_until(lambda: len(made()) >= 2, seconds=280)
            actors = {int(path.read_text()) for path in watch.iterdir()}
            assert len(actors) == 2
            victim = int(max(watch.iterdir(), key=lambda path: path.stat().st_mtime).read_text())
            os.kill(victim, signal.SIGKILL)
            before = len(made())
            wait_until(lambda: len(made()) >= before + 3, seconds=280)
            actors |= {int(path.read_text()) for path in watch.iterdir()}
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    kept = made()
    assert 5 <= len(kept) < SHARDS
    wait_until(lambda: not any(map(running, actors)))  # they do not outlive their driver
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.parquet")}

    again = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "goes on from where it was stopped" in again.stderr
    assert told(run / "sample-2") == told(alone)
    assert told(alone)["counts"] == {"in": SHARDS * 2 * 4, "out": SHARDS * 2 * 4, "filtered": {}}
    for name in kept:
        shard = name.removesuffix(".json")
        assert (run / "sample-2" / shard).stat().st_mtime_ns == times[shard]


@pytest.mark.ray
def test_scores_and_evaluations_come_out_the_same_as_in_one_process(
    tmp_path: Path, data: Path, tiny_folder: Path, local_ray: Any
) -> None:
    data = Path(shutil.copytree(data, tmp_path / "data"))
    held = [row | {"split": "validation"} for row in itertools.islice(read_rows(data / "prompts", PROMPTS), 5)]
    write_rows(data / "prompts" / "part-00001.parquet", held, PROMPTS)
    reward = write_classifier(tiny_folder, tmp_path / "reward", num_labels=10, id2label=dict(enumerate(HEADS)))
    experts = {f"expert-{e}": tiny.write_model(tmp_path / f"e{e}", tiny.tokenizer(), seed=e) for e in (1, 2)}
    asked = {"policy": tiny_folder, "data": data, "reward": reward}
    steps = (
        Step("sample", STAGES["sample"], {"policy": tiny_folder, "data": data}, 1, "D1", "plain"),
        Step("score", STAGES["score"], {"reward": reward, "candidates": "sample", "data": data}, 1),
        Step("best", STAGES["best_of_n"], asked, 1, "", "best-of-n"),
        Step("dial", STAGES["evaluate"], asked, 1, "", "directions"),
        Step("beyond", STAGES["feasibility"], asked, 1, "", "directions"),
        Step("soup", STAGES["soup"], {"data": data, "reward": reward, **experts}),
    )
    shards = {}
    for where, words in (("here", []), ("there", RAY)):
        read = recipe.load(MICRO, [*SMALL, "--evaluation.directions", "3", *words])
        with runs.Run.open(tmp_path / where, None, {}) as run:
            for step in steps:
                runner.take(read, run, step)
        shards[where] = {step.name: told(tmp_path / where / step.name) for step in steps}
    assert shards["there"] == shards["here"]
    for name, beside in (("dial", set()), ("beyond", {"feasibility.json"}), ("soup", {"soup.json"})):
        folders = {file.split("/")[0] for file in shards["there"][name]["outputs"]}
        assert folders == {"answers", "scores", "truth"} | beside
    times = json.loads((tmp_path / "there" / "soup" / "times.json").read_text())
    assert set(times["switch_seconds"]) == {"0", "1", "2"}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("deadly", r"(part-0000\d\.parquet): prompt \w{16} \('poison\.'\): its process died at it; begun 2 times"),
        (
            "raising",
            r"(part-0000\d\.parquet): prompt \w{16} \('poison\.'\): RuntimeError: index out of range; begun 2 times",
        ),
        ("unopened", r"3 of 3 shards failed, .* part-00000\.parquet: OSError: no weights here"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_and_the_other_shards_are_kept(
    tmp_path: Path, tiny_folder: Path, local_ray: Any, function: str, message: str
) -> None:
    texts = ["explain owl.", "explain tea.", "poison.", "name tea.", "name fox.", "name owl."]  # two a shard
    data = write_prompts(tmp_path / "data", texts)
    read = recipe.load(MICRO, [*SMALL, *RAY, "--cluster.retries", "0"])
    with pytest.raises(ValueError, match=message) as caught:
        ray_work.take(tmp_path / "run", read, function, {"policy": tiny_folder, "data": data})
    kept = {path.name for path in (tmp_path / "run" / "sample-2.partial").glob("*.parquet")}
    assert len(kept) == (0 if function == "unopened" else 2)
    assert not any(name in str(caught.value) for name in kept)
    warned = (tmp_path / "run" / "log.txt").read_text().count("sample-2: each prompt is read anew")
    assert warned == (function == "raising")


def test_a_shard_that_is_lost_or_altered_is_found(tmp_path: Path, alone: Path, data: Path, tiny_folder: Path) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / "copy"))
    work = ray_work.planned(recipe.load(MICRO, SMALL), folder, {"policy": tiny_folder, "data": data})
    reconcile(folder, work)
    second = folder / "part-00001.parquet"
    whole = list(read_rows(second, CANDIDATES))
    assert len(whole) == 8  # two prompts, two directions, two answers
    lost = f"prompt {whole[3]['prompt_id']}, condition 1, sample 1"
    for rows, said in (
        (whole[:3] + whole[4:], f"1 answers are lost and 0 too many, the first of {lost}"),
        ([*whole, whole[3]], f"0 answers are lost and 1 too many, the first of {lost}"),
        (whole[::-1], "its answers stand in another order"),
    ):
        write_rows(second, rows, CANDIDATES)
        with pytest.raises(ValueError, match=f"part-00001.parquet: {said}"):
            reconcile(folder, work)
    second.unlink()
    with pytest.raises(ValueError, match=r"part-00001\.parquet: this shard is lost; run again to make it"):
        reconcile(folder, work)
    assert pq.read_schema(folder / "part-00000.parquet").names == CANDIDATES.names


def test_a_shard_that_kills_its_process_is_told_from_one_that_was_killed_once() -> None:
    attempts = Attempts(actors=2, retries=1)
    assert attempts.begin(7) == (1, "", "")
    attempts.fail(7, "OSError: disk full")
    assert attempts.begin(7) == (2, "", "OSError: disk full")
    assert attempts.begin(7) == (3, "", "")  # it died again, without an error
    attempts.try_prompt(7, "owl")
    assert attempts.begin(7) == (4, "owl", "")
    assert attempts.begin(8) == (1, "", "")


@pytest.mark.parametrize("function", ["drawing", "closed"])
def test_an_actor_leaves_no_file_behind_whether_its_engine_opens_or_not(
    tmp_path: Path, data: Path, tiny_folder: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    monkeypatch.setattr("dpalign.runs.shards.settle_threads", lambda *_, **__: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counted = Attempts(actors=1, retries=0)
    attempts = SimpleNamespace(
        **{name: SimpleNamespace(remote=getattr(counted, name)) for name in ("start_process", "begin", "finish")}
    )
    work: Any = None  # as the driver sends it
    step, inputs = ray_work.STEP, {"policy": tiny_folder, "data": data}
    job = Job(recipe.load(MICRO, SMALL), work, inputs, step.t, step.half, step.condition)
    actor = ShardActor(job, step.name, getattr(ray_work, function), attempts)
    made = [actor(pa.table({"shard": [index]})).to_pylist()[0] for index in (1, 2)]
    logging.getLogger("dpalign").removeHandler(actor.warnings)
    assert [row["files"] for row in made] == (
        [[], []] if function == "closed" else [["part-00001.parquet"], ["part-00002.parquet"]]
    )
    for row in made:
        assert row["contents"] == [(alone / file).read_bytes() for file in row["files"]]
    assert list(tmp_path.iterdir()) == []


def test_actors_that_die_without_end_are_stopped_unless_work_gets_done() -> None:
    attempts = Attempts(actors=1, retries=0)
    assert [attempts.start_process() for _ in range(4)] == [""] * 4  # once, and for each attempt at a shard that kills
    assert "died 4 times" in attempts.start_process()
    attempts.finish(0)
    assert attempts.start_process() == ""


@pytest.mark.parametrize(
    ("machines", "gpus", "actors", "told"),
    [
        ([(8.0, 1.0)] * 4, 1.0, 5, r"5 actors of 1 CPU and 1 GPU each .* hold 4;"),
        ([(8.0, 1.0)] * 8, 2.0, 4, r"4 actors of 1 CPU and 2 GPU each .* \(8 CPU, 1 GPU; .* hold 0;"),
        ([(8.0, 0.0)], 0.5, 2, r"\(8 CPU, 0 GPU\), .* hold 0; .* cluster.gpus"),
        ([(4.0, 0.0)], 0.0, 3, r"3 actors .* 1 of the cluster's 4 CPUs"),
        ([(8.0, 1.0)] * 2, 0.0, 2, r"cluster.gpus is 0, .* 2 GPUs"),
    ],
)
def test_actors_that_do_not_fit_the_cluster_are_refused(
    machines: list[tuple[float, float]], gpus: float, actors: int, told: str
) -> None:
    require_cluster_room([{"CPU": 8.0, "GPU": 1.0}] * 4, Cluster(address="auto", gpus=1.0), actors=4)
    resources = [{"CPU": cpu} | ({"GPU": gpu} if gpu else {}) for cpu, gpu in machines]
    with pytest.raises(ValueError, match=told):
        require_cluster_room(resources, Cluster(address="auto", gpus=gpus), actors)


def test_an_engine_over_several_gpus_wants_as_many_for_its_actor() -> None:
    split = ["--engines.sampling", "vllm", "--engines.tensor_parallel", "2", "--cluster.address", "auto"]
    with pytest.raises(ValueError, match=r"cluster.gpus .*1.* engines.tensor_parallel .*2"):
        recipe.load(MICRO, [*split, "--cluster.gpus", "1.0"])
    assert recipe.load(MICRO, [*split, "--cluster.gpus", "2.0"]).cluster.gpus == 2


def test_a_cluster_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ValueError, match=r"cluster.address .*Ray.*\[ray\]"),
        joined(Cluster(address="local"), 1),
    ):
        pass
