"""`dpa new`: four answers become a short recipe that loads; what makes no sense is refused before a file is written."""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from dpalign import Policy, RunResult, cli
from dpalign.pipeline import new
from dpalign.pipeline.shipped import recipe_file
from dpalign.recipe import load
from dpalign.runs.tables import leaves

MODEL, RATER = "Qwen/Qwen3-0.6B", "Skywork/Skywork-Reward-V2-Qwen3-0.6B"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "What is {i}?"}}\n' for i in range(60)))
    return path


def write(file: Path, prompts: Path, *words: str) -> Path:
    cli.main(["new", str(file), "--model", MODEL, "--data", str(prompts), "--machine", "gpu", *words])
    return file


def test_four_options_make_a_short_recipe_that_loads_and_whose_steps_are_known(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.toml", prompts, "--reward", RATER, "--reward", "words")
    written = dict(leaves(tomllib.loads(file.read_text())))
    assert len(written) <= 13
    assert written["data.validation_prompts"] == 6
    recipe = load(file)
    assert (recipe.name, recipe.model.base, recipe.model.chat, recipe.sft.checkpoint) == ("mine", MODEL, "model", MODEL)
    assert list(recipe.rewards) == list(recipe.objectives) == ["quality", "words"]
    assert recipe.rewards["words"].function == "dpalign.rewards.functions:words"
    assert recipe.finetune.lora_rank == load(recipe_file(new.BASE)).finetune.lora_rank > 0
    assert (recipe.preference.low, recipe.preference.high, recipe.data.prompts) == (-45, 45, (str(prompts),))
    capsys.readouterr()
    cli.main(["run", str(file), "--dry-run"])
    steps = capsys.readouterr().out.splitlines()
    assert any(row.split()[0] == "policy-3" for row in steps)


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        ([f"good={RATER}", "kind=a/b"], {"low": 0, "high": 90}),
        ([RATER, "words", "sentences"], {"distribution": "cone", "center": [1, 0, 0]}),
        ([RATER, "b=a/b", "c=a/c"], {"distribution": "simplex"}),
    ],
)
def test_the_directions_fit_the_rewards(
    rewards: list[str], wanted: dict[str, object], prompts: Path, tmp_path: Path
) -> None:
    words = [word for reward in rewards for word in ("--reward", reward)]
    file = write(tmp_path / "mine.toml", prompts, *words)
    assert tomllib.loads(file.read_text())["preference"] == wanted
    assert len(load(file).objectives) == len(rewards)


@pytest.mark.parametrize("machine", new.MACHINES)
def test_each_machine_has_a_recipe_that_loads(machine: str, prompts: Path, tmp_path: Path) -> None:
    recipe = load(write(tmp_path / "mine.toml", prompts, "--reward", f"{RATER},words", "--machine", machine))
    assert (recipe.model.dtype == "float32") == (machine == "cpu")
    assert (recipe.processes > 1) == (machine == "gpus")
    assert recipe.finetune.batch % (recipe.finetune.micro_batch * recipe.processes) == 0


def test_a_base_model_without_a_chat_template_is_fine_tuned_on_chats_first(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    wished = new.Wishes(str(tmp_path / "base"), new.read_rewards(f"{RATER}, words"), [str(prompts)], "gpu")
    new.write(tmp_path / "mine.toml", wished)
    recipe = load(tmp_path / "mine.toml")
    assert (recipe.model.chat, recipe.sft.checkpoint, recipe.data.sft) == ("zephyr", "", new.CHATS)


def test_the_base_of_a_new_recipe_is_as_this_says() -> None:
    assert load(recipe_file(new.BASE)).data.validation_prompts == new.VALIDATION


def test_the_rewards_that_come_with_the_package_are_there() -> None:
    from dpalign.rewards import functions

    assert all(callable(getattr(functions, name)) for name in new.FUNCTIONS)


def test_models_go_before_functions_and_a_name_may_be_given() -> None:
    first, second, third = new.read_rewards(f"short=my.own:brevity, {RATER},words")
    assert (first.name, first.source, first.is_function) == ("quality", RATER, False)
    assert (second.name, second.source, second.is_function) == ("short", "my.own:brevity", True)
    assert (third.name, third.source) == ("words", "dpalign.rewards.functions:words")


@pytest.mark.parametrize(
    ("read", "words", "message"),
    [
        (new.read_model, "qwen", "model 'qwen': no folder, and no hub name such as"),
        (new.read_rewards, RATER, "a direction weighs at least two"),
        (new.read_rewards, f"{RATER}, length", "reward 'length': no folder, .* none of words, log_words, sentences"),
        (new.read_rewards, "a/b, c/d", "'quality' is another's name; write NAME=c/d"),
        (new.read_rewards, "7=a/b, words", "'7' is no name"),
        (new.read_data, " , ", "name at least one"),
        (new.read_data, "nowhere.jsonl", "data 'nowhere.jsonl': no such file or folder"),
        (new.read_machine, "tpu", "machine 'tpu': one of cpu, gpu, gpus"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(read: Callable[[str], object], words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(words)


def test_no_file_is_overwritten_and_none_is_left_of_a_refusal(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(file: Path, *words: str) -> str:
        with pytest.raises(SystemExit):
            write(file, prompts, *words)
        return capsys.readouterr().err

    (tmp_path / "mine.toml").write_text("mine")
    assert "mine.toml: exists already" in refused(tmp_path / "mine.toml", "--reward", f"{RATER},words")
    assert (tmp_path / "mine.toml").read_text() == "mine"
    assert "ends in .toml" in refused(tmp_path / "mine", "--reward", f"{RATER},words")
    assert "a direction weighs at least two" in refused(tmp_path / "other.toml", "--reward", RATER)
    assert not (tmp_path / "other.toml").exists()
    rewards = [new.Reward("good", RATER, is_function=False), new.Reward("own", "no function", is_function=True)]
    with pytest.raises(ValueError, match=r"other\.toml: .*no function"):
        new.write(tmp_path / "other.toml", new.Wishes(MODEL, rewards, [str(prompts)], "gpu"))
    assert not (tmp_path / "other.toml").exists()
    prompts.write_text('{"prompt": "What is tea?"}\n{"prompt": \n')
    assert "prompts.jsonl, line 2" in refused(tmp_path / "other.toml", "--reward", f"{RATER},words")
    assert not (tmp_path / "other.toml").exists()


def test_outside_a_terminal_what_is_not_given_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    with pytest.raises(SystemExit):
        cli.main(["new", str(tmp_path / "mine.toml"), "--model", MODEL])
    assert "give --reward, --data, --machine" in capsys.readouterr().err


def test_on_a_terminal_a_question_is_asked_until_its_answer_makes_sense(
    prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new, "gpus", lambda: 1)
    clear = "\x01\x0b"  # to the line's beginning, and all of it away
    typed = [f"qwen\r{clear}{MODEL}", f"words\r{clear}words, {RATER}", str(prompts), ""]
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("\r".join([*typed, ""]))
        given = dict.fromkeys(new.QUESTIONS)
        wished = new.wishes(given, new.ask)
    assert (wished.model, wished.data, wished.machine) == (MODEL, [str(prompts)], "gpu")
    assert [reward.name for reward in wished.rewards] == ["quality", "words"]


def short(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward of one's own."""
    return [-float(len(response)) for response in responses]


@pytest.mark.slow
def test_a_new_recipe_runs_from_a_chat_model_of_the_hubs_form_to_its_page(tmp_path: Path) -> None:
    """A tiny random Qwen3 with Qwen3's own template, a tiny random reward model that reads the same, and a function."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    import trl
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification, set_seed

    import tiny

    set_seed(0)
    tokens = tiny.tokenizer()
    tokens.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokens.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 2048, "vocab_size": len(tokens)}
    ids = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id, "initializer_range": 0.3}
    models = {
        "chat": Qwen3ForCausalLM(Qwen3Config(**sizes, **ids)),
        "rater": Qwen3ForSequenceClassification(Qwen3Config(**sizes, **ids, num_labels=1)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokens.save_pretrained(tmp_path / name)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "explain tea and owl {i}."}}\n' for i in range(60)))
    file = tmp_path / "mine.toml"
    rewards = ["--reward", f"good={tmp_path / 'rater'}", "--reward", "test_new:short"]
    cli.main(["new", str(file), "--model", str(tmp_path / "chat"), *rewards, "--data", str(data), "--machine", "cpu"])
    small = ["--threads=1", "--launcher=inprocess", "--iterations=2", "--sampling.max_new_tokens=24"]
    for table in ("finetune", "steerlm.training"):
        small += [f"--{table}.steps=3", f"--{table}.batch=4", f"--{table}.context=512"]
    cli.main(["run", str(file), "--out", str(tmp_path / "run"), *small])
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    asked = {"prompt": "explain tea.", "angle": -45, "n": 2, "max_new_tokens": 8}
    with Policy.load(tmp_path / "run") as policy:
        assert (policy.objectives, policy.arc) == (("good", "short"), (-45.0, 45.0))
        assert [answer.rewards for answer in policy.sample(**asked)] == [None, None]  # names no code to run here
    with RunResult(tmp_path / "run").policy as policy:
        first, second = policy.score("explain tea.", ["tea.", "tea is hot and calms people."])
        assert first["short"] > second["short"]
        assert {name for answer in policy.sample(**asked) for name in answer.rewards} == {"good", "short"}
