"""Check that a run can take all its steps on this machine: before the first one, not ten hours later."""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from dpalign.pipeline.smollm2 import PLACE
from dpalign.pipeline.steps import processes_of, recipe_of
from dpalign.recipe import Recipe
from dpalign.runs.environment import expanded, visible_gpus
from dpalign.runs.hub import revised
from dpalign.runs.launch import configuration
from dpalign.runs.modelfolder import CONFIG
from dpalign.runs.shards import SPARE_CPUS, joined, require_cluster_room
from dpalign.stages.cost import rows_a_forward
from dpalign.stages.rl import online
from dpalign.stages.stage import Step
from dpalign.train.knobs import Training, require_package

TRAIN: Final = ("torch", "transformers", "datasets", "accelerate", "peft", "trl")
"""What every heavy stage needs: the extra `train`."""


def require_split(recipe: Recipe, todo: Sequence[Step]) -> None:
    """Check that each training's batch divides into micro-batches over its processes.

    Online, it must also divide into the answers to a prompt.

    Raises:
        ValueError: it does not; names the knobs.
    """
    for step, training in _trainings(recipe, todo):
        table, processes = step.stage.training_table, processes_of(recipe, step)
        rows = processes * rows_a_forward(recipe, training)
        if training.batch % rows:
            raise ValueError(
                f"{table}.batch is {training.batch}, and {processes} processes with {table}.micro_batch "
                f"{training.micro_batch} take {rows} rows at once; make batch a multiple of {rows}"
            )
        settings = online(recipe, step.stage.name)
        if settings and training.batch % settings.samples:
            raise ValueError(
                f"{table}.batch is {training.batch}, and an answer is weighed against "
                f"{table.removesuffix('.training')}.samples {settings.samples} to its prompt; make batch a multiple of "
                f"{settings.samples}"
            )


def require_machine(recipe: Recipe, todo: Sequence[Step]) -> None:
    """Check that this machine, or the cluster that the recipe names, has what the steps need.

    Raises:
        ValueError: something is missing; lists all of it.
    """
    if missing := list(lacking(recipe, todo)):
        raise ValueError("this machine cannot take every step:\n" + "\n".join(f"- {one}" for one in missing))
    if recipe.cluster.address not in ("", "local") and _engines(todo):
        with joined(recipe.cluster, recipe.cluster.actors):  # raises if something is wrong
            pass


def lacking(recipe: Recipe, todo: Sequence[Step]) -> list[str]:
    """What this machine lacks for the steps: a model, packages, GPUs; each with the knob that asks and the cure."""
    packages = [why for package, knob in _packages(recipe, todo) for why in _refusal(require_package, package, knob)]
    return [*_unfetched(recipe, todo), *packages, *_gpus(recipe, todo)]


def require_named(recipe: Recipe, todo: Sequence[Step]) -> None:
    """Check that the files and models that steps need and no step makes exist; a model may be on the hub.

    Raises:
        ValueError: one does not; names the knob.
    """
    for knob, file in _files(recipe, todo):
        if not Path(expanded(knob, file)).is_file():
            raise ValueError(f"{knob} is {file!r}: there is no such file")
    for knob, name in dict(_loaded(recipe, todo)).items():
        if Path(name).exists():
            continue
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        plain, revision = revised(name)
        try:
            hf_hub_download(plain, CONFIG, revision=revision)
        except (OSError, ValueError, EntryNotFoundError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(
                f"{knob} is {name!r}: there is no such folder, and the hub or its cache does not give it ({why}); name "
                f"a folder, or fetch it first: hf download {plain}"
            ) from error


def _files(recipe: Recipe, todo: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """The files that reward, judge and pairwise steps read, each with the knob that names it."""
    knobs = {"reward": "reward.probe", "judge": "reward.judge_probe", "pairwise": "reward.pairwise"}
    for step in todo:
        knob = knobs.get(step.stage.name, "")
        if knob and (file := getattr(recipe.reward, knob.partition(".")[2])):
            yield knob, file


def _loaded(recipe: Recipe, todo: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """The models that steps load and no step makes, each with the knob that names it."""
    for step in todo:
        own, stage = recipe_of(recipe, step), step.stage.name
        if step.stage.trains is not None and stage != "reward" and (name := step.stage.trains(own).checkpoint):
            yield f"{step.stage.training_table}.checkpoint", name
        elif (stage in ("sft", "judge") or (stage == "reward" and own.trains_reward)) and own.model.base:
            yield "model.base", own.model.source
        if stage == "evaluate" and "policy" not in step.inputs:
            yield "evaluation.dpo", own.evaluation.dpo
        if step.stage.heavy:
            yield from ((f"rewards.{name}.model", table.model) for name, table in own.rewards.items() if table.model)


def _unfetched(recipe: Recipe, todo: Sequence[Step]) -> Iterator[str]:
    """The model of `dpa smollm2`, if the recipe needs it and it is not there."""
    if any(step.stage.heavy for step in todo) and recipe.model.base == str(PLACE) and not PLACE.exists():
        yield f"model.base is {recipe.model.base}, which is not there; `dpa smollm2` fetches it"


def _packages(recipe: Recipe, todo: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """The packages that the steps need, each with the knob that asks for it."""
    if any(step.stage.heavy for step in todo):
        yield from ((package, "training, sampling or scoring") for package in TRAIN)
    engines = _engines(todo)
    for knob in engines:
        if getattr(recipe.engines, knob) == "vllm":
            yield "vllm", f'engines.{knob} = "vllm"'
    if engines and recipe.cluster.address:
        yield "ray", f'cluster.address = "{recipe.cluster.address}"'
    if any(_trainings(recipe, todo)):
        yield from recipe.kernels.packages
        if recipe.report_to != "none":
            yield recipe.report_to, f'report_to = "{recipe.report_to}"'
    if _spread(recipe, todo) and recipe.launch.config.startswith("zero"):
        yield "deepspeed", f'launch.config = "{recipe.launch.config}"'


def _gpus(recipe: Recipe, todo: Sequence[Step]) -> Iterator[str]:
    """What is wrong with the number of this machine's GPUs. They are counted only if something asks for GPUs."""
    engines, cluster, spread = _engines(todo), recipe.cluster, _spread(recipe, todo)
    on_vllm = [knob for knob in engines if getattr(recipe.engines, knob) == "vllm"]
    kernels = [knob for _, knob in recipe.kernels.packages] if any(_trainings(recipe, todo)) else []
    if not (on_vllm or kernels or spread or (engines and cluster.address == "local")):
        return
    gpus = visible_gpus()
    shown = f"this machine shows {gpus or 'no'} GPU{'s' * (gpus != 1)}"
    if spread and (recipe.launcher == "accelerate" if not gpus else recipe.processes > gpus):
        yield (
            f"processes is {recipe.processes}, each on a GPU of its own, and {shown}; lower processes, or start them "
            "on several machines with launch.command"
        )
    if spread and recipe.launcher == "accelerate" and recipe.launch.config and find_spec("trl"):
        yield from _refusal(configuration, recipe.launch.config)
    if not gpus:
        yield from (f"{knob} needs a GPU, and {shown}; leave it at its default" for knob in kernels)
        if on_vllm and _vllm_for_gpus():
            yield (
                f'engines.{on_vllm[0]} = "vllm", whose usual build needs a GPU, and {shown}; take its CPU build '
                '(docs/engines.md), or "transformers"'
            )
    if not engines:
        return
    if cluster.address == "local":
        cpus = cluster.actors * cluster.cpus + SPARE_CPUS  # Ray starts with this number, not the machine's
        yield from _refusal(require_cluster_room, [{"CPU": cpus, "GPU": float(gpus)}], cluster, cluster.actors)
    elif not cluster.address and gpus and recipe.engines.tensor_parallel > gpus:
        yield f"engines.tensor_parallel is {recipe.engines.tensor_parallel}, and {shown}; lower it"


def _vllm_for_gpus() -> bool:
    """Whether the installed vLLM is its usual build; the one for CPUs has another package name or version."""
    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False


def _trainings(recipe: Recipe, steps: Sequence[Step]) -> Iterator[tuple[Step, Training]]:
    """The steps that train, each with its knobs. A step with a named checkpoint does not train."""
    for step in steps:
        training = step.stage.trains(recipe_of(recipe, step)) if step.stage.trains else None
        if training is not None and not training.checkpoint:
            yield step, training


def _spread(recipe: Recipe, steps: Sequence[Step]) -> bool:
    """Whether any of the steps runs in several processes of this machine."""
    return not recipe.launch.command and any(processes_of(recipe, step) > 1 for step, _ in _trainings(recipe, steps))


def _engines(steps: Sequence[Step]) -> list[str]:
    """The knobs of [engines] that the steps read: `sampling`, `scoring`."""
    read = {name for step in steps for name in step.stage.knob_names()}
    return [knob for knob in ("sampling", "scoring") if f"engines.{knob}" in read]


def _refusal(check: Callable[..., object], *given: Any) -> Iterator[str]:
    try:
        check(*given)
    except ValueError as error:
        yield str(error)
