"""What a recipe must not say is told when the steps are listed, before anything runs."""

import re
from pathlib import Path

import pytest

from dpalign import recipe
from dpalign.cli import RECIPES, main, shipped
from dpalign.pipeline import align

THREE = '{a = ["helpsteer-helpfulness"], b = ["helpsteer-coherence"], c = ["helpsteer-verbosity"]}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sampling.n 0", "sampling.n is 0; give at least 1"),
        ("--preference.directions 0", "preference.directions is 0; give at least 1"),
        ("--sampling.first_targets 0", "sampling.first_targets is 0; give at least 1"),
        ("--evaluation.temperature -1", "evaluation.temperature is -1; give at least 0"),
        ("--replay 1.0", "replay is 1; give a share of all rows, from 0 to below 1"),
        ("--replay -0.5", "replay is -0.5; give a share of all rows"),
        ("--sampling.first 8", "sampling.first is 8 answers, too few for sampling.first_targets 16; give at least one"),
        (
            "--finetune.micro_batch 3",
            "finetune.batch is 64, and finetune.micro_batch 3; give a batch that is a multiple of its micro-batch",
        ),
        ("--sft.epochs 0", "sft has 0 steps and 0 epochs; give either above 0"),
        ("--finetune.learning_rate 0", "finetune.learning_rate is 0; give one above 0"),
        ("--steerlm.training.save_every 0", "steerlm.training.save_every is 0; give at least 1"),
        ("--reward.training.checkpoint x", "reward.training.checkpoint is 'x': a finished reward model is named in"),
        ("--preference.low 5", "[preference] an arc from 5.0 to 0.0 degrees"),
        ("--evaluation.reference [1.0]", "evaluation.reference has 1 numbers, and [objectives] names 2"),
        (
            "--preference.distribution fixed --preference.listed [[1.0,0.0],[1.0,-1.0]]",
            'evaluation.directions 10 of a preference.distribution of "fixed"',
        ),
        (
            "--preference.distribution grid --preference.points 4",
            'evaluation.directions 10 of a preference.distribution of "grid"',
        ),
        (
            '--objectives {tone=["helpsteer-coherense"]}',
            "objective 'tone' reads head 'helpsteer-coherense', which this reward model lacks (nearest: "
            "'helpsteer-coherence'",
        ),
        (
            f"--objectives {THREE.replace(' ', '')}",
            "preference.distribution is 'arc' over 2 objectives, and [objectives] names 3 (a, b, c); simplex or sphere",
        ),
        (
            f"--objectives {THREE.replace(' ', '')} --preference.distribution cone --preference.center [1.0,-1.0]",
            "preference.distribution is 'cone' over 2 objectives, and [objectives] names 3 (a, b, c)",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_before_anything_runs(
    tmp_path: Path, words: str, said: str
) -> None:
    given = recipe.load(RECIPES / "paper.toml", words.split())
    with pytest.raises(ValueError, match=re.escape(said)):
        align.dry_run(given, tmp_path / "run")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_holds_together(name: str, tmp_path: Path) -> None:
    assert align.dry_run(recipe.load(RECIPES / f"{name}.toml"), tmp_path / "run")


def test_a_stage_alone_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--{name}={tmp_path}" for name in ("policy", "data", "out")]
    with pytest.raises(SystemExit):
        main(["sample", "paper", *given, "--t=1", "--half=D1", "--condition=directions", "--sampling.n=0"])
    assert "sampling.n is 0; give at least 1" in capsys.readouterr().err
