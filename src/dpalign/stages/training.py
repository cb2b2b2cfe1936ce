"""What the training stages share: the model to start from, its tokenizer, the context, and what the ledger counts."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from dpalign.chat import PromptStyle, chat_template, styled_template
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
"""In a stage at work whose model is trained: what the training did."""
KEPT_MODEL: Final = ".stage/kept_model"
"""In a stage at work that has its model from the finished one which it is to replace."""
STYLE: Final = "prompt.txt"
"""Beside the name of a checkpoint that a stage took in place of training: the style that it is asked in."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to sample from, and how chats are written for it."""

    source: str
    """A folder, or a name on the hub."""
    style: PromptStyle = "own"


def checkpoint_of(stage: Path) -> Checkpoint:
    """The model that a training stage left, with its style: what a stage trained has that in its chat template.

    Raises:
        ValueError: a folder without weights, or whose weights do not fit it; a style that this version does not know.
    """
    style: Any = (stage / STYLE).read_text().strip() if (stage / STYLE).is_file() else "own"
    if style not in get_args(PromptStyle):
        raise ValueError(f"{stage / STYLE}: {style!r} is no prompt style; known: {', '.join(get_args(PromptStyle))}")
    source = model_folder(stage)
    if Path(source).is_dir():
        require_fit(Path(source))
    return Checkpoint(source, style)


def model_folder(stage: Path) -> str:
    """The model that a training stage left: its folder, or the name of the checkpoint that the recipe names instead.

    Raises:
        ValueError: a folder without weights, or a revision that the hub does not have.
    """
    name = stage / "checkpoint.txt"
    if name.is_file():
        return local_model(name.read_text().strip())
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return str(folder)


def named_checkpoint(job: Job, training: Training, style: PromptStyle = "own") -> bool:
    """Whether the recipe names a checkpoint in place of this training; its name is kept where `model_folder` reads it.

    Args:
        style: how chats are written for it; kept where `checkpoint_of` reads it.

    Raises:
        ValueError: a folder without weights.
    """
    if not training.checkpoint:
        return False
    if Path(training.checkpoint).exists():
        require_weights(Path(training.checkpoint))
    (job.out / "checkpoint.txt").write_text(training.checkpoint + "\n")
    if style != "own":
        (job.out / STYLE).write_text(style + "\n")
    return True


def policy_tokenizer(
    start: str, recipe: "Recipe", steered: bool = False, style: PromptStyle = "own"
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a policy trained from `start`, with the recipe's chat template and a pad token.

    Args:
        steered: the chat template takes a preference.
        style: how chats are written for a policy without a dial.

    Raises:
        ValueError: the model's own chat template is kept, and cannot carry a dial; a style that the tokenizer cannot
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
    """What the stage tells its training, with the recipe's seed or another."""
    from dpalign.train.trainer import RunContext

    recipe, name = job.recipe, job.out.stem
    return RunContext(
        start=start,
        training=training,
        tokenizer=tokenizer,
        output=job.out / "model",
        seed=(recipe.seed if seed is None else seed) % (MOST + 1),  # numpy takes no other
        resume=job.work.resume,
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
        kernels=recipe.kernels,
        report_to=recipe.report_to,
        logs=job.out.parent / "tensorboard" / name,
        name=name,
    )


def trained_once(job: Job, what: type[Done], train: Callable[[], Done]) -> Done:
    """What a training did. Where the stage failed after it, the model that it left is kept, and nothing is trained.

    Args:
        train: trains, and leaves the model at `context_of`'s output.
    """
    from dpalign.train.trainer import first_process

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
    """Give a stage at work the model of the finished one that it replaces, where only what measures it has changed.

    All that the finished stage wrote is linked, and what its training counted is counted again.

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
    work.run.log(f"{work.stage.name}: its training read nothing of what changed, and its model is kept")


def _other_knobs(knobs: Mapping[str, Any], tables: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name.partition(".")[0] not in tables}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def count(job: Job, outcome: "Outcome") -> None:
    """Enter a training in the stage's ledger, and leave its loss curve."""
    from dpalign.train.trainer import first_process

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
    """Train, unless the recipe names a checkpoint.

    Args:
        steered: the model's chat template takes a preference.
        style: how chats are written for a model without a dial, trained or named.
    """
    from dpalign.train.sft import finetune
    from dpalign.train.trainer import Outcome

    def train() -> Outcome:
        source = local_model(start)
        tokenizer = policy_tokenizer(source, job.recipe, steered, style)
        return finetune(context_of(job, source, training, tokenizer), rows)

    if not named_checkpoint(job, training, style):
        count(job, trained_once(job, Outcome, train))
