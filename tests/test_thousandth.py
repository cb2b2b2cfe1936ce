"""recipes/paper.toml at a thousandth of its size, through every stage: FSDP2 in bfloat16, vLLM, Ray."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import thousandth
from dpalign import cli
from dpalign.measure.summary import Summary
from dpalign.recipe import load
from dpalign.runs.ledger import read_ledger

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

RECIPE = """
extends = "paper"
name = "paper-thousandth"
iterations = 1             # size: of 4; evaluations ask the policy for directions as a second one would
processes = 2              # hardware: of 8

[launch]                   # hardware: accelerate starts no FSDP2 without GPUs, so torchrun does, as accelerate would
command = "{python} -m torch.distributed.run --standalone --nproc_per_node 2 {worker} {{run}} {{step}}"

[cluster]
actors = 2                 # hardware: of 8
gpus = 0.0                 # hardware

[model]
base = "{model}"           # size, and no hub

[data]                     # size, and no hub: 20 of 64 K prompts, 12 of 35 K attributes, 4 of 2,000 validation prompts
helpsteer = "{helpsteer}"
rows = ["{ultrafeedback}"]
validation = "{test_prefs}"
heldout = 0.2              # size: a hundredth of 20 prompts is none
judge = 0.2                # as `heldout`
tuning = 0.2               # as `heldout`

[reward.training]          # size: 64 rows an update
batch = 16

[sft]
checkpoint = "{model}"     # no hub: SFT's own checkpoint

[steerlm.training]         # size: rows of 4,096 tokens, 64 an update
context = 256
batch = 4

[finetune]
context = 256
batch = 4

[sampling]                 # size
prompts = 4                # of 6 in a half
max_new_tokens = 16
shard = 2                  # of 256: two shards for two actors

[engines]
cpu_cache = 0.25           # hardware: GiB a vLLM engine

[evaluation]
dpo = "{model}"            # no hub
bootstrap = 200            # size
"""
TRAINED = ("reward", "judge", "steerlm-d2", "policy-1", "steerlm")


def test_the_papers_recipe_runs_from_its_data_to_its_page(tmp_path: Path) -> None:
    """Two processes share each model that is trained; two actors of Ray have a vLLM each."""
    model = thousandth.write_model(tmp_path / "mistral")
    data = thousandth.write_data(tmp_path, prompts=20, validated=4, attributes=12)
    worker = Path(__file__).parent / "shared_worker.py"
    recipe = tmp_path / "thousandth.toml"
    recipe.write_text(RECIPE.format(python=sys.executable, worker=worker, model=model, **data))
    run = tmp_path / "run"
    cli.main(["run", str(recipe), "--out", str(run)])

    read = load(run / "recipe.toml")
    assert (read.launcher, read.launch.config, read.model.dtype) == ("accelerate", "fsdp2", "bfloat16")
    assert (read.engines.sampling, read.engines.scoring, read.cluster.address) == ("vllm", "vllm", "local")
    for step in TRAINED:
        for rank in (0, 1):
            assert json.loads((tmp_path / f"{step}.{rank}.json").read_text()) == ["torch.float32"]
        assert read_ledger(run / step)["tokens"]["trained"] > 0
        weights = load_file(run / step / "model" / "model.safetensors")
        assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}
    drawn, scored = (read_ledger(run / name)["counts"]["out"] for name in ("sample-1", "score-1"))
    assert drawn == scored == 320
    summary = Summary.model_validate_json((run / "report" / "summary.json").read_text(encoding="utf-8"))
    assert summary.systems
    tokens = AutoTokenizer.from_pretrained(run / "policy-1" / "model")
    asked = tokens.apply_chat_template(
        [{"role": "user", "content": "Tell me about salt."}], angle=-15, tokenize=False, add_generation_prompt=True
    )
    assert "helpfulness*97 + verbosity*-26" in asked
    policy = AutoModelForCausalLM.from_pretrained(run / "policy-1" / "model")
    assert policy.generate(**tokens(asked, return_tensors="pt"), max_new_tokens=2).shape[0] == 1
