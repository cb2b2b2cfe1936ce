"""What a recipe will cost: counted figures against ones that are known, and a run's own against what it planned."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpalign import cli
from dpalign.engines.knobs import WORLD_BASE
from dpalign.pipeline.plan.command import text
from dpalign.pipeline.plan.count import Efficiency, make
from dpalign.pipeline.plan.hardware import GIB, GPUS, KNOWN, architecture_of, needs, read_architecture
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import HEADS
from dpalign.runs.ledger import read_ledger
from dpalign.stages.cost import Sizes

PAPER = changed(Recipe(name="paper"), {"data.tuning": 0.02})
A6000, H200 = GPUS["A6000"], GPUS["H200"]


def peak(step: str, gpu: Any = A6000, shared: bool = True) -> float:
    """GPU-hours of a step of the paper's recipe at 100% of the peak."""
    plan = make(PAPER, gpus=[gpu], shared=shared)
    return plan.peak_hours(plan.loads[step], gpu)


def test_an_iteration_of_the_paper_costs_what_is_known_to_be_its_count() -> None:
    """32,000 prompts by 80 answers of 300 tokens, and two epochs of 188,235 rows of 520, at 100% of an A6000's peak."""
    assert peak("sample-2") == pytest.approx(20.8, rel=0.01)  # 768M tokens x 14.2 GFLOPs and five readings of a prompt
    assert peak("sample-2", shared=False) - peak("sample-2") == pytest.approx(13.3, rel=0.01)  # 75 readings more
    assert peak("score-2", shared=False) == pytest.approx(33.7, rel=0.01)
    assert peak("score-2") == pytest.approx(19.7, rel=0.01)
    assert peak("policy-2") == pytest.approx(15.1, rel=0.01)
    for step, hours in (("sample-2", 3.2), ("score-2", 3.1), ("policy-2", 2.4)):
        assert peak(step, H200) == pytest.approx(hours, abs=0.07)
    assert peak("score-2", H200, shared=False) == pytest.approx(5.3, abs=0.05)


def test_the_papers_60_hours_can_only_be_its_training() -> None:
    """All three stages with whole prompts scored need 116% of 60 A6000-hours at the peak that nothing reaches; the
    training alone needs a quarter of it, which is what trainings reach."""
    plan = make(PAPER, gpus=[A6000])
    assert plan.hours(plan.loads["policy-2"], A6000) == pytest.approx(60, rel=0.02)
    everything = peak("sample-2") + peak("score-2", shared=False) + peak("policy-2")
    assert everything / 60 == pytest.approx(1.16, abs=0.01)


def test_each_training_and_iteration_is_counted_by_its_own_knobs() -> None:
    plan = make(PAPER, assumed={"prompts": 1000.0, "prompt": 200.0, "answer": 100.0})
    loads = plan.loads
    assert (loads["sample-1"].answers, loads["sample-2"].answers) == (80_000, 80_000)
    assert (loads["sample-1"].read, loads["sample-2"].read) == (1000 * 16 * 200, 1000 * 5 * 200)
    assert loads["score-3"].scored == 80_000
    assert loads["policy-4"].rows == pytest.approx(5000 / 0.85)
    assert loads["policy-4"].trained == pytest.approx(2 * 300 * 5000 / 0.85)
    assert loads["steerlm"].trained == 2 * loads["steerlm-d2"].trained == 2 * 2 * 300 * 4000
    assert loads["evaluate-policy-4"].answers == 2000 * 10 * 2
    assert loads["data"].flops == loads["select-1"].flops == loads["report"].flops == 0


def test_a_comparison_counts_its_contenders_by_the_knobs_of_their_steps() -> None:
    """A specialist draws 16 plain answers a prompt and keeps one."""
    plan = make(PAPER, compared=True, assumed={"prompts": 1000.0})
    assert plan.loads["rsf-1-sample-2"].answers == 16_000
    assert plan.loads["rsf-1-policy-2"].rows == pytest.approx(1000 / 0.85)
    assert plan.loads["dpo-1"].trained == 2 * 2 * 1000 * 520 * 3
    assert plan.loads["rl-1-1"].answers == plan.loads["rl-1-1"].scored == 500 * 64
    assert plan.loads["feasible-policy-4"].answers == 200 * 9


def test_checkpoints_that_are_taken_cost_nothing() -> None:
    recipe = changed(PAPER, {"sft.checkpoint": "HuggingFaceH4/mistral-7b-sft-beta"})
    assert make(recipe).loads["sft"].flops == 0
    assert "training, SFT" not in [need.what for need in make(recipe).needs]
    recipe = changed(
        PAPER, {"rewards": {"dpa": {"model": "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1", "heads": HEADS}}}
    )
    assert make(recipe).loads["reward"].flops == 0
    assert "training, reward model" not in [need.what for need in make(recipe).needs]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_a_known_model_has_as_many_parameters_as_its_page_says(name: str, parameters: int) -> None:
    assert KNOWN[name].parameters == parameters


def test_a_folders_model_has_as_many_parameters_as_its_weights() -> None:
    (file,) = WORLD_BASE.glob("*.safetensors")
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    held = sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    assert read_architecture(WORLD_BASE).parameters == held
    assert KNOWN["mistralai/Mistral-7B-v0.1"].lora(16) == 41_943_040  # what peft says of all-linear at rank 16


def test_a_model_that_cannot_be_counted_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.base 'mistralai/Mistral' .*\(nearest: 'mistralai/Mistral-7B-v0.1'"):
        architecture_of(load(cli.recipe_file("paper"), ["--model.base", "mistralai/Mistral"]))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(ValueError, match=r"config.json: no key 'vocab_size'; only decoders"):
        read_architecture(tmp_path)


def test_a_7b_model_trains_on_four_a6000_or_one_h200_and_its_lora_on_one_of_either() -> None:
    """7.24e9 float32 weights, with gradient and AdamW's two numbers: 16 bytes each, 108 GiB."""
    needed = {need.what: need for need in make(PAPER).needs}
    policy = needed["training, policy"]
    assert policy.model / GIB == pytest.approx(7.2417 * 16 / 1.0737, rel=1e-3)
    assert policy.verdict(A6000, 1) == "no: 4 by FSDP or ZeRO-3, or a LoRA"
    assert policy.verdict(A6000, 4) == "yes: 4 by FSDP or ZeRO-3"
    assert policy.verdict(H200, 1) == "yes"
    recipe = load(cli.recipe_file("paper"), ["--finetune.lora_rank", "16"])
    lora = {need.what: need for need in make(recipe).needs}["training, policy"]
    assert lora.verdict(A6000, 1) == "yes"
    sampling = {need.what: need for need in needs(PAPER, architecture_of(PAPER), Sizes(), [])}["sampling"]
    # 256 answers of 520 tokens at 2 x 32 layers x 8 heads x 128 x 2 bytes a token
    assert sampling.beside == 256 * 520 * 131_072
    assert sampling.verdict(GPUS["RTX4090"], 8) == "yes: 2 by tensor parallel"


def test_memory_is_told_of_what_the_run_trains() -> None:
    """Reinforcement in float32 also holds SFT in float32 and the reward model in bfloat16."""

    def told(**asked: bool) -> dict[str, float]:
        return {need.what: need.beside for need in make(PAPER, **asked).needs if need.what.startswith("training")}

    own = ["training, reward model", "training, SFT", "training, SteerLM", "training, policy"]
    assert list(told()) == own
    compared = told(compared=True)
    assert list(compared) == [*own, "training, DPO", "training, reinforcement"]
    assert compared["training, reinforcement"] > (4 + 2) * 7_241_732_096


def test_a_lora_leaves_whole_models_and_needs_room_for_adapters_alone() -> None:
    """Of 7.24e9 weights, a checkpoint has 12 bytes each (AdamW); of a rank of 16, 41,943,040 learn."""
    ranks = [f"--{training}.lora_rank" for training in ("reward.training", "sft", "steerlm.training", "finetune")]
    whole = make(load(cli.recipe_file("paper"))).disk
    room, seven = "while training (two checkpoints)", 7_241_732_096
    assert whole[room] == 2 * 12 * seven
    some = make(load(cli.recipe_file("paper"), ["--finetune.lora_rank", "16"])).disk
    assert some[room] == 2 * 12 * seven  # SteerLM learns in full
    small = make(load(cli.recipe_file("paper"), [word for rank in ranks for word in (rank, "16")])).disk
    assert small[room] == 2 * 12 * 41_943_040
    assert {**small, room: 0.0} == {**whole, room: 0.0}
    (models,) = (size for name, size in small.items() if name.endswith("trained models"))
    assert models == 8 * 2 * seven  # reward model, judge, two SteerLMs, four policies, in bfloat16; SFT is taken
    root = make(load(cli.recipe_file("paper"), ["--finetune.optimizer", "rmsprop"])).disk
    assert root[room] == 2 * 12 * seven  # the others keep AdamW's two numbers


def test_sampling_takes_no_less_than_its_memory_allows() -> None:
    """One answer at a time, an H200 reads 14.5 GB of weights a token: 3.0 ms at 4,800 GB/s, whatever it computes."""
    recipe = load(cli.recipe_file("paper"), ["--sampling.rows", "1", "--iterations", "1"])
    plan = make(recipe, gpus=[H200], assumed={"prompts": 1.0})
    assert plan.hours(plan.loads["sample-1"], H200) * 3600 == pytest.approx(80 * 300 * 3.0e-3, rel=0.03)


@pytest.mark.parametrize("name", cli.shipped())
def test_every_installed_recipe_is_planned(name: str) -> None:
    table = text(make(load(cli.recipe_file(name)), gpus=[A6000, GPUS["cpu"]], count=2))
    assert [word for word in ("sample-1", "policy-1", "GiB", "--mfu") if word not in table] == []


def test_the_plan_is_a_verb_that_prints_json_and_needs_no_torch() -> None:
    words = ["plan", "paper", "--gpu", "H100", "A6000", "--mfu", "training=0.5", "--assume", "prompts=100", "--json"]
    code = (
        "import sys; from dpalign import cli; cli.main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    figures = json.loads(said)
    assert figures["assumed"]["mfu"] == {"sampling": 0.4, "scoring": 0.5, "training": 0.5}
    steps = {step["step"]: step for step in figures["steps"]}
    assert steps["sample-2"]["answers"] == 8000
    assert set(figures["total"]["gpu_hours"]) == {"H100", "A6000"}
    assert figures["total"]["hours_as_measured"] is None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--mfu", "training=1.5"], "training=1.5: a share of the peak"),
        (["--mfu", "trainig=0.5"], "trainig=0.5: no such name .*nearest: 'training'"),
        (["--assume", "answer=long"], "answer=long: give NAME=NUMBER"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--run", "nowhere"], "--run nowhere: no finished stage"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "paper", *words])
    assert re.search(error, capsys.readouterr().err)


def test_a_run_tells_its_lengths_and_rates(micro_run: Path) -> None:
    """What is planned from a finished run is what that run did.

    Less so for what policies train on: most answers of so small a model are cut, and those that are kept are short.
    """
    plan = make(load(micro_run / "recipe.toml"), run=micro_run)
    made = {"sample-1": ("sampled", 0.35), "score-1": ("scored", 0.35), "reward": ("trained", 0.35)}
    for name, (unit, within) in (made | {"policy-1": ("trained", 0.6)}).items():
        ledger = read_ledger(micro_run / name)
        assert getattr(plan.loads[name], unit) == pytest.approx(ledger["tokens"][unit], rel=within), name
    ledgers = [read_ledger(path.parent) for path in micro_run.glob("score-*/ledger.json")]
    scored = sum(ledger["tokens"]["scored"] for ledger in ledgers) / sum(ledger["seconds"] for ledger in ledgers)
    assert plan.rates is not None
    assert plan.rates.scoring == pytest.approx(scored)
    assert plan.measured_hours(plan.loads["score-1"]) == pytest.approx(plan.loads["score-1"].scored / scored / 3600)
    assert "as measured" in text(plan)
    assert Efficiency().training == 0.25
