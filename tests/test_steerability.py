"""`dpa steerability`: a server is measured by a yardstick; calibration and side effects with numbers worked out."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")

from dial_server import Model, serving
from dpalign.cli import main
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import Rewards
from dpalign.measure.steerability import Steerability, miscalibration, side_effect
from dpalign.measure.system import System
from dpalign.paper.direction import Arc, Fixed, Grid, Population, evaluation_grid
from dpalign.train.contract import Contract, RewardRecord, read_contract, write_contract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANCE = Bootstrap(replicates=200)


def rewards(second_V: list[float]) -> Rewards:
    """Two prompts whose second objective goes this way along the paper's arc."""
    second_PV = np.array([second_V, second_V]) + np.array([[-1.0], [1.0]])
    reward_PVSK = np.stack([np.full_like(second_PV, 50.0), second_PV], axis=2)[:, :, None]
    return Rewards(System("one"), ("a", "b"), evaluation_grid(Arc(), len(second_V)), reward_PVSK)


def test_a_dial_that_turns_evenly_is_calibrated_and_one_that_jumps_at_its_end_is_not() -> None:
    even = miscalibration(rewards([80, 60, 40, 20]), CHANCE)
    jump = miscalibration(rewards([80, 80, 80, 20]), CHANCE)
    assert even is not None
    assert jump is not None
    assert even.value == pytest.approx(0)
    assert jump.value == pytest.approx((1 / 3 + 2 / 3) / 4)  # a third and two thirds of the way were asked, none came


def test_a_dial_that_turns_the_wrong_way_or_too_far_on_its_way_is_not_calibrated() -> None:
    reversed_dial = miscalibration(rewards([20, 40, 60, 80]), CHANCE)
    overshoot = miscalibration(rewards([80, 200, 60, 20]), CHANCE)
    assert reversed_dial is not None
    assert overshoot is not None
    assert reversed_dial.value == pytest.approx((0 + 2 / 3 + 4 / 3 + 2) / 4)  # a third was asked, minus a third came
    assert overshoot.value == pytest.approx((0 + 7 / 3 + 1 / 3 + 0) / 4)


@pytest.mark.parametrize("ends", [(100, 170), (95, 265)])
def test_calibration_is_measured_along_the_arc_wherever_it_lies(ends: tuple[float, float]) -> None:
    """At even steps of the angle, from 170 to 100 and from 265 to 95, more of the second objective is asked."""
    directions_VK = evaluation_grid(Arc(*ends), 4)
    even = miscalibration(replace(rewards([20, 40, 60, 80]), directions_VK=directions_VK), CHANCE)
    assert even is not None
    assert even.value == pytest.approx(0)


def test_a_model_that_does_not_turn_has_no_calibration() -> None:
    assert miscalibration(rewards([50, 50, 50]), CHANCE) is None


def test_a_side_effect_is_the_change_of_a_head_from_end_to_end() -> None:
    effect = side_effect("coherence", np.array([[70.0, 0, 60], [50.0, 0, 44]]), CHANCE)
    assert (effect.first.value, effect.last.value, effect.change.value) == (60, 52, -8)
    assert effect.change.below_zero


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder whose objectives count sentences and words; a third reward is no objective's."""
    folder = tmp_path_factory.mktemp("yardstick") / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    sources = {"help": "sentences", "length": "words", "log": "log_words"}
    records = tuple(
        RewardRecord(name, "function", f"dpalign.rewards.functions:{function}", None, (function,), ((1.0, 0.0),))
        for name, function in sources.items()
    )
    objectives = {"helpfulness": ("help/sentences",), "verbosity": ("length/words",)}
    heads = tuple(f"{name}/{function}" for name, function in sources.items())
    write_contract(folder, Contract("fig1", "zephyr", objectives, heads, Arc(), rewards=records))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"what is {thing}?"}) + "\n" for thing in ("tea", "iron", "rain")))
    return file


@pytest.fixture
def server() -> Iterator[Model]:
    with serving() as model:
        yield model


def steered(server: Model, yardstick: Path, questions: Path, out: Path, *words: str) -> Steerability:
    main(["steerability", "--url", server.url, "--by", str(yardstick), "--prompts", str(questions), "--out", str(out),
          *words])  # fmt: skip
    return Steerability.model_validate_json((out / "steerability.json").read_text())


def measure(server: Model, yardstick: Path, questions: Path, out: Path, *words: str) -> Steerability:
    return steered(server, yardstick, questions, out, "--directions", "4", *words)


def test_a_server_with_a_dial_is_measured_along_it(
    server: Model, yardstick: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(server, yardstick, questions, tmp_path / "out")
    (measured,) = found.summary.systems.values()
    words = [point.words.value for point in measured.points if point.words is not None]
    assert found.how == "its own dial"
    assert words == sorted(words, reverse=True)
    assert measured.figures.kendall_tau is not None
    assert measured.figures.kendall_tau.value > 0.9
    assert [effect.head for effect in found.side_effects] == ["log/log_words"]
    assert found.side_effects[0].change.value < 0
    assert (tmp_path / "out" / "front.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "hypervolume" in printed
    assert "log/log_words" in printed
    asked = len(server.requests)
    measure(server, yardstick, questions, tmp_path / "out")
    assert len(server.requests) == asked == 3 * 4  # finished answers are not drawn again


def test_a_model_without_a_dial_is_asked_in_words(yardstick: Path, questions: Path, tmp_path: Path) -> None:
    with serving(Model(dial=False)) as server:
        found = measure(server, yardstick, questions, tmp_path / "out")
        lines = {request["messages"][0]["content"] for request in server.requests}
    assert found.how == "a line in words"
    assert found.miscalibration is None  # this one gives the same answer to all
    assert len(lines) == 4
    assert all(request["messages"][0]["role"] == "system" for request in server.requests)
    assert all("preference" not in request for request in server.requests)


def turned_to(yardstick: Path, population: Population | None, folder: Path) -> Path:
    """The yardstick with other trained directions."""
    contract = read_contract(yardstick)
    assert contract is not None
    shutil.copytree(yardstick, folder)
    write_contract(folder, replace(contract, population=population))
    return folder


@pytest.mark.parametrize(
    ("population", "angles"),
    [
        (Arc(), [0, -5, -10, -15, -20, -25, -30, -35, -40, -45]),
        (Grid(-45, 0, 4), [0, -15, -30, -45]),
        (Fixed(((1.0, 0.0), (1.0, -1.0), (0.0, -2.0))), [0, -45, -90]),
    ],
    ids=repr,
)
def test_ten_steps_of_a_range_are_measured_or_all_directions_of_a_list(
    population: Population, angles: list[float], server: Model, yardstick: Path, questions: Path, tmp_path: Path
) -> None:
    folder = turned_to(yardstick, population, tmp_path / "by")
    (measured,) = steered(server, folder, questions, tmp_path / "out").summary.systems.values()
    assert [point.angle for point in measured.points] == pytest.approx(angles)


def test_other_weights_in_a_reward_folder_or_another_dtype_score_anew(
    server: Model, yardstick: Path, questions: Path, tmp_path: Path, tokens: "PreTrainedTokenizerBase"
) -> None:
    from transformers import MistralConfig, MistralForSequenceClassification, set_seed

    def write_reward(seed: int) -> None:
        set_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MistralConfig(
            vocab_size=len(tokens), **sizes, num_key_value_heads=2, num_labels=1, pad_token_id=tokens.pad_token_id
        )
        MistralForSequenceClassification(config).save_pretrained(reward)
        tokens.save_pretrained(reward)

    def score(source: str, *words: str) -> list[float]:
        found = measure(server, by, questions, tmp_path / "out", "--reward", source, *words)
        (measured,) = found.summary.systems.values()
        return [point.rewards["helpfulness"].value for point in measured.points]

    contract = read_contract(yardstick)
    assert contract is not None
    by, reward = tmp_path / "by", tmp_path / "reward"
    by.mkdir()
    first, *others = contract.rewards
    records = (replace(first, kind="model", input="world-v1", scale=((1000.0, 0.0),)), *others)
    (by / "config.json").write_text("{}")
    write_contract(by, replace(contract, rewards=records))
    write_reward(0)
    before = score(f"help={reward}")
    asked = len(server.requests)
    assert score(f"help={reward}") == before
    assert len(server.requests) == asked
    write_reward(1)
    after = score(f"help={reward}")
    assert after != before
    assert score(f"help={reward}", "--dtype", "bfloat16") != after


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prompts", "none.jsonl", "--out", "out", "--url", "http://127.0.0.1:1"], "--by"),
        (["--prompts", "none.jsonl", "--out", "out", "--by", "m", "--url", "http://me:secret@host"], "//***@host"),
        (["--prompts", "none.jsonl", "--out", "out"], "MODEL"),
        (["somewhere", "--prompts", "none.jsonl", "--out", "out", "--directions", "1"], "--directions 1"),
        (["somewhere", "--prompts", "none.jsonl", "--out", "out"], "none.jsonl"),
        (["somewhere", "--prompts", "none.jsonl", "--out", "out", "--temperature", "nan"], "--temperature nan"),
    ],
)
def test_what_cannot_be_measured_is_said(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["steerability", *words])
    assert left.value.code == 2
    assert named in capsys.readouterr().err
