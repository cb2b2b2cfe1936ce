"""What a run needs is asked for before its first stage: packages, GPUs, and batches that divide."""

from pathlib import Path
from typing import Any

import pytest

from conftest import MICRO, RECIPES
from dpalign import cli
from dpalign.pipeline import ready
from dpalign.pipeline.ready import lacking, require_machine, require_split
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, load
from dpalign.train import knobs

EIGHT = ["--launcher", "accelerate", "--processes", "8", "--launch.config", "fsdp2"]
ON_RAY = ["--cluster.address", "local", "--cluster.actors", "8", "--cluster.gpus", "1.0"]


def micro(*words: str) -> Recipe:
    """Micro, with batches that eight processes divide."""
    tables = ("pretrain", "reward.training", "sft", "steerlm.training", "finetune")
    return load(MICRO, [*words, *(w for t in tables for w in (f"--{t}.batch", "8", f"--{t}.micro_batch", "1"))])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of so many GPUs, on which some packages are missing."""

    def with_(gpus: int, *missing: str) -> None:
        monkeypatch.setattr(ready, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(knobs, "find_spec", lambda name: None if name in missing else name)
        monkeypatch.setattr(ready, "version", lambda _: "0.29.0")

    return with_


@pytest.mark.parametrize(
    ("words", "package", "cure"),
    [
        (["--engines.sampling", "vllm"], 'engines.sampling = "vllm" needs vllm', "-e '.[vllm]'"),
        (["--engines.scoring", "vllm"], 'engines.scoring = "vllm" needs vllm', "-e '.[vllm]'"),
        (["--cluster.address", "local", "--cluster.gpus", "1"], 'cluster.address = "local" needs ray', "-e '.[ray]'"),
        (["--kernels.attention", "flash_attention_2"], '"flash_attention_2" needs flash-attn', "flash-attn"),
        (["--kernels.liger", "true"], "kernels.liger = true needs liger-kernel", "liger-kernel"),
        (["--report_to", "trackio"], 'report_to = "trackio" needs trackio', "trackio"),
        ([*EIGHT, "--launch.config", "zero3"], 'launch.config = "zero3" needs deepspeed', "deepspeed"),
    ],
)
def test_a_missing_package_is_named_with_its_knob_and_its_cure(
    machine: Any, words: list[str], package: str, cure: str
) -> None:
    recipe = micro(*words)
    machine(8)
    assert lacking(recipe, steps(recipe)) == []
    machine(8, "vllm", "ray", "flash_attn", "liger_kernel", "trackio", "deepspeed")
    (said,) = lacking(recipe, steps(recipe))
    assert package in said
    assert said.endswith(f"not installed: pip install {cure}")


@pytest.mark.parametrize(
    ("words", "gpus", "enough", "said"),
    [
        (EIGHT, 4, 8, "processes is 8, each on a GPU of its own, and this machine shows 4 GPUs; lower processes"),
        (EIGHT, 0, 8, "processes is 8, each on a GPU of its own, and this machine shows no GPUs; lower processes"),
        (["--launcher", "torchrun", "--processes", "2"], 1, 2, "processes is 2, .* this machine shows 1 GPU; lower"),
        (ON_RAY, 4, 8, "8 actors of 1 CPU and 1 GPU each do not fit .*, which hold 4; lower cluster.actors"),
        (["--cluster.address", "local"], 2, 0, "cluster.gpus is 0, and the cluster has 2 GPUs"),
        (["--engines.sampling", "vllm"], 0, 1, 'engines.sampling = "vllm", whose usual build needs a GPU'),
        (["--engines.sampling", "vllm", "--engines.tensor_parallel", "2"], 1, 2, "tensor_parallel is 2, and this"),
        (["--kernels.liger", "true"], 0, 1, "kernels.liger = true needs a GPU"),
        ([*EIGHT, "--launch.config", "fsdp3"], 8, None, "launch.config is 'fsdp3'"),
    ],
)
def test_gpus_are_counted_before_the_first_stage(
    machine: Any, tmp_path: Path, words: list[str], gpus: int, enough: int | None, said: str
) -> None:
    recipe = micro(*words)
    machine(gpus)
    with pytest.raises(ValueError, match=said):
        execute(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if enough is not None:
        machine(enough)
        require_machine(recipe, steps(recipe))


def test_two_processes_without_gpus_are_torchruns_and_a_command_counts_for_itself(machine: Any) -> None:
    machine(0)
    for words in (["--launcher", "torchrun", "--processes", "2"], [*EIGHT, "--launch.command", "x {run} {step}"]):
        recipe = micro(*words)
        require_machine(recipe, steps(recipe))


def test_what_is_done_asks_for_nothing(machine: Any) -> None:
    recipe = micro(*EIGHT, *ON_RAY)
    machine(0, "vllm", "ray", "torch")
    assert lacking(recipe, [step for step in steps(recipe) if step.stage.name in ("data", "report")]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--processes", "6"],
            "reward.training.batch is 64, and 6 processes with reward.training.micro_batch 8 take 48",
        ),
        (["--reward.training.micro_batch", "1", "--processes", "3"], "take 3 rows at once; make batch a multiple of 3"),
        (["--finetune.batch", "4"], "finetune.batch is 4, and 8 processes with finetune.micro_batch 1 take 8 rows"),
        (["--finetune.packing", "false", "--finetune.micro_batch", "16"], "finetune.batch is 64, .* take 128 rows"),
        (["--rl.samples", "5"], "rl.training.batch is 64, .* rl.samples 5 .* a multiple of 5"),
    ],
)
def test_batches_that_do_not_divide_are_refused_without_a_machine(tmp_path: Path, words: list[str], said: str) -> None:
    """A packed row stands alone in its forward, so micro_batch does not count there."""
    recipe = load(RECIPES / "paper.toml", words)
    with pytest.raises(ValueError, match=said):
        require_split(recipe, steps(recipe, compared=True))
    require_split(load(RECIPES / "paper.toml", ["--finetune.micro_batch", "16"]), steps(recipe, compared=True))


def test_a_dry_run_says_what_is_missing_and_does_not_fail(
    machine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(0)
    cli.main(["run", str(RECIPES / "paper.toml"), "--dry-run", "--out", str(tmp_path / "run")])
    assert "processes is 8, each on a GPU of its own, and this machine shows no GPUs" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
