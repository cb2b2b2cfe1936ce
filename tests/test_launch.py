"""Training in several processes: the same as in one, refused where it would not be, and no update lost to rounding."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

import spread_work
from conftest import MICRO
from dpalign import recipe
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES
from dpalign.rows import HEADS, RATED, write_rows
from dpalign.runs import folder as runs
from dpalign.runs.launch import LAUNCHED, configuration, launch
from dpalign.runs.ledger import read_ledger
from dpalign.stages.stage import Step
from dpalign.train.knobs import Training
from dpalign.train.sft import sft_trainer, tokenize
from dpalign.train.trainer import RunContext, fit, training_dtype
from tiny import CHATS, changed
from trainings import RATED as ROWS
from trainings import rated, run

TRAININGS = ("sft", "packed", "reward", "dpo")
SMALL_STEPS = Training(
    schedule="constant", warmup_steps=0, steps=20, batch=2, micro_batch=2, context=96, packing=False, loss_on="answer"
)
"""Twenty updates at section 3.1's learning rate, 1e-5."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Three kinds of training in this one process."""
    out = tmp_path_factory.mktemp("alone")
    spread_work.main(str(tiny_folder), out, "float32")
    return out


def torchrun(*words: object, **more: str) -> int:
    """Run `spread_work.py` in two processes; returns the exit code, of which all but a kill is a failure."""
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [Path(tests) / "spread_work.py", *words]
    done = subprocess.run(
        [*command, *map(str, script)],
        env=os.environ | {"PYTHONPATH": paths} | more,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-3000:]
    return done.returncode


def require_equal_models(one: Path, two: Path, within: float) -> None:
    for name in TRAININGS:
        weights = [load_file(out / name / "model.safetensors") for out in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) <= within
        assert (one / name / "config.json").read_text() == (two / name / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["a copy each", "one model"])
def test_two_processes_train_what_one_does(tmp_path: Path, tiny_folder: Path, alone: Path, shared: bool) -> None:
    """SFT, packed SFT, the reward model and DPO at one global batch; five updates move a weight by up to 2.5e-3.

    With one model it is FSDP2 for real, each process with half of every weight, as accelerate does it on GPUs.
    """
    assert torchrun(tiny_folder, tmp_path, "float32", **(spread_work.sharing() if shared else {})) == 0
    require_equal_models(alone, tmp_path, within=1e-5)
    losses = [json.loads((out / "losses.json").read_text()) for out in (alone, tmp_path)]
    assert losses[0].keys() == set(TRAININGS)
    for name in TRAININGS:
        assert losses[1][name] == pytest.approx(losses[0][name], abs=1e-5)  # rows, tokens, updates and loss


@pytest.mark.faults
@pytest.mark.parametrize("shared", [False, True], ids=["a copy each", "one model"])
def test_two_processes_of_which_one_is_killed_go_on_to_what_one_trains(
    tmp_path: Path, tiny_folder: Path, alone: Path, shared: bool
) -> None:
    """Each of the four trainings loses a process after its third update, and goes on from the second."""
    codes = []
    while not codes or codes[-1]:
        assert len(codes) <= len(TRAININGS), "one more kill than trainings"
        codes.append(torchrun(tiny_folder, tmp_path, "float32", "killed", **(spread_work.sharing() if shared else {})))
    made = [steps.read_text() for steps in tmp_path.glob("steps-*")]
    assert made == ["1 2 3 3 4 5"] * len(TRAININGS)
    require_equal_models(alone, tmp_path, within=1e-5)


@pytest.mark.slow
def test_one_shared_model_in_bfloat16_keeps_rewards_labels_loss_and_sums_in_float32(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """accelerate alone would have FSDP2 keep nothing: a reward of 6.17 would be 6.15625."""
    assert torchrun(tiny_folder, tmp_path, "bfloat16", "watched", **spread_work.sharing()) == 0
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"watched-{rank}.json").read_text())
        assert seen["head"] == seen["loss"] == seen["sums"] == ["torch.float32"]
        assert seen["rounded rewards"] == ["False"]
        assert seen["labels"] == ["57.58"]
        assert seen["other weights"] == ["torch.bfloat16"]


def launched(tmp_path: Path, tiny_folder: Path, *words: str) -> Path:
    """The reward stage of a run in two processes."""
    labels = dict.fromkeys(HEADS, 50.0)
    rows = [rated(row["messages"][-1]["content"], row["response"]) | {"labels": labels} for row in ROWS]
    for folder in ("train", "heldout"):
        write_rows(tmp_path / "data" / folder / "part-00000.parquet", [r | {"source": "x"} for r in rows], RATED)
    read = recipe.load(
        MICRO, ["--processes", "2", "--reward.training.micro_batch", "4", "--data.world", "false", *words]
    )
    with runs.Run.open(tmp_path / "run", None, {}) as run:
        runner.take(
            read, run, Step("reward", STAGES["reward"], {"data": tmp_path / "data", "base": tiny_folder.parent})
        )
    return tmp_path / "run" / "reward"


@pytest.mark.slow
def test_a_stage_is_spread_by_torchrun_or_by_a_command_of_ones_own_and_written_once(
    tmp_path: Path, tiny_folder: Path
) -> None:
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    own = f"{torchrun} -m dpalign.pipeline.worker {{run}} {{step}}"
    for name, words in (("torchrun", []), ("command", ["--launch.command", own])):
        stage = launched(tmp_path / name, tiny_folder, "--launcher", "torchrun", *words)
        ledger = read_ledger(stage)
        assert ledger["counts"] == {"in": 6, "out": 6, "filtered": {}}
        assert {"quality.json", "model/model.safetensors"} <= set(ledger["outputs"])
    assert ledger["digest"] == read_ledger(tmp_path / "torchrun" / "run" / "reward")["digest"]


def test_a_command_of_ones_own_may_have_other_braces() -> None:
    """A run folder with a space stays one word, and a shell's variable stays for the shell."""
    told = "import sys; sys.exit(sys.argv[1:] != ['${JOB}', '/a run', 'sft'])"
    read = recipe.load(MICRO, ["--launch.command", f'{sys.executable} -c "{told}" ${{JOB}} {{run}} {{step}}'])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert launch(read.launch, read.launcher, 2, "/a run", "sft") == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without GPUs")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("distributed_type: MULTI_CPU\nuse_cpu: true\n", "2 processes were asked for, and accelerate started one"),
        (None, "launch.config asks for FSDP, and accelerate left it out: it needs GPUs"),
    ],
)
def test_a_training_that_accelerate_would_not_spread_is_refused(
    tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str], config: str | None, said: str
) -> None:
    file = tmp_path / "cpu.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\nmixed_precision: 'no'\nnum_machines: 1\n{config}")
    words = ["--launcher", "accelerate", "--launch.config", str(file) if config else "fsdp2"]
    with pytest.raises(ValueError, match="stage reward: its process ended with code"):
        launched(tmp_path, tiny_folder, *words)
    assert said in capfd.readouterr().err


def test_a_configuration_is_one_of_trls_or_a_file(tmp_path: Path) -> None:
    assert "fsdp_version: 2" in configuration("fsdp2").read_text()
    assert all(f"zero_stage: {stage}" in configuration(f"zero{stage}").read_text() for stage in (2, 3))
    with pytest.raises(
        ValueError, match=r"launch\.config is 'fsdp3': neither one of fsdp2, zero2, zero3 nor a YAML file"
    ):
        configuration("fsdp3")
    with pytest.raises(ValueError, match=r"launch.command is 'srun job', without \{run\}"):
        recipe.load(MICRO, ["--launch.command", "srun job"])
    assert LAUNCHED not in os.environ


# Rounding


def movement(start: Path, loaded: str, scratch: Path) -> tuple[float, float]:
    """The share of the weights that twenty updates move, and by how much the mean weight moves in 1e-5."""
    tokens = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype="bfloat16").to(getattr(torch, loaded))
    before = [weight.detach().clone() for weight in model.parameters()]
    rows = list(tokenize(CHATS, tokens, SMALL_STEPS))
    context = RunContext(str(start), SMALL_STEPS, tokens, scratch, seed=0, resume=scratch, dtype="bfloat16")
    fit(sft_trainer(model, rows, context))
    moved = torch.cat(
        [(w.detach() - b).abs().float().flatten() for w, b in zip(model.parameters(), before, strict=True)]
    )
    return (moved > 0).float().mean().item(), moved.mean().item() / 1e-5


def test_small_steps_are_lost_in_bfloat16_weights_and_kept_in_float32_ones(tmp_path: Path, tiny_folder: Path) -> None:
    """At 1e-5 a step, next to weights of 0.1, whose neighbours in bfloat16 are 5e-4 away."""
    kept, far = movement(tiny_folder, training_dtype("bfloat16", lora_rank=0), tmp_path / "a")
    lost, near = movement(tiny_folder, "bfloat16", tmp_path / "b")
    assert kept > 0.9
    assert lost < 0.2
    assert far > 3 * near


@contextmanager
def trained_types() -> Iterator[set[torch.dtype]]:
    seen: set[torch.dtype] = set()

    def look(optimizer: Any, *_: Any) -> None:
        seen.update(weight.dtype for group in optimizer.param_groups for weight in group["params"])

    hook = register_optimizer_step_pre_hook(look)
    yield seen
    hook.remove()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_whatever_is_trained_is_float32_and_what_is_left_is_of_the_recipes_type(
    tmp_path: Path, tiny_folder: Path, lora_rank: int
) -> None:
    training = changed(SMALL_STEPS, steps=1, lora_rank=lora_rank)
    with trained_types() as seen:
        run("sft", tiny_folder, tmp_path / "sft", training, told={"dtype": "bfloat16"})
        run("reward", tiny_folder, tmp_path / "reward", training, told={"dtype": "bfloat16"})
    assert seen == {torch.float32}
    for name in ("sft", "reward"):
        stored = {weight.dtype for weight in load_file(tmp_path / name / "model.safetensors").values()}
        assert stored == {torch.bfloat16}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
