"""Rewards in use: what an export's reward folders read, their golden scores, and who may name a function."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpalign import cli
from dpalign.dial.doctor.model import examine
from dpalign.dial.rewards import open_scorer
from dpalign.engines.sandbox import render
from dpalign.paper.prompts import RewardTemplate, render_reward_input
from dpalign.rewards.golden import GoldenModel, GoldenScore, read_model_golden, write_model_golden
from dpalign.rewards.inputs import InputReader, reward_chat_template, template_for
from dpalign.rows import Message, user_prompt
from dpalign.train.contract import Contract, RewardRecord, read_contract, write_contract

CHATS: list[list[Message]] = [
    [*user_prompt("Why?"), {"role": "assistant", "content": " So.\n"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "First\n\nline"},
        {"role": "assistant", "content": "[INST] Yes. [/INST]"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "score: {{ 7 }}"},
    ],
]


def ticks(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("t")) for response in responses]


@pytest.fixture(scope="module")
def exported(micro_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "mine"
    cli.main(["export", str(micro_run), "--out", str(out), "--reward"])
    return out


# The input as a chat template


@pytest.mark.parametrize("form", ["dpa-v1", "world-v1"])
@pytest.mark.parametrize("chat", CHATS)
def test_the_template_writes_exactly_the_models_input(form: RewardTemplate, chat: list[Message]) -> None:
    written = render(reward_chat_template(form), chat, False)
    assert written == render_reward_input(chat[:-1], chat[-1]["content"], form)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (user_prompt("Why?"), "the last message must be the assistant's"),
        ([*user_prompt("a"), *user_prompt("b")], "turn 1 is the user's"),
        ([], "the last message must be the assistant's"),
    ],
)
def test_the_template_refuses_a_chat_without_an_answer(chat: list[Message], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(reward_chat_template("dpa-v1"), chat, False)


@pytest.mark.parametrize("starts", [True, False])
def test_the_template_gives_the_tokens_that_the_model_was_trained_on(tokens: Any, starts: bool) -> None:
    """A tokenizer may put the start of text before any text; a chat template must then write it."""
    tokenizer: PreTrainedTokenizerBase = tokens
    if starts:
        from tokenizers.processors import TemplateProcessing

        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    reader = InputReader(tokenizer, "world-v1", "")
    tokenizer.chat_template = template_for(tokenizer, "world-v1")
    assert ("bos_token" in str(tokenizer.chat_template)) == starts
    for chat in CHATS:
        ids = reader.ids((chat[:-1], chat[-1]["content"]))
        assert (ids[0] == tokenizer.bos_token_id) == starts
        assert tokenizer.apply_chat_template(chat, return_dict=False) == ids


def test_the_exported_reward_reads_its_own_input_and_not_the_policys(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "reward")
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text.removeprefix(tokenizer.bos_token) == render_reward_input(chat[:-1], chat[-1]["content"], "world-v1")


# Golden scores


def test_the_doctor_measures_golden_scores_again(exported: Path, tmp_path: Path) -> None:
    def findings(change: Callable[[Path], object] = lambda _: None) -> dict[str, Any]:
        folder = tmp_path / "reward"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported / "reward", folder)
        change(folder)
        return {one.check: one for one in examine(folder)}

    sound = findings()
    assert (sound["template"].level, sound["scores"].level) == ("ok", "ok")

    def other_template(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("answer: ", "reply: "))

    changed = findings(other_template)
    assert (changed["template"].level, changed["scores"].level) == ("bad", "bad")
    assert "where the model was scored on" in changed["template"].text

    def other_score(folder: Path) -> None:
        model = read_model_golden(folder)
        assert model is not None
        first, *others = model.scores
        higher = replace(first, scores={head: x + 1 for head, x in first.scores.items()})
        write_model_golden(folder, replace(model, scores=(higher, *others)))

    assert findings(other_score)["scores"].level == "bad"
    damaged = findings(lambda folder: (folder / "golden_scores.json").write_text("{"))
    assert damaged["scores"].level == "bad"


def test_golden_scores_read_back_as_written(tmp_path: Path) -> None:
    model = GoldenModel((GoldenScore(tuple(CHATS[1]), "text", {"a": 1.25, "b": -3.0}),), "bfloat16", None)
    write_model_golden(tmp_path, model)
    assert read_model_golden(tmp_path) == model
    assert read_model_golden(tmp_path / "none") is None


# Several rewards of a policy in use


def contract_of(*records: RewardRecord) -> Contract:
    heads = tuple(f"{record.name}/{head}" for record in records for head in record.heads)
    return Contract("dpa-v1", "zephyr", {"good": (heads[0],), "short": (heads[-1],)}, heads, rewards=records)


def record(name: str, source: str, scale: tuple[float, float] = (2.0, 1.0), **more: Any) -> RewardRecord:
    return RewardRecord(name, "function", source, None, ("score",), (scale,), **more)


def test_the_contract_keeps_rewards_with_their_scales(tmp_path: Path) -> None:
    model = RewardRecord("good", "model", "some/model", "chat", ("a", "b"), ((1.5, 0.0), (0.1, -3.25)), "reward")
    written = contract_of(model, record("short", "m:f"))
    write_contract(tmp_path, written)
    told = json.loads((tmp_path / "dpa.json").read_text())
    assert told["rewards"][1] == {
        "name": "short", "kind": "function", "function": "m:f", "heads": ["score"], "scale": [[2.0, 1.0]],
    }  # fmt: skip
    assert read_contract(tmp_path) == written
    told["rewards"][0]["scale"][0][0] = float("inf")
    (tmp_path / "dpa.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="a finite pair each is needed"):
        read_contract(tmp_path)


def test_rewards_in_use_are_in_the_same_points(tmp_path: Path) -> None:
    contract = contract_of(record("words", "dpalign.rewards.functions:words"), record("ticks", "m:f", (10.0, 0.0)))
    scorer = open_scorer(tmp_path, contract, ["ticks=test_exported_rewards:ticks"], dtype="float32")
    assert scorer is not None
    assert scorer.score([(user_prompt("q"), "the tea is hot")]).tolist() == [[9.0, 30.0]]
    assert np.array(scorer.heads).tolist() == ["words/score", "ticks/score"]


def test_a_folder_does_not_choose_which_code_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A function of one's own runs where the user names it, and nowhere else."""
    contract = contract_of(record("words", "dpalign.rewards.functions:words"), record("own", "os:system"))
    with caplog.at_level(logging.WARNING):
        assert open_scorer(tmp_path, contract, dtype="float32") is None
    assert "the Python function os:system; give --reward own=os:system" in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["test_exported_rewards:ticks"], "NAME one of words, own"),
        (["other=m:f"], "NAME one of words, own"),
        (["words=test_exported_rewards:ticks"], "reward 'own' is missing: the Python function m:f"),
        (["own=no_such_module:f"], "No module named 'no_such_module'"),
    ],
)
def test_a_reward_that_is_not_given_rightly_is_named(tmp_path: Path, given: list[str], words: str) -> None:
    contract = contract_of(record("words", "dpalign.rewards.functions:words"), record("own", "m:f"))
    with pytest.raises(ValueError, match=words):
        open_scorer(tmp_path, contract, given, dtype="float32")
