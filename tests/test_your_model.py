"""A user's own model, reward model and rule: one short recipe, from four families of chat models to the page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from dpalign import cli
from dpalign.dial.server.text import Prompts
from dpalign.recipe import load
from dpalign.rows import CANDIDATES, CONVERSATIONS, SCORES, read_rows
from test_chat_models import FAMILIES, Family, apart, chatml, tokenizer_of

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"""The template of SmolLM2-135M-Instruct, which TRL has none of: it writes a system message where a chat has none."""

RECIPE = """\
name = "mine"
extends = "one-gpu"
model = {{base = "{base}", chat = "model"{switches}}}
sft.checkpoint = "{base}"
rewards.quality.model = "{reward}"
rewards.words.function = "dpalign.rewards.functions:words"
preference = {{low = -45, high = 0}}
data = {{prompts = "{prompts}", validation_prompts = 6, judge = 0}}
"""
"""Eight lines; the ninth and tenth may say how many prompts and iterations."""

SMALL = {
    "iterations": 2, "threads": 1, "launcher": "inprocess", "model.dtype": "float32", "data.tuning": 0.0,
    "engines.sampling": "transformers", "engines.scoring": "transformers",
    "kernels.attention": "sdpa", "kernels.liger": "false", "evaluation.directions": 3, "evaluation.samples": 1,
    "steerlm.targets": 3, "sampling.n": 2, "sampling.first": 4, "sampling.first_targets": 2, "sampling.shard": 16,
    "sampling.rows": 64, "sampling.max_new_tokens": 300, "sampling.prompt_tokens": 400, "preference.directions": 2,
}  # fmt: skip
"""Knobs that make one-gpu's run a matter of seconds on one core."""
TRAINED = {"steps": 2, "batch": 4, "micro_batch": 4, "context": 480, "learning_rate": 1e-3, "lora_rank": 0}


def tiny_config(kind: str, tokens: PreTrainedTokenizerFast) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 1024, "vocab_size": len(tokens), "head_dim": 8}
    return AutoConfig.for_model(
        kind, **sizes, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, initializer_range=0.1
    )


FORMS: dict[str, tuple[str, Family, dict[str, object]]] = {
    "Qwen3": ("qwen3", replace(apart(), template="qwen3"), {"enable_thinking": False}),
    "Llama 3": ("llama", FAMILIES["Llama 3"], {}),
    "Gemma 3": ("gemma3_text", FAMILIES["Gemma 3"], {}),
    "SmolLM2": ("llama", chatml("qwen2_5"), {}),
}


def written(folder: Path, form: str) -> dict[str, str]:
    """A tiny random model of a family with its own chat template, a tiny reward model, and a user's prompts."""
    kind, family, _ = FORMS[form]
    tokens = tokenizer_of(family)
    if form == "SmolLM2":
        tokens.chat_template = SMOLLM2
    set_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(kind, tokens)).save_pretrained(folder / "base")
    tokens.save_pretrained(folder / "base")
    judging = tokenizer_of(replace(apart(), template="qwen3"))
    judging.pad_token = "<|stop|>"
    config = tiny_config("qwen3", judging)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    judging.save_pretrained(folder / "reward")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Why is {i} a number?"}) + "\n" for i in range(40)))
    return {"base": str(folder / "base"), "reward": str(folder / "reward"), "prompts": str(prompts)}


def recipe_file(folder: Path, form: str, names: dict[str, str]) -> Path:
    switches = FORMS[form][2]
    pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in switches.items())
    path = folder / "mine.toml"
    path.write_text(RECIPE.format(**names, switches=f", chat_kwargs = {{{pairs}}}" if pairs else ""))
    return path


def test_ten_lines_name_models_of_the_hub_and_resolve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"base": "Qwen/Qwen3-0.6B", "reward": "Skywork/Skywork-Reward-V2-Qwen3-0.6B"}
    prompts = written(tmp_path, "Qwen3")["prompts"]
    path = recipe_file(tmp_path, "Qwen3", names | {"prompts": prompts})
    assert len(path.read_text().splitlines()) <= 10
    cli.main(["run", str(path), "--dry-run"])
    shown = capsys.readouterr().out
    assert "at -45 degrees: more quality, less words" in shown
    assert "policy-3" in shown
    cli.main(["plan", str(path), "--gpu", "A100"])
    assert "596 M parameters" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS))
def test_the_same_lines_run_to_the_page_and_every_reader_writes_the_same_prompt(form: str, tmp_path: Path) -> None:
    names = written(tmp_path, form)
    path = recipe_file(tmp_path, form, names)
    knobs = {f"{table}.{key}": x for table in ("steerlm.training", "finetune") for key, x in TRAINED.items()} | SMALL
    words = [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
    if form == "SmolLM2":  # as recipes/smol.toml asks it
        words += ["--model.place", "user", "--preference.levels", '["Be short.", "Be long."]']
    run, out = tmp_path / "run", tmp_path / "export"
    cli.main(["run", str(path), "--out", str(run), *words])
    assert (run / "report" / "index.html").is_file()

    recipe = load(path, words)
    assert recipe.scored_heads == ("quality/score", "words/score")
    for row, scored in zip(read_rows(run / "sample-2", CANDIDATES), read_rows(run / "score-2", SCORES), strict=True):
        assert len(scored["rewards"]) == 2
        assert row["messages"][0]["role"] == "system"

    cli.main(["export", str(run), "--out", str(out), "--reward"])
    contract = json.loads((out / "dpa.json").read_text())
    assert [one["name"] for one in contract["rewards"]] == ["quality", "words"]
    assert all(len(one["scale"]) == 1 for one in contract["rewards"])
    tokens, served = AutoTokenizer.from_pretrained(out), Prompts(str(out))
    for row in read_rows(run / "select-2", CONVERSATIONS):
        if row["origin"] != "selected":
            continue
        # what the policy trained on, and what a user's words become in transformers and in our server
        line, *question = row["messages"]
        terms = [term.split("*") for term in line["content"].rpartition("= ")[2].partition(". ")[0].split(" + ")]
        v = {name: float(n) for name, n in terms}
        trained = tokens.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        asked = tokens.apply_chat_template(question, tokenize=False, add_generation_prompt=True, preference=v)
        assert trained == asked
        assert line["content"] in trained
        assert served._ids(question, v) == tokens(asked, add_special_tokens=False)["input_ids"]
    served.close()
