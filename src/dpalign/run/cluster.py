"""A stage's shards made by a pool of Ray actors: a Ray Data pipeline, one block a shard.

An actor opens an engine or a scorer once, makes whole shards in a scratch folder of its own, and hands the files'
bytes back; the driver alone writes into the run folder, as the single process would. So a killed actor costs the shard
it was at, and a killed driver those that it had not yet written: a next run makes what is unfinished. What Ray Data
keeps of its own (`CheckpointConfig`) is not used: it matches rows by their id alone, whatever recipe made them.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from dpalign.recipe import Recipe, config
from dpalign.run.environment import settle_threads
from dpalign.run.folder import Run, Shard, Tally, keep_tally, unfinished
from dpalign.run.knobs import Cluster
from dpalign.run.ledger import SCRATCH, write_bytes
from dpalign.run.notes import Notes
from dpalign.run.progress import Progress
from dpalign.run.shards import Id, ShardWork
from dpalign.stages.stage import Job

MADE: Final = pa.schema(
    [
        ("shard", pa.int64()),
        ("files", pa.list_(pa.string())),  # relative to the stage's folder; the shard's own comes last
        ("contents", pa.list_(pa.large_binary())),
        ("tally", pa.string()),
        ("error", pa.string()),  # "" where the shard was made
        ("warnings", pa.list_(pa.string())),  # what its process logged since the shard before
    ]
)
"""What an actor hands back of a shard."""

SPARE_CPUS: Final = 2
"""What Ray Data needs beside the actors; with less it may wait for ever."""


@dataclass(frozen=True)
class Order:
    """A job in words: what an actor builds its own from."""

    recipe: Mapping[str, Any]
    stage: str
    inputs: Mapping[str, str]
    t: int
    half: str
    condition: str
    plan: str
    """`module:name` of what lays out the shards."""

    @classmethod
    def of(cls, job: Job, plan: Callable[[Job], ShardWork]) -> "Order":
        inputs = {name: str(path) for name, path in job.inputs.items()}
        where = f"{plan.__module__}:{plan.__qualname__}"
        return cls(config.as_mapping(job.recipe), job.out.stem, inputs, job.t, job.half, job.condition, where)

    def job(self, folder: Path) -> Job:
        """The job, to be worked at below another folder."""
        work = Run(folder, lock=-1, git_commit=None).stage_at_work(self.stage)
        inputs = {name: Path(path) for name, path in self.inputs.items()}
        return Job(config.from_mapping(Recipe, self.recipe), work, inputs, self.t, self.half, self.condition)

    def work(self, job: Job) -> ShardWork:
        module, name = self.plan.split(":")
        plan: Callable[[Job], ShardWork] = getattr(import_module(module), name)
        return plan(job)


def make_on_cluster(job: Job, plan: Callable[[Job], ShardWork], work: ShardWork) -> None:
    """Make a stage's unfinished shards by the recipe's cluster, then reconcile all of them.

    Raises:
        ValueError: no Ray, or none with room for the actors; shards that failed for good (the others are kept); an
            answer that is lost or there twice.
    """
    todo = unfinished(job.out, range(work.count), work.name)
    if todo:
        failed = _gather(job, Order.of(job, plan), work, todo)
        if failed:
            first = min(failed)
            raise ValueError(
                f"{len(failed)} of {work.count} shards failed, the others are kept; the first, "
                f"{work.name.format(first)}: {failed[first]}"
            )
    reconcile(job.out, work)


def _gather(job: Job, order: Order, work: ShardWork, todo: Sequence[int]) -> dict[int, str]:
    """Have shards made, and write each as it comes; returns what failed for good, and why."""
    cluster = job.recipe.cluster
    actors = min(cluster.actors, len(todo))
    failed: dict[int, str] = {}
    seen: set[int] = set()
    told: set[str] = set()
    progress = Progress(f"{job.out.stem}: shard", work.count, work.count - len(todo))
    with progress, joined(cluster, actors) as ray:
        notes = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Notes).remote(actors, cluster.retries)
        for row in _pipeline(ray, cluster, actors, todo, order, notes):
            index = row["shard"]
            seen.add(index)
            for warning in dict.fromkeys(row["warnings"]):
                if warning not in told:  # once, not once an actor
                    job.work.run.log(f"{job.out.stem}: {warning}")
                told.add(warning)
            if row["error"]:
                failed[index] = row["error"]
                job.work.run.log(f"{work.name.format(index)}: {row['error']}")
                continue
            for file, content in zip(row["files"], row["contents"], strict=True):
                write_bytes(job.out / file, content)
            said = json.loads(row["tally"])
            keep_tally(job.out, work.name.format(index), Tally(**said | {"filtered": Counter(said["filtered"])}))
            progress.advance()
    return failed | {index: "the cluster lost it; run again to make it" for index in todo if index not in seen}


def _pipeline(
    ray: Any, cluster: Cluster, actors: int, todo: Sequence[int], order: Order, notes: Any
) -> Iterator[dict[str, Any]]:
    """Rows of MADE, each as soon as its shard is made."""
    import ray.data as data

    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = data.from_items([{"shard": index} for index in todo], override_num_blocks=len(todo))
    made = blocks.map_batches(
        ShardActor,
        fn_constructor_kwargs={"order": order, "notes": notes, "retries": cluster.retries},
        batch_size=1,
        batch_format="pyarrow",
        # One shard at a time an actor: nothing waits in the queue of one that has died. Ray Data restarts actors and
        # tries their tasks again without end; it is `Notes` that counts, so that a shard is given up for its own sake.
        compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    for table in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


class Warnings(logging.Handler):
    """What an actor's process warns of: its own screen nobody reads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class ShardActor:
    """One actor of the pool: an engine or a scorer, and whole shards from it."""

    def __init__(self, order: Order, notes: Any, retries: int) -> None:
        import ray

        self.notes, self.retries, self.ask, self.broken = notes, retries, ray.get, ""
        self.warnings = Warnings()
        logging.getLogger("dpalign").addHandler(self.warnings)
        try:
            if too_often := self.ask(notes.born.remote()):
                raise ValueError(too_often)
            settle_threads(order.recipe["threads"], for_torch=True)
            self.job = order.job(Path(tempfile.mkdtemp(prefix="dpalign-")))
            self.work = order.work(self.job)
            self.work.open()
        except Exception as error:  # an actor that does not come up would be started for ever: each shard says why
            self.broken = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def __call__(self, block: pa.Table) -> pa.Table:
        """Make the block's one shard."""
        (index,) = block["shard"].to_pylist()
        made: dict[str, Any] = {"shard": index, "files": [], "contents": [], "tally": "", "error": ""}
        try:
            if self.broken:
                raise ValueError(self.broken)
            made |= self._attempt(index)
        except ValueError as error:
            made["error"] = str(error)
        made["warnings"] = self.warnings.taken()
        self.ask(self.notes.done.remote(index))
        return pa.Table.from_pylist([made], schema=MADE)

    def _attempt(self, index: int) -> dict[str, Any]:
        """The shard, unless earlier attempts at it say that it cannot be made.

        A ValueError is bad input, and final. Any other error ends this process, whose state nobody knows: Ray starts
        it anew, and the attempts are counted.
        """
        begun, prompt, said = self.ask(self.notes.begin.remote(index))
        if prompt:
            raise ValueError(f"prompt {prompt}: {said or 'its process died at it'}; begun {begun - 1} times")
        if begun > self.retries + 2:
            raise ValueError(
                f"{said or 'its process died'}, each of {begun - 1} times, though each of its prompts alone passes; "
                "out of memory? Take smaller batches or shards"
            )
        try:
            if begun == self.retries + 2:
                for prompt in self.work.one_by_one(index):
                    self.ask(self.notes.at.remote(index, prompt))
                self.ask(self.notes.at.remote(index, ""))
            return self._make(index)
        except ValueError:
            raise
        except Exception as error:
            self.ask(self.notes.say.remote(index, f"{type(error).__name__}: {error}"))
            os._exit(1)

    def _make(self, index: int) -> dict[str, Any]:
        name = self.work.name.format(index)
        shutil.rmtree(self.job.out, ignore_errors=True)
        shard = Shard(index, self.job.out / name, Tally())
        shard.path.parent.mkdir(parents=True)
        self.work.make(shard)
        paths = sorted((p for p in self.job.out.rglob("*") if p.is_file()), key=lambda p: (p == shard.path, p))
        files = [path.relative_to(self.job.out).as_posix() for path in paths]
        contents = [path.read_bytes() for path in paths]
        shutil.rmtree(self.job.out)
        return {"files": files, "contents": contents, "tally": json.dumps(vars(shard.tally))}


@contextmanager
def joined(cluster: Cluster, actors: int) -> Iterator[Any]:
    """Ray, started or joined; an open connection is taken as it is.

    Raises:
        ValueError: Ray is not installed, not found at the address, or has no room for the actors.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("cluster.address is set, which needs Ray; install it: pip install 'dpalign[ray]'") from None
    own = not ray.is_initialized()
    if own:
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if cluster.address == "local":
            cpus = math.ceil(actors * cluster.cpus) + SPARE_CPUS
            shared |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(address=cluster.address, **shared)
        except ConnectionError as error:
            raise ValueError(
                f'cluster.address is "{cluster.address}", and no Ray answers there ({error}); start it with '
                '`ray start --head`, or say "local"'
            ) from error
    try:
        require_room([node["Resources"] for node in ray.nodes() if node["Alive"]], cluster, actors)
        yield ray
    finally:
        if own:
            ray.shutdown()


def require_room(machines: Sequence[Mapping[str, float]], cluster: Cluster, actors: int) -> None:
    """ValueError unless the machines can hold the actors, each on one: Ray itself would wait for ever, in silence."""
    gpus = sum(machine.get("GPU", 0.0) for machine in machines)
    if gpus and not cluster.gpus:
        raise ValueError(
            f"cluster.gpus is 0, and the cluster has {gpus:g} GPUs: all actors of a machine would open its first; say "
            "how many each reserves, 0.01 if none is to be used"
        )
    needs = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    room = sum(min(_times(machine.get(what, 0.0), each) for what, each in needs.items()) for machine in machines)
    if actors > room:
        has = "; ".join(f"{machine.get('CPU', 0.0):g} CPU, {machine.get('GPU', 0.0):g} GPU" for machine in machines)
        raise ValueError(
            f"{actors} actors of {cluster.cpus:g} CPU and {cluster.gpus:g} GPU each do not fit the cluster's machines "
            f"({has}), which hold {room:g}; lower cluster.actors, cluster.cpus or cluster.gpus, or add machines"
        )
    cpus = sum(machine.get("CPU", 0.0) for machine in machines)
    if cpus < actors * cluster.cpus + SPARE_CPUS:
        raise ValueError(
            f"{actors} actors of {cluster.cpus:g} CPU each leave {cpus - actors * cluster.cpus:g} of the cluster's "
            f"{cpus:g} CPUs, and Ray Data needs {SPARE_CPUS} for itself; lower cluster.actors or cluster.cpus"
        )


def _times(has: float, each: float) -> float:
    return math.floor(has / each + 1e-9) if each else math.inf


def reconcile(folder: Path, work: ShardWork) -> None:
    """Compare the shards with what they must hold: no answer lost, none twice, all in order.

    Raises:
        ValueError: naming the file, and the first answer that is lost or too many.
    """
    for index in range(work.count):
        name = work.name.format(index)
        wanted = work.ids(index)
        found = [
            path
            for path in folder.rglob(Path(name).name)
            if path == folder / name or path.relative_to(folder).parts[0] not in SCRATCH
        ]
        if folder / name not in found:
            raise ValueError(f"{folder / name}: this shard is lost; run again to make it")
        for path in sorted(found):
            ids = _ids_of(path)
            lost, more = Counter(wanted) - Counter(ids), Counter(ids) - Counter(wanted)
            if lost or more:
                first = next(iter(lost or more))
                raise ValueError(
                    f"{path}: {lost.total()} answers are lost and {more.total()} too many, the first of prompt "
                    f"{first[0]}, condition {first[1]}, sample {first[2]}; delete the file and run again"
                )
            if ids != wanted:
                raise ValueError(f"{path}: its answers stand in another order; delete the file and run again")


def _ids_of(path: Path) -> list[Id]:
    table = pq.read_table(path, columns=["prompt_id", "condition_index", "sample"])
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
