"""What the stages that train a policy share: its start, its tokenizer, and what the ledger counts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpalign.chat import chat_template
from dpalign.stages.stage import Job
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpalign.recipe import Recipe
    from dpalign.train.common import Fitted


def model_folder(stage: Path) -> str:
    """The model that a training stage left: its folder, or the name of the checkpoint taken in its place.

    Raises:
        ValueError: a folder without weights.
    """
    from dpalign.train.common import require_weights

    named = stage / "checkpoint.txt"
    if named.is_file():
        return named.read_text().strip()
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return str(folder)


def train_policy(
    job: Job, start: str, rows: Iterable[Mapping[str, Any]], training: Training, steered: bool = False
) -> None:
    """Train, or note the checkpoint that the recipe names in place of training.

    Args:
        steered: the model's chat template is to take a preference.
    """
    from dpalign.train.sft import finetune

    if taken(job, training):
        return
    recipe = job.recipe
    tokenizer = policy_tokenizer(start, recipe, steered)
    fitted = finetune(
        start,
        rows,
        job.out / "model",
        training,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        resume=job.work.resume,
        trust_remote_code=recipe.model.trust_remote_code,
        kernels=recipe.kernels,
    )
    count(job, fitted)


def taken(job: Job, training: Training) -> bool:
    """Whether the recipe names a checkpoint in place of this training; it is noted where `model_folder` reads it."""
    from dpalign.train.common import require_weights

    if not training.checkpoint:
        return False
    if Path(training.checkpoint).exists():
        require_weights(Path(training.checkpoint))
    (job.out / "checkpoint.txt").write_text(training.checkpoint + "\n")
    return True


def policy_tokenizer(start: str, recipe: "Recipe", steered: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a policy trained from `start`, with the recipe's chat template and a pad token.

    Args:
        steered: the chat template is to take a preference.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    tokenizer.chat_template = chat_template(
        recipe.model.chat,
        recipe.preference.template if steered else None,
        tuple(recipe.objectives) if steered else None,
        eos=tokenizer.eos_token,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def count(job: Job, fitted: "Fitted") -> None:
    """Enter a training in the stage's ledger."""
    too_long = {"too long for the context": fitted.too_long} if fitted.too_long else {}
    job.work.tally.add(
        rows_in=fitted.rows + fitted.too_long, rows_out=fitted.rows, filtered=too_long, trained=fitted.tokens
    )
