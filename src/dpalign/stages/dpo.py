"""The DPO stage: a policy trained on preference pairs."""

from dpalign.rows import PAIRS, read_rows
from dpalign.stages.stage import Job
from dpalign.stages.training import context_of, count, model_folder, named_checkpoint, policy_tokenizer


def dpo(job: Job) -> None:
    """Train a policy on preference pairs, from SFT; it has no dial."""
    from dpalign.train.dpo import optimise

    recipe = job.recipe
    if named_checkpoint(job, recipe.dpo.training):
        return
    start = model_folder(job.inputs["start"])
    outcome = optimise(
        start,
        read_rows(job.inputs["pairs"], PAIRS),
        job.out / "model",
        recipe.dpo.training,
        recipe.dpo.beta,
        policy_tokenizer(start, recipe),
        context_of(job),
    )
    count(job, outcome)
