"""Shared by the training stages: the start model, its tokenizer, the run context, and the ledger's counts."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from dpalign.chat import PromptStyle, chat_template, styled_template
from dpalign.runs.environment import first_process
from dpalign.runs.folder import Work, write_json, write_text
from dpalign.runs.hub import local_model
from dpalign.runs.ledger import read_ledger
from dpalign.runs.modelfolder import require_fit, require_weights
from dpalign.runs.tables import MOST
from dpalign.runs.verify import require_intact
from dpalign.stages.stage import Job
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpalign.recipe import Recipe
    from dpalign.train.rl import Reinforcement
    from dpalign.train.trainer import Outcome, RunContext

Done = TypeVar("Done", "Outcome", "Reinforcement")
TRAINED: Final = ".stage/trained.json"
"""In a stage at work: the outcome of its finished training."""
KEPT_MODEL: Final = ".stage/kept_model"
"""In a stage at work: marks a model that was kept from the finished stage it replaces."""
STYLE: Final = "prompt.txt"
"""Beside the name of a checkpoint that replaces a training: the prompt style for that checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to sample from, and the style of its chats."""

    source: str
    """A folder, or a name on the hub."""
    style: PromptStyle = "own"


def checkpoint_of(stage: Path) -> Checkpoint:
    """The model of a training stage, with its style. A model trained here has its style in its chat template ("own").

    Raises:
        ValueError: a folder without whole weights, or with weights that do not fit its configuration or tokenizer; an
            unknown style.
    """
    style: Any = (stage / STYLE).read_text(encoding="utf-8").strip() if (stage / STYLE).is_file() else "own"
    if style not in get_args(PromptStyle):
        raise ValueError(f"{stage / STYLE}: {style!r} is no prompt style; known: {', '.join(get_args(PromptStyle))}")
    source = model_folder(stage)
    if Path(source).is_dir():
        require_fit(Path(source))
    return Checkpoint(source, style)


def model_folder(stage: Path) -> str:
    """The model of a training stage: its folder, or the checkpoint that the recipe names instead.

    Raises:
        ValueError: a folder without weights, or a revision that the hub does not have.
    """
    name = stage / "checkpoint.txt"
    if name.is_file():
        return local_model(name.read_text(encoding="utf-8").strip())
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return str(folder)


def named_checkpoint(job: Job, training: Training, style: PromptStyle = "own") -> bool:
    """Whether the recipe names a checkpoint in place of this training; if so, write its name for `model_folder`.

    Args:
        style: how chats are written for it; written for `checkpoint_of`.

    Raises:
        ValueError: a folder without weights.
    """
    if not training.checkpoint:
        return False
    if Path(training.checkpoint).exists():
        require_weights(Path(training.checkpoint))
    (job.out / "checkpoint.txt").write_text(training.checkpoint + "\n", encoding="utf-8")
    if style != "own":
        (job.out / STYLE).write_text(style + "\n", encoding="utf-8")
    return True


def policy_tokenizer(
    start: str, recipe: "Recipe", steered: bool = False, style: PromptStyle = "own"
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a policy trained from `start`, with the recipe's chat template and a pad token.

    Args:
        steered: the chat template takes a preference.
        style: how chats are written for a policy without a dial.

    Raises:
        ValueError: the model keeps its own chat template, which cannot carry a dial; a style that the tokenizer cannot
            write.
    """
    from transformers import AutoTokenizer

    from dpalign.engines.tokens import keep_own_chat

    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    template = recipe.preference.template if steered else None
    objectives = tuple(recipe.objectives) if steered else None
    levels = recipe.preference.level_ends if steered else ()
    place = recipe.model.dial_place
    if style != "own":
        assert not steered
        tokenizer.chat_template = styled_template(style, tokenizer.bos_token, tokenizer.eos_token)
    elif recipe.model.own_chat is None:
        tokenizer.chat_template = chat_template(
            recipe.model.chat, template, objectives, eos=tokenizer.eos_token, levels=levels
        )
    else:
        keep_own_chat(tokenizer, recipe.model.own_chat, start, template, objectives, levels, place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def context_of(
    job: Job, start: str, training: Training, tokenizer: "PreTrainedTokenizerBase", seed: int | None = None
) -> "RunContext":
    """The context of the stage's training, with the recipe's seed or another."""
    from dpalign.train.trainer import RunContext

    recipe, name = job.recipe, job.out.stem
    return RunContext(
        start=start,
        training=training,
        tokenizer=tokenizer,
        output=job.out / "model",
        seed=(recipe.seed if seed is None else seed) % (MOST + 1),  # numpy's largest seed is MOST
        resume=job.work.resume,
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
        kernels=recipe.kernels,
        report_to=recipe.report_to,
        logs=job.out.parent / "tensorboard" / name,
        name=name,
    )


def trained_once(job: Job, what: type[Done], train: Callable[[], Done]) -> Done:
    """The outcome of a training. If the stage failed after its training, keep that model and train nothing.

    Args:
        train: trains, and writes the model to `context_of`'s output.
    """
    note = job.out / TRAINED
    if note.is_file():
        require_weights(job.out / "model")
        if first_process():
            job.work.run.log(f"{job.out.stem}: its training was finished before, and is kept")
        return what(**json.loads(note.read_text(encoding="utf-8")))
    done = train()
    if first_process():
        write_json(note, asdict(done))
    return done


def keep_model(work: Work, measure_tables: Collection[str]) -> None:
    """Give a stage at work the model of the finished stage it replaces, if only knobs that measure the model changed.

    All outputs of the finished stage are linked, and its training's counts are added to the tally.

    Args:
        measure_tables: the tables of knobs that training does not read.
    """
    (work.folder / KEPT_MODEL).unlink(missing_ok=True)
    if not measure_tables or not (work.output / "model").is_dir():
        return
    try:
        finished = read_ledger(work.output)
        require_intact(work.output, work.run.hashed)
    except ValueError as error:  # no ledger, or damaged
        work.run.log(f"{work.stage.name}: it is trained again: {error}")
        return
    digests = {name: entry["digest"] for name, entry in finished["inputs"].items()}
    before = (finished["version"], digests, _other_knobs(finished["knobs"], measure_tables))
    now = work.identity
    if before != (now["version"], now["inputs"], _other_knobs(now["knobs"], measure_tables)):
        return
    for name in finished["outputs"]:
        _link(work.output / name, work.folder / name)
    counts = finished["counts"]
    work.tally.add(counts["in"], counts["out"], counts["filtered"], trained=finished["tokens"]["trained"])
    write_text(work.folder / KEPT_MODEL, "")
    work.run.log(f"{work.stage.name}: nothing that its training reads has changed, so its model is kept")


def _other_knobs(knobs: Mapping[str, Any], tables: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name.partition(".")[0] not in tables}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def record_training(job: Job, train: "Callable[[], Outcome]") -> None:
    """Train once, enter the training in the stage's ledger, and write its loss curve."""
    from dpalign.train.trainer import Outcome

    outcome = trained_once(job, Outcome, train)
    too_long = {"too long for the context": outcome.too_long} if outcome.too_long else {}
    job.work.tally.add(outcome.rows + outcome.too_long, outcome.rows, too_long, trained=outcome.tokens)
    if first_process():
        write_json(job.out / "curve.json", outcome.curve)


def train_policy(
    job: Job,
    start: str,
    rows: Iterable[Mapping[str, Any]],
    training: Training,
    steered: bool = False,
    style: PromptStyle = "own",
) -> None:
    """Train a policy and enter it in the ledger, unless the recipe names a checkpoint.

    Args:
        steered: the model's chat template takes a preference.
        style: how chats are written for a model without a dial, trained here or named.
    """
    from dpalign.train.sft import finetune

    def train() -> "Outcome":
        source = local_model(start)
        tokenizer = policy_tokenizer(source, job.recipe, steered, style)
        return finetune(context_of(job, source, training, tokenizer), rows)

    if not named_checkpoint(job, training, style):
        record_training(job, train)
