"""What a stage declares is what it reads: a comparison runs every stage on a recipe that writes access down."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.paper.objectives import PAPER_OBJECTIVES
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES
from dpalign.recipe import Compare, load
from dpalign.runs.tables import literal
from recorded import READ_BY_ALL, Reads, reads_recorded, undeclared
from test_rewards import write_chat_model

EVERY_STAGE = [
    *("--model.base", "", "--pretrain.steps", "2", "--reward.pairwise", "PAIRS"),
    *("--dpo.betas", "[0.1]", "--rsf.directions", "1", "--evaluation.divergence", "2"),
    *("--rl.directions", "1", "--rl.training.steps", "1", "--policy.grpo.training.steps", "1"),
    *("--policy.method", '["rsf", "dpo"]', "--selection.reach", "180", "--sampling.n", "16"),
    *("--compare.systems", literal((*Compare().systems, "moc"))),
    *("--soups.choices", '["axes"]', "--steerlm.quantiles", "[0.9]"),
    *("--rewards.rm.trained", "true", "--rewards.short.function", "dpalign.rewards.functions:words"),
    *("--rewards.given.model", "MODEL", "--objectives", literal({o.name: o.heads for o in PAPER_OBJECTIVES})),
]
READ_IN_OTHER_RUNS = {
    READ_BY_ALL,
    "engines.tensor_parallel",  # by vLLM
    "evaluation.dpo",  # where a DPO checkpoint is named
    "dpo.prompt",  # by evaluations, where a DPO checkpoint is named
    "model.trust_remote_code",  # where a reward is named
    "model.base",  # where no base model is trained
    "sft.checkpoint",  # where it names a folder, which may change though its name stays
}


@pytest.fixture(scope="module")
def reads(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reads]:
    """The knobs that each stage read in a comparison of the micro recipe."""
    pytest.importorskip("trl", reason="training needs the extra train")
    folder = tmp_path_factory.mktemp("reads")
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"prompt": "explain tea", "chosen": "tea is hot.", "rejected": "no"}\n')
    read: Reads = {}
    with reads_recorded(read):
        given = {"PAIRS": str(pairs), "MODEL": str(write_chat_model(tiny_folder, folder / "given"))}
        words = [given.get(word, word) for word in EVERY_STAGE]
        runner.execute(load(MICRO, words), folder / "run", compared=True)
    yield read
    shutil.rmtree(folder)


@pytest.mark.slow
def test_every_stage_reads_only_what_it_declares(reads: Reads) -> None:
    assert {name for name, _ in reads} == set(STAGES)
    assert undeclared(reads) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_declares_nothing_that_it_never_reads(name: str, reads: Reads) -> None:
    stage, own = STAGES[name], {condition: read for (one, condition), read in reads.items() if one == name}
    assert unread(stage.knob_names(""), set().union(*own.values())) == []
    for condition in stage.reads_under.keys() & own.keys():
        assert unread({*stage.knob_names(condition)} - {*stage.knob_names("")}, own[condition]) == [], condition


def unread(knobs: Iterable[str], leaves: set[str]) -> list[str]:
    """The knobs of which no leaf is among those that were read."""
    asked = {*knobs} - READ_IN_OTHER_RUNS
    return [knob for knob in asked if not any(leaf == knob or leaf.startswith(f"{knob}.") for leaf in leaves)]
