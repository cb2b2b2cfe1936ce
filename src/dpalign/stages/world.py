"""The embedded world's prompts and ratings, for machines without a hub."""

from pydantic import Field

from dpalign.runs.tables import Table
from dpalign.stages.stage import Job, stage


class World(Table):
    """How many tasks the embedded world draws for each role; used only when data.world is true."""

    helpsteer_prompts: int = Field(600, ge=0, le=100_000)
    """Prompts with four HelpSteer-form answers each."""
    ultrafeedback_prompts: int = Field(1200, ge=2, le=100_000)
    """Prompts with four UltraFeedback-form answers each; D1 and D2 are their halves."""
    sft_prompts: int = Field(4000, ge=0, le=100_000)
    """Prompts with one answer of mixed quality."""
    tuning_prompts: int = Field(150, ge=0, le=100_000)
    """Prompts that knobs are chosen on (`evaluation.split`)."""
    test_prompts: int = Field(300, ge=1, le=100_000)
    """Prompts that only the final evaluation sees."""


@stage(reads=lambda r: (r.seed, r.world), heavy=False, law="makes")
def world(job: Job) -> None:
    """Write the embedded world's prompts and ratings in the real data sets' forms."""
    from dpalign.world.files import write_world

    counts = {name.removesuffix("_prompts"): count for name, count in job.recipe.world.as_mapping().items()}
    rows = write_world(job.out, job.recipe.seed, counts)
    job.work.tally.add(rows_out=sum(rows.values()))
