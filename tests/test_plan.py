"""What a recipe will cost: counted figures against ones that are known, and a run's own against what it planned."""

import json
import math
import re
import struct
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from dpalign import cli
from dpalign.engines.architecture import KNOWN, read_architecture
from dpalign.engines.knobs import WORLD_BASE
from dpalign.pipeline.plan.command import plan_text
from dpalign.pipeline.plan.count import Efficiency, Plan, make
from dpalign.pipeline.plan.hardware import GIB, GPUS, READ_TOKENS, Need, architecture_of, needs
from dpalign.pipeline.plan.measured import elapsed
from dpalign.pipeline.shipped import recipe_file
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import HEADS
from dpalign.runs.environment import shipped
from dpalign.runs.ledger import read_ledger
from dpalign.stages.cost import Sizes
from dpalign.stages.reward import HEAD_ROWS
from dpalign.stages.select import select
from dpalign.stages.stage import Step

PAPER = changed(Recipe(name="paper"), {"data.tuning": 0.02})
A6000, A100, H100, H200 = GPUS["A6000"], GPUS["A100"], GPUS["H100"], GPUS["H200"]
SEVEN = 7_241_732_096
"""Weights of Mistral-7B."""

ALONE = ["--sft.checkpoint", "", "--cluster.address", "", "--cluster.actors", "1", "--cluster.gpus", "0"]
ALONE += ["--engines.sampling", "transformers", "--engines.scoring", "transformers", "--evaluation.shards", "1"]
SPREAD = ["--sft.checkpoint", "HuggingFaceH4/mistral-7b-sft-beta", "--cluster.address", "local"]
SPREAD += ["--cluster.actors", "8", "--cluster.gpus", "1", "--engines.sampling", "vllm", "--engines.scoring", "vllm"]
SPREAD += ["--evaluation.shards", "8"]


def on_eight(*words: str, alone: bool = False, **asked: Any) -> Plan:
    """The plan of recipes/paper.toml on eight A100: with eight actors of vLLM, or one process of transformers."""
    recipe = load(recipe_file("paper"), [*(ALONE if alone else SPREAD), *words])
    return make(recipe, **{"gpus": [A100], "count": 8, **asked})


def need(plan: Plan, what: str) -> Need:
    """What one kind of work holds."""
    (found,) = (need for need in plan.needs if need.what == what)
    return found


def figures_of(words: list[str]) -> Any:
    """What the command prints as JSON."""
    with redirect_stdout(StringIO()) as printed:
        cli.main(words)
    return json.loads(printed.getvalue())


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


def test_a_judge_scores_only_the_answers_that_best_of_n_keeps() -> None:
    """The reward model scores 2 x 16 answers to each of 2,000 prompts; the judge 2 at each of 10 directions."""
    plan = make(changed(PAPER, {"data.judge": 0.2}), compared=True)
    assert plan.loads["evaluate-sft-best-of-n"].answers == 2000 * 2 * 16
    assert plan.loads["evaluate-sft-best-of-n"].scored == 2000 * (2 * 16 + 10 * 2)
    assert plan.loads["evaluate-sft"].scored == 2000 * (2 + 2)


def test_checkpoints_that_are_taken_cost_nothing() -> None:
    recipe = changed(PAPER, {"sft.checkpoint": "HuggingFaceH4/mistral-7b-sft-beta"})
    assert make(recipe).loads["sft"].flops == 0
    assert "training, SFT" not in [need.what for need in make(recipe).needs]
    recipe = changed(
        PAPER, {"rewards": {"dpa": {"model": "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1", "heads": HEADS}}}
    )
    given = make(recipe).loads["reward"]
    assert (given.training, given.fitting, given.flops) == (0, 0, given.measuring)
    # It is measured all the same: on 1 of 20 prompts, where 19 of 20 have 291,000 answers.
    assert given.scored == pytest.approx(291_000 / 19)
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
        architecture_of(load(recipe_file("paper"), ["--model.base", "mistralai/Mistral"]))
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
    recipe = load(recipe_file("paper"), ["--finetune.lora_rank", "16"])
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
    whole = make(load(recipe_file("paper"))).disk
    room, seven = "while training (three checkpoints)", 7_241_732_096
    assert whole[room] == 3 * 12 * seven
    some = make(load(recipe_file("paper"), ["--finetune.lora_rank", "16"])).disk
    assert some[room] == 3 * 12 * seven  # SteerLM learns in full
    small = make(load(recipe_file("paper"), [word for rank in ranks for word in (rank, "16")])).disk
    assert small[room] == 3 * 12 * 41_943_040
    assert {**small, room: 0.0} == {**whole, room: 0.0}
    (models,) = (size for name, size in small.items() if name.endswith("trained models"))
    assert models == 8 * 2 * seven  # reward model, judge, two SteerLMs, four policies, in bfloat16; SFT is taken
    root = make(load(recipe_file("paper"), ["--finetune.optimizer", "rmsprop"])).disk
    assert root[room] == 3 * 12 * seven  # the others keep AdamW's two numbers


def test_pairs_take_disk_once_however_many_trainings_share_them() -> None:
    """Each of 32,000 prompts has five directions, and two pairs for each: a prompt and two answers."""
    learner = make(load(recipe_file("paper"), ["--policy.method", '["rsf", "dpo"]', "--iterations", "2"]))
    sizes, chosen = learner.sizes, learner.loads["policy-2"].rows
    pair = (sizes.prompt + 2 * sizes.answer) * sizes.text_bytes
    assert chosen == 32_000 * 5 * 2 * 2
    assert learner.disk["pairs"] == pytest.approx(chosen / 2 * pair)
    rival = {
        betas: make(load(recipe_file("paper"), ["--dpo.betas", betas, "--compare.systems", '["dpo"]']), compared=True)
        for betas in ("[0.1]", "[0.1, 0.5]")
    }
    assert rival["[0.1]"].disk["pairs"] == rival["[0.1, 0.5]"].disk["pairs"] > 0


def test_sampling_takes_no_less_than_its_memory_allows() -> None:
    """One answer at a time, an H200 reads 14.5 GB of weights a token: 3.0 ms at 4,800 GB/s, whatever it computes."""
    words = ["--engines.sampling", "vllm", "--sampling.rows", "1", "--iterations", "1"]
    recipe = load(recipe_file("paper"), words)
    plan = make(recipe, gpus=[H200], assumed={"prompts": 1.0})
    assert plan.hours(plan.loads["sample-1"], H200) * 3600 == pytest.approx(80 * 300 * 3.0e-3, rel=0.03)


def test_transformers_decodes_no_faster_than_it_launches_32_layers() -> None:
    """25.6 ms a token on the fastest GPU, where its memory would allow 4.3 ms."""
    recipe = load(recipe_file("paper"), [*ALONE, "--sampling.rows", "1", "--iterations", "1"])
    plan = make(recipe, gpus=[H100], assumed={"prompts": 1.0})
    assert plan.hours(plan.loads["sample-1"], H100) * 3600 == pytest.approx(80 * 300 * 32 * 0.8e-3)


def test_one_process_is_one_gpu_and_a_training_is_its_processes() -> None:
    plan = on_eight(alone=True)
    gpus = {name: spread.gpus for name, spread in plan.spreads.items() if plan.loads[name].flops}
    trained = ("reward", "judge", "sft", "steerlm-d2", "policy-1", "policy-2", "policy-3", "policy-4", "steerlm")
    assert {name for name, count in gpus.items() if count == 8} == {*trained}
    assert {count for name, count in gpus.items() if name not in trained} == {1}
    assert plan.elapsed("sample-2", A100) == plan.hours(plan.loads["sample-2"], A100)
    assert plan.elapsed("policy-2", A100) == plan.hours(plan.loads["policy-2"], A100) / 8
    assert 'cluster.address = "local", cluster.actors = 8, cluster.gpus = 1.0' in plan.spreads["score-1"].cure
    alone = on_eight("--launcher", "process", "--processes", "1", "--launch.config", "", alone=True)
    assert alone.spreads["policy-2"].gpus == 1
    assert "processes = 8" in alone.spreads["policy-2"].cure


def test_eight_actors_make_125_shards_in_sixteen_rounds() -> None:
    """32,000 prompts, 256 a shard: the actors that have no sixteenth shard wait for those that have."""
    plan = on_eight()
    hours = plan.hours(plan.loads["sample-2"], A100)
    assert plan.spreads["sample-2"].gpus == plan.spreads["score-2"].gpus == 8
    assert plan.elapsed("sample-2", A100) == pytest.approx(hours * 16 / 125)
    assert plan.spreads["evaluate-policy-4"].speed == pytest.approx(8)  # eight shards of 250 prompts
    assert plan.spreads["annotate"].speed == pytest.approx(62.5 / 8)  # 256,000 answers, 4,096 a shard
    assert {name for name, spread in plan.spreads.items() if spread.cure} == {"reward", "judge"}
    assert plan.busy(plan.loads, A100) > 0.95 * 8 * plan.wall(A100)


def test_too_few_shards_leave_gpus_idle() -> None:
    """200 prompts are one shard, and the 1,280 of tuning are five."""
    plan = on_eight("--evaluation.shards", "1", "--data.tuning", "0.02", compared=True)
    assert (plan.spreads["feasible-policy-4"].gpus, plan.spreads["feasible-policy-4"].speed) == (1, 1)
    assert (plan.spreads["tune-dpo-1"].gpus, plan.spreads["tune-dpo-1"].speed) == (5, 5)
    assert "evaluation.shards = 8" in plan.spreads["feasible-policy-4"].cure
    assert on_eight(compared=True).spreads["feasible-policy-4"].speed == pytest.approx(8)  # 25 prompts each
    half = on_eight("--cluster.actors", "4")
    assert (half.spreads["sample-2"].gpus, half.spreads["sample-2"].speed) == (4, pytest.approx(125 / 32))
    assert "cluster.actors = 8" in half.spreads["sample-2"].cure
    assert "cluster.gpus is 0" in on_eight("--cluster.gpus", "0").spreads["sample-2"].cure


def test_what_one_gpu_does_alone_is_not_divided() -> None:
    """Each process fits the head on 2,048 rows in float32 (19.5 TFLOPS, half of them reached); then the first measures
    the model on held-out answers in bfloat16 (312), while seven wait."""
    plan = on_eight()
    load = plan.loads["reward"]
    row = 2 * 6_979_321_856 * 520 + 4 * 32 * 32 * 128 * (220 * 110 + 300 * 370)  # FLOPs; the weights without embeddings
    assert load.fitting == pytest.approx(2048 * row)
    one = load.fitting / (19.5e12 * 0.5 * 3600) + load.measuring / (312e12 * 0.5 * 3600)
    trained = load.training / (312e12 * 0.25 * 3600)
    assert plan.elapsed("reward", A100) == pytest.approx(one + trained / 8)
    probe = on_eight("--reward.freeze", "true", "--reward.lm_loss", "0")
    assert probe.loads["reward"].measuring == probe.loads["reward"].flops
    assert (probe.spreads["reward"].gpus, probe.elapsed("reward", A100)) == (
        1,
        probe.hours(probe.loads["reward"], A100),
    )


def test_constants_that_a_plan_repeats_are_those_of_the_code() -> None:
    model = pytest.importorskip("dpalign.rewards.model")
    assert (HEAD_ROWS, READ_TOKENS) == (model.PROBE_ROWS, model.READ_TOKENS)


def test_reinforcement_decodes_few_answers_side_by_side() -> None:
    """64 answers over 8 processes are 8 rows: 500 updates of 64 x 300 tokens are 1.2 million steps of 25.6 ms."""
    plan = on_eight(compared=True)
    assert plan.loads["rl-1-1"].decodes == 500 * 64 * 300 / 8
    assert plan.hours(plan.loads["rl-1-1"], A100) > 1.2e6 * 25.6e-3 / 3600


def test_the_gpus_are_those_that_the_recipe_asks_for() -> None:
    paper = load(recipe_file("paper"), SPREAD)
    assert make(paper).count == make(load(recipe_file("paper"), ALONE)).count == 8
    assert make(load(recipe_file("one-gpu"))).count == 1
    assert make(changed(paper, {"cluster.actors": 16})).count == 16
    assert max(spread.gpus for spread in make(paper, count=4).spreads.values()) == 4


def test_a_price_is_of_all_gpus_for_all_hours() -> None:
    words = ["plan", "paper", "--gpu", "A100", "H100", "--gpus", "8", "--price", "2", "H100=3.5", "--json", *SPREAD]
    total = figures_of(words)["total"]
    for kind, price in (("A100", 2), ("H100", 3.5)):
        assert total["price"][kind] == pytest.approx(8 * price * total["hours_elapsed"][kind])
        assert total["gpu_hours"][kind] < 8 * total["hours_elapsed"][kind]


@pytest.mark.parametrize("name", ["world", "demo", "micro", "real"])
def test_the_hours_of_a_small_model_are_not_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPA_REAL_DATA", "data")
    figures = figures_of(["plan", name, "--gpu", "A6000", "cpu", "--price", "1", "--json"])
    nothing = {"A6000": None, "cpu": None}
    assert figures["total"]["gpu_hours"] == figures["total"]["hours_elapsed"] == figures["total"]["price"] == nothing
    assert figures["total"]["sampled"] > 0
    assert {step["hours_elapsed"]["cpu"] for step in figures["steps"]} == {None}


def test_what_is_counted_of_smollm_on_a_cpu_is_near_what_it_does() -> None:
    """One busy core read 200 tokens a second with 135 million parameters, decoded 190 and trained on 50."""
    recipe = changed(PAPER, {"model.base": "HuggingFaceTB/SmolLM2-135M-Instruct", "model.dtype": "float32"})
    plan, cpu = make(recipe), GPUS["cpu"]
    loads = plan.loads
    assert loads["sample-2"].sampled / plan.hours(loads["sample-2"], cpu) / 3600 == pytest.approx(190, rel=0.1)
    assert loads["score-2"].read / plan.hours(loads["score-2"], cpu) / 3600 == pytest.approx(200, rel=0.6)
    assert loads["policy-2"].trained / plan.hours(loads["policy-2"], cpu) / 3600 == pytest.approx(50, rel=0.2)


def test_logits_are_held_where_a_loss_upcasts_them() -> None:
    """The reward model's loss on 8 rows of 4,096 tokens has 32,000 float32 numbers a token three times: 12.6 GB. TRL's
    trainers have none."""
    plan = on_eight("--reward.lm_loss", "1")
    assert need(plan, "training, reward model").logits == 8 * 4096 * 32_000 * 3 * 4
    assert need(plan, "training, policy").logits == need(plan, "training, SteerLM").logits == 0
    assert need(on_eight("--reward.lm_loss", "0"), "training, reward model").logits == 0


def test_fsdp2_keeps_gradients_whole_over_the_micro_batches_of_an_update() -> None:
    """64 rows by 8 processes are 8 forwards of one: 4 bytes a weight on each GPU, beside an eighth of 16."""
    policy = need(on_eight(), "training, policy")
    assert (policy.model, policy.gradients) == (16 * SEVEN, 4 * SEVEN)
    assert policy.on(8) == policy.model / 8 + policy.gradients + policy.beside
    assert (policy.verdict(A100, 8), policy.verdict(A6000, 8)[:2]) == ("yes: 4 by FSDP or ZeRO-3", "no")
    assert need(on_eight("--finetune.batch", "8"), "training, policy").gradients == 0  # one forward an update
    zero = need(on_eight("--launch.config", "zero3"), "training, policy")
    assert (zero.gradients, zero.verdict(A6000, 8)) == (0, "yes: 4 by FSDP or ZeRO-3")
    assert need(on_eight(), "training, reward model").gradients == 0  # 8 rows by 8 processes are a batch


def test_an_evaluation_holds_the_policy_the_rewards_and_the_judge() -> None:
    """Three models in bfloat16 are 43 GB; under vLLM each scorer has a quarter of 90% of a GPU."""
    assert need(on_eight("--data.judge", "0.1", alone=True), "evaluation").model == 3 * 2 * SEVEN
    assert need(on_eight("--data.judge", "0", alone=True), "evaluation").model == 2 * 2 * SEVEN
    vllm = need(on_eight(), "evaluation")
    one = 131_072 * (1024 + 2048)  # keys and values of the longest answer with its prompt
    assert vllm.room == pytest.approx((2 * SEVEN + one) / 0.225)  # 62 GiB
    assert (vllm.least(A100), vllm.least(A6000)) == (1, 2)


def test_a_judge_has_a_share_of_vllm_of_its_own() -> None:
    """Two rewards share a quarter of 90% of a GPU, the judge has another: 0.45 of 0.9 is left to the policy."""
    rewards = {"own": {"trained": True}, "other": {"model": "some/model", "heads": HEADS}}
    objectives = {name: [f"own/{head}"] for name, head in (("help", HEADS[0]), ("words", HEADS[-1]))}
    mixed = {"engines.scoring": "vllm", "rewards": rewards, "objectives": objectives, "data.judge": 0.1}
    plan = make(changed(load(recipe_file("paper"), ALONE), mixed | {"sampling.rows": 1024}))
    policy = need(plan, "sampling").on(1)
    assert need(plan, "evaluation").room == pytest.approx(policy / (0.9 - 2 * 0.1125 - 0.225))


def test_rewards_of_functions_alone_take_no_share_of_vllm() -> None:
    rewards = {name: {"function": "test_rewards:length", "scale": [1.0, 0.0]} for name in ("a", "b")}
    objectives = {name: [f"{name}/score"] for name in rewards}
    knobs = {"rewards": rewards, "objectives": objectives, "engines.scoring": "vllm", "data.judge": 0.0}
    plan = make(changed(load(recipe_file("paper"), ALONE), knobs))
    assert need(plan, "evaluation").room == 0


def test_every_process_holds_the_whole_reward_model_while_its_head_is_fitted() -> None:
    """4 bytes a weight, and 16,384 tokens of 45,056 numbers: more than a GPU of 24 GB, however many there are."""
    fitted = need(on_eight(), "fit of the reward head")
    assert fitted.on(8) == 4 * SEVEN + 16_384 * (4 * 4096 + 2 * 14_336) * 4
    assert (fitted.least(A6000), fitted.least(GPUS["RTX4090"])) == (1, None)
    assert need(on_eight("--reward.training.lora_rank", "16"), "fit of the reward head").model == 2 * SEVEN


def test_eight_processes_load_eight_models_into_the_machines_memory() -> None:
    assert on_eight().host == {"sampling, scoring": 8 * 2 * SEVEN, "training": 8 * 4 * SEVEN}
    assert on_eight(alone=True).host["sampling, scoring"] == 2 * SEVEN


def test_rows_lie_on_disk_as_tokens_and_once_more_packed() -> None:
    """200,000 chats of 1,200 tokens, an id and a label of 4 bytes each, twice: 3.84 GB."""
    assert on_eight(alone=True).disk["while training (rows as tokens)"] == 200_000 * 1200 * 8 * 2


@pytest.mark.parametrize("words", [ALONE, SPREAD])
@pytest.mark.parametrize("kinds", [["A100"], ["A6000", "H100"]])
def test_the_paper_is_printed_in_a_hundred_columns(words: list[str], kinds: list[str]) -> None:
    recipe = load(recipe_file("paper"), words)
    plan = make(recipe, gpus=[GPUS[kind] for kind in kinds], compared=True)
    assert max(map(len, plan_text(plan, dict.fromkeys(kinds, 2.5)).splitlines())) <= 100


def test_steps_side_by_side_take_the_time_of_the_longest_chain() -> None:
    """a 3 h, then b 2 h and c 4 h, then d 1 h: 10 h one by one, 8 h two by two."""
    inputs = {"a": {}, "b": {"x": "a"}, "c": {"x": "a"}, "d": {"x": "b", "y": "c"}}
    steps = [Step(name, select, read) for name, read in inputs.items()]
    hours = {"a": 3.0, "b": 2.0, "c": 4.0, "d": 1.0}
    assert (elapsed(steps, hours, 1), elapsed(steps, hours, 2)) == (10.0, 8.0)
    assert math.isnan(elapsed(steps, hours | {"b": math.nan}, 2))


@pytest.mark.parametrize("name", shipped())
def test_every_installed_recipe_is_planned(name: str) -> None:
    table = plan_text(make(load(recipe_file(name)), gpus=[A6000, GPUS["cpu"]], count=2))
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
        (["--price", "cheap"], r"--price cheap: give \[KIND=\]PRICE"),
        (["--gpu", "A100", "--price", "H100=3"], r"--price H100=3: no such kind is planned \(A100\)"),
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
    assert plan.rates.hours(plan.loads["score-1"]) == pytest.approx(plan.loads["score-1"].scored / scored / 3600)
    assert "as measured" in plan_text(plan)
    assert Efficiency().training == 0.25


def test_a_finished_run_takes_what_its_ledgers_say(micro_run: Path) -> None:
    recipe = load(micro_run / "recipe.toml")
    plan = make(recipe, run=micro_run)
    seconds = {path.parent.name: read_ledger(path.parent)["seconds"] for path in micro_run.glob("*/ledger.json")}
    assert {name: hours * 3600 for name, hours in plan.taken.items()} == pytest.approx(seconds)
    assert plan.measured_wall * 3600 == pytest.approx(sum(seconds.values()))
    # Of twice the answers a direction, sampling takes twice the seconds of the run's sampling; all else is as it was.
    more = make(changed(recipe, {"sampling.n": 2 * recipe.sampling.n}), run=micro_run)
    drawn = [read_ledger(micro_run / f"sample-{t}") for t in (1, 2)]
    rate = sum(ledger["seconds"] for ledger in drawn) / sum(ledger["tokens"]["sampled"] for ledger in drawn)
    assert more.taken["sample-2"] * 3600 == pytest.approx(rate * 2 * plan.loads["sample-2"].sampled)
    assert more.taken["sft"] * 3600 == pytest.approx(seconds["sft"])
    assert all(not math.isnan(hours) for hours in more.taken.values())
