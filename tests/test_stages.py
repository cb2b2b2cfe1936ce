"""What a stage says it reads is what it reads: each runs once on a recipe that writes access down."""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import pytest

from conftest import MICRO
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES, steps
from dpalign.recipe import Recipe, load
from dpalign.stages.stage import Job, Stage
from recorded import Recorded

EVERY_STAGE = [
    *("--model.base", "", "--pretrain.steps", "2", "--reward.pairwise", "PAIRS"),
    *("--dpo.betas", "[0.1]", "--rsf.directions", "1"),
    *(
        "--rl.directions",
        "1",
        "--rl.training.steps",
        "1",
        "--soups.choices",
        '["axes"]',
        "--steerlm.quantiles",
        "[0.9]",
    ),
]


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """The knobs that each stage read in a comparison of the micro recipe, by the stage's name."""
    pytest.importorskip("trl", reason="training needs the extra train")
    folder = tmp_path_factory.mktemp("reads")
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"prompt": "explain tea", "chosen": "tea is hot.", "rejected": "no"}\n')
    recipe = load(MICRO, [word.replace("PAIRS", str(pairs)) for word in EVERY_STAGE])
    read: dict[str, set[str]] = defaultdict(set)

    def recorded(stage: Stage, job: Job) -> None:
        own = cast(Recipe, Recorded(job.recipe, read[stage.name]))
        stage.function(Job(own, job.work, job.inputs, job.t, job.half, job.condition, job.systems))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "run", recorded)
        runner.execute(recipe, folder / "run", compared=True)
    yield dict(read)
    shutil.rmtree(folder)


OF_THE_MACHINE = {
    *("name", "launcher", "jobs", "processes", "launch", "cluster", "kernels", "report_to"),
    *("engines.gpu_memory", "engines.cpu_cache", "engines.eager", "reward.share_prefix"),
}
"""They say where and how fast a stage runs, and not what comes of it: no stage is redone for these."""

READ_IN_OTHER_RUNS = {
    "threads",  # by every stage, before its function is called
    "engines.tensor_parallel",  # by vLLM
    "evaluation.dpo",  # where a DPO checkpoint is named
    "model.trust_remote_code",  # where a reward is named
    "model.base",  # where no base model is trained
    "sft.checkpoint",  # where it names a folder, which may change though its name stays
}


def under(name: str, names: set[str]) -> bool:
    """Whether a leaf is one of the names, or lies in a table among them."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


@pytest.mark.slow
def test_every_stage_runs_here(reads: dict[str, set[str]]) -> None:
    recipe = load(MICRO, [word.replace("PAIRS", "p") for word in EVERY_STAGE])
    assert {step.stage.name for step in steps(recipe, compared=True)} == set(reads) == set(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_reads_what_it_declares_and_declares_what_it_reads(name: str, reads: dict[str, set[str]]) -> None:
    stage = STAGES[name]
    undeclared = {knob for knob in reads[name] if not under(knob, {*stage.knob_names(), *OF_THE_MACHINE})}
    assert not undeclared, f"{name} reads these, and a change of them would not redo it"
    unread = [
        knob
        for knob in {*stage.knob_names()} - READ_IN_OTHER_RUNS
        if not any(under(leaf, {knob}) for leaf in reads[name])
    ]
    assert not unread, f"{name} declares these for nothing"
