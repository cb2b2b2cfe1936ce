"""A stage whose work is a fixed list of shards: made here in order, or by a pool of Ray actors.

The recipe alone decides what a shard holds: its bytes are the same wherever it is made. On a cluster, an actor opens
an engine or a scorer once, makes whole shards in a scratch folder of its own, and returns the files' bytes. Only the
driver writes into the run folder, as a single process would. A killed actor costs the shard at hand; a killed driver
costs the shards that it has not yet written, and the next run makes those. Ray Data's own `CheckpointConfig` is not
used: it matches rows by their id alone, even those of another recipe.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpalign.runs.environment import keep_freed_memory, settle_threads
from dpalign.runs.folder import Run, Shard, Tally, beside, keep_tally, unfinished
from dpalign.runs.knobs import Cluster
from dpalign.runs.ledger import SCRATCH, write_bytes
from dpalign.runs.progress import Progress

if TYPE_CHECKING:
    from dpalign.stages.stage import Job

Id: TypeAlias = tuple[str, int, int]
"""The key of an answer within a stage: prompt_id, condition_index, sample."""


class ShardWork(Protocol):
    """The shards of one stage, as its job lays them out."""

    @property
    def name(self) -> str:
        """A shard's file in the stage's folder, with a place for its number."""

    @property
    def count(self) -> int: ...

    def open(self) -> None:
        """Load the models; only `make` and `one_by_one` need them."""

    def make(self, shard: Shard) -> None:
        """Write the whole shard, and count its rows and tokens."""

    def one_by_one(self, index: int) -> Iterator[str]:
        """Do the work of a shard a prompt at a time, without a result; yields each prompt's name before its work."""

    def ids(self, index: int) -> list[Id]:
        """The answers that a shard must hold, in order."""


def make_shards(job: "Job", plan: Callable[["Job"], ShardWork]) -> None:
    """Make the unfinished shards of a stage, here or on the recipe's cluster.

    Args:
        plan: a function or class of a module, from which the actors of a cluster import it.

    Raises:
        ValueError: bad input; shards that failed for good (the others are kept); no Ray, or no room for its actors; a
            lost or duplicate answer.
    """
    work = plan(job)
    todo = unfinished(job.out, work.count, work.name, job.work.run.log)
    if todo and not job.recipe.cluster.address:
        work.open()
        for shard in job.work.shards(work.count, work.name, todo):
            work.make(shard)
    elif failed := _make_on_cluster(job, plan, work, todo) if todo else {}:
        first = min(failed)
        raise ValueError(
            f"{len(failed)} of {work.count} shards failed, the others are kept; the first, "
            f"{work.name.format(first)}: {failed[first]}"
        )
    require_no_others(job.out, work)
    reconcile(job.out, work)


def require_no_others(folder: Path, work: ShardWork) -> None:
    """Raise ValueError if a file is named like a stage's shards but is none: it would count as an output."""
    shards = {Path(work.name.format(index)).name for index in range(work.count)}
    for path in sorted(folder.glob(re.sub(r"\{.*?\}", "*", beside(work.name)))):
        if path.name not in shards:
            raise ValueError(f"{path}: this stage has {work.count} shards, and this is none; move it away, run again")


def named(row: Mapping[str, Any]) -> str:
    """A row's prompt in a message: its id and its beginning."""
    return f"{row['prompt_id']} ({row['messages'][-1]['content'][:60]!r})"


# --- on a cluster

RESULT: Final = pa.schema(
    [
        ("shard", pa.int64()),
        ("files", pa.list_(pa.string())),  # relative to the stage's folder; the shard's own comes last
        ("contents", pa.list_(pa.large_binary())),
        ("tally", pa.string()),
        ("error", pa.string()),  # "" where the shard was made
        ("warnings", pa.list_(pa.string())),  # logged by its process since its last shard
    ]
)
"""The row that an actor returns for a shard."""

SPARE_CPUS: Final = 2
"""CPUs for Ray Data itself; with fewer it may wait for ever."""


def _make_on_cluster(
    job: "Job", plan: Callable[["Job"], ShardWork], work: ShardWork, todo: Sequence[int]
) -> dict[int, str]:
    """Let the cluster make shards, and write each as it comes; returns the error of each shard that failed for good."""
    cluster, log = job.recipe.cluster, job.work.run.log
    actors = min(cluster.actors, len(todo))
    failed: dict[int, str] = {}
    returned: set[int] = set()
    logged: set[str] = set()
    progress = Progress(f"{job.out.stem}: shard", work.count, work.count - len(todo))
    with progress, joined(cluster, actors) as ray:
        attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote(
            actors, cluster.retries
        )
        order = {"job": replace(cast(Any, job), work=None), "stage": job.out.stem, "plan": plan, "attempts": attempts}
        for row in _results(cluster, actors, todo, order):
            index = row["shard"]
            returned.add(index)
            for warning in row["warnings"]:
                if warning not in logged:  # once, not once per actor
                    log(f"{job.out.stem}: {warning}")
                    logged.add(warning)
            if row["error"]:
                failed[index] = row["error"]
                log(f"{work.name.format(index)}: {row['error']}")
                continue
            for file, content in zip(row["files"], row["contents"], strict=True):
                write_bytes(job.out / file, content)
            counts = json.loads(row["tally"])
            tally = Tally(**counts | {"filtered": Counter(counts["filtered"])})
            keep_tally(job.out, work.name.format(index), tally)
            progress.advance()
    return failed | {index: "the cluster lost it; run again to make it" for index in todo if index not in returned}


def _results(cluster: Cluster, actors: int, todo: Sequence[int], order: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of RESULT, each as soon as its shard is made."""
    import ray.data as data

    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = data.from_items([{"shard": index} for index in todo], override_num_blocks=len(todo))
    results = blocks.map_batches(
        ShardActor,
        fn_constructor_kwargs=dict(order),
        batch_size=1,
        batch_format="pyarrow",
        # One shard at a time per actor: nothing waits in a dead one's queue. Ray Data restarts actors and retries
        # their tasks without end; `Attempts` counts, and gives up a shard that kills its process.
        compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus,
    )
    for table in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


class Attempts:
    """The memory that outlives an actor's process: how often each shard was tried, and where the last try died.

    It lives in a small actor of its own, which does no work that could end it.

    Args:
        actors: size of the pool.
        retries: `cluster.retries`.
    """

    def __init__(self, actors: int, retries: int) -> None:
        # Without progress, every actor may start once, and once more for each attempt at a shard that kills it.
        self.starts_allowed = actors * (retries + 4)
        self.starts = 0
        self.count: dict[int, int] = {}
        self.prompt: dict[int, str] = {}
        self.error: dict[int, str] = {}

    def start_process(self) -> str:
        """Count an actor's new process; returns an error if too many have started since a shard was finished."""
        self.starts += 1
        if self.starts <= self.starts_allowed:
            return ""
        return f"the actors' processes died {self.starts - 1} times with no shard done; out of memory?"

    def begin(self, shard: int) -> tuple[int, str, str]:
        """Count an attempt at a shard.

        Returns:
            The number of attempts with this one; the prompt and the error at which the last attempt died, or "".
        """
        self.count[shard] = self.count.get(shard, 0) + 1
        return self.count[shard], self.prompt.get(shard, ""), self.error.pop(shard, "")

    def try_prompt(self, shard: int, prompt: str) -> None:
        """Keep the prompt that an attempt works on alone; "" when all prompts have passed."""
        self.prompt[shard] = prompt

    def fail(self, shard: int, error: str) -> None:
        """Keep the error that ends an attempt and its process."""
        self.error[shard] = error

    def finish(self, shard: int) -> None:
        """Note that a shard is made, or given up."""
        self.starts = 0
        self.prompt.pop(shard, None)


class WarningLines(logging.Handler):
    """Keeps an actor's warnings for the driver: the actor's own output is not shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


class ShardActor:
    """One actor of the pool: an engine or a scorer, and whole shards from it.

    Args:
        job: without its `work`; the actor works in a scratch folder.
        attempts: a handle on the actor of `Attempts`.
    """

    def __init__(self, job: "Job", stage: str, plan: Callable[["Job"], ShardWork], attempts: Any) -> None:
        import ray

        self.attempts, self.get, self.broken = attempts, ray.get, ""
        self.warnings = WarningLines()
        logging.getLogger("dpalign").addHandler(self.warnings)
        try:
            if error := self.get(attempts.start_process.remote()):
                raise ValueError(error)
            settle_threads(job.recipe.threads, for_torch=True)
            keep_freed_memory()
            with tempfile.TemporaryDirectory(prefix="dpalign-") as folder:
                self.scratch = Path(folder)
                self.job = replace(job, work=Run(self.scratch, lock=-1, git_commit=None).stage_at_work(stage))
                self.work = plan(self.job)
                self.work.open()
        except Exception as error:  # Ray would restart a failing actor for ever: each shard returns the error instead
            self.broken = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def __call__(self, block: pa.Table) -> pa.Table:
        """Make the block's one shard."""
        (index,) = block["shard"].to_pylist()
        row: dict[str, Any] = {"shard": index, "files": [], "contents": [], "tally": "", "error": self.broken}
        if not self.broken:
            # One folder per task: Ray does not tell an actor when it ends, so nothing could remove a longer-lived one.
            self.scratch.mkdir(mode=0o700)
            try:
                row |= self._attempt(index)
            except ValueError as error:
                row["error"] = str(error)
            finally:
                shutil.rmtree(self.scratch)
        row["warnings"] = self.warnings.take()
        self.get(self.attempts.finish.remote(index))
        return pa.Table.from_pylist([row], schema=RESULT)

    def _attempt(self, index: int) -> dict[str, Any]:
        """Make the shard, unless earlier attempts show that it cannot be made.

        A ValueError is bad input, and final. Any other error ends this process, because its state is unknown: Ray
        starts it again, and the attempts are counted.
        """
        retries = self.job.recipe.cluster.retries
        count, prompt, reason = self.get(self.attempts.begin.remote(index))
        if prompt:
            raise ValueError(f"prompt {prompt}: {reason or 'its process died at it'}; begun {count - 1} times")
        if count > retries + 2:
            raise ValueError(
                f"{reason or 'its process died'}, each of {count - 1} times, though each of its prompts alone passes; "
                "out of memory? Take smaller batches or shards"
            )
        try:
            # The whole shard failed each time: find the prompt that kills the process.
            if count == retries + 2:
                for prompt in self.work.one_by_one(index):
                    self.get(self.attempts.try_prompt.remote(index, prompt))
                self.get(self.attempts.try_prompt.remote(index, ""))
            return self._make(index)
        except ValueError:
            raise
        except Exception as error:
            self.get(self.attempts.fail.remote(index, f"{type(error).__name__}: {error}"))
            shutil.rmtree(self.scratch, ignore_errors=True)
            os._exit(1)

    def _make(self, index: int) -> dict[str, Any]:
        out = self.job.out
        shard = Shard(index, out / self.work.name.format(index), Tally())
        shard.path.parent.mkdir(parents=True)
        self.work.make(shard)
        paths = sorted((p for p in out.rglob("*") if p.is_file()), key=lambda p: (p == shard.path, p))
        files = [path.relative_to(out).as_posix() for path in paths]
        contents = [path.read_bytes() for path in paths]
        return {"files": files, "contents": contents, "tally": json.dumps(vars(shard.tally))}


@contextmanager
def joined(cluster: Cluster, actors: int) -> Iterator[Any]:
    """Ray, started or joined; an open connection is used as it is.

    Raises:
        ValueError: Ray is not installed, does not answer at the address, or has no room for the actors.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("cluster.address is set, which needs Ray; install it: pip install -e '.[ray]'") from None
    own = not ray.is_initialized()
    if own:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if cluster.address == "local":
            cpus = math.ceil(actors * cluster.cpus) + SPARE_CPUS
            options |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(address=cluster.address, **options)
        except ConnectionError as error:
            raise ValueError(
                f'cluster.address is "{cluster.address}", and no Ray answers there ({error}); start it with '
                '`ray start --head`, or set "local"'
            ) from error
    try:
        require_cluster_room([node["Resources"] for node in ray.nodes() if node["Alive"]], cluster, actors)
        yield ray
    finally:
        if own:
            ray.shutdown()


def require_cluster_room(machines: Sequence[Mapping[str, float]], cluster: Cluster, actors: int) -> None:
    """Raise ValueError unless the machines have room for the actors, each on one machine: Ray would wait for ever."""
    gpus = sum(machine.get("GPU", 0.0) for machine in machines)
    if gpus and not cluster.gpus:
        raise ValueError(
            f"cluster.gpus is 0, and the cluster has {gpus:g} GPUs: all actors of a machine would open its first; set "
            "the GPUs of an actor, 0.01 for none"
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
    """Compare the shards with the answers they must hold: none lost, none twice, all in order.

    Raises:
        ValueError: names the file, and the first answer that is lost or too many.
    """
    for index in range(work.count):
        name, expected = work.name.format(index), work.ids(index)
        paths = [
            path
            for path in folder.rglob(Path(name).name)
            if path == folder / name or path.relative_to(folder).parts[0] not in SCRATCH
        ]
        if folder / name not in paths:
            raise ValueError(f"{folder / name}: this shard is lost; run again to make it")
        for path in sorted(paths):
            ids = _ids_of(path)
            lost, more = Counter(expected) - Counter(ids), Counter(ids) - Counter(expected)
            if lost or more:
                prompt, condition, sample = next(iter(lost or more))
                raise ValueError(
                    f"{path}: {lost.total()} answers are lost and {more.total()} too many, the first of prompt "
                    f"{prompt}, condition {condition}, sample {sample}; delete the file and run again"
                )
            if ids != expected:
                raise ValueError(f"{path}: its answers stand in another order; delete the file and run again")


def _ids_of(path: Path) -> list[Id]:
    columns = ["prompt_id", "condition_index", "sample"]
    try:
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); delete it and run again") from error
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
