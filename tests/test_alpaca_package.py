"""The package alpaca_eval, where it is installed: its annotators through our store, its length control beside ours."""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import judge_server
from dpalign.measure.bootstrap import Bootstrap
from dpalign.paper.direction import rng_for
from dpalign.stages.alpaca import package
from dpalign.stages.alpaca.client import Endpoint
from dpalign.stages.alpaca.judge import Pair, key_of
from dpalign.stages.alpaca.judging import judge_pairs, judged_rows
from dpalign.stages.alpaca.length_control import features, length_controlled, read_difficulty
from dpalign.stages.alpaca.store import Store
from dpalign.stages.alpaca.winrate import Answers
from judge_server import Says, completion

OFFICIAL = "weighted_alpaca_eval_gpt4_turbo"


@pytest.fixture
def installed() -> None:
    pytest.importorskip("openai", reason="its annotators need the extra dpalign[alpaca]")
    with package.pkg_resources_stand_in():
        pytest.importorskip("alpaca_eval", reason="its annotators need the extra dpalign[alpaca]")


def judge_at(url: str, **settings: Any) -> package.PackageJudge:
    endpoint = Endpoint(f"{url}/chat/completions", "sk-secret-123", timeout=60.0)
    return package.PackageJudge(OFFICIAL, endpoint=endpoint, model=settings.pop("model", None), **settings)


def pairs(count: int = 6) -> list[Pair]:
    return [Pair(i, f"Do {i}.", "o" * (14 + 4 * i), "r" * 20) for i in range(count)]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    with pytest.raises(ValueError, match=r"needs alpaca_eval; install it: pip install 'dpalign\[alpaca\]'"):
        judge_at("http://127.0.0.1:1/v1")


@pytest.mark.usefixtures("installed")
def test_the_official_annotator_judges_through_our_store(tmp_path: Path) -> None:
    """With its own prompt, two pairs at a time: 1 + P(output) again, and nothing is asked twice."""
    with judge_server.serving() as server:
        judge, store = judge_at(server.url, workers=2), Store(tmp_path / "s.jsonl")
        assert judge_pairs(pairs(), judge, store, "dpa") == 6
        rows = judged_rows(pairs(), judge.identity, store)
        assert judge_pairs(pairs(), judge_at(server.url), store, "dpa") == 0
        assert server.answered == 6
        assert server.requests[0]["model"] == "gpt-4-1106-preview"
        assert "## Best Model Identifier" in server.prompts()[0]
        assert {headers.get("Authorization", headers.get("authorization")) for headers in server.headers} == {
            "Bearer sk-secret-123"
        }
        assert judge_pairs(pairs(1), judge_at(server.url, model="mine"), store, "dpa") == 1
        assert server.requests[-1]["model"] == "mine"
    assert [row.preference for row in rows] == pytest.approx(
        [1 + 1 / (1 + np.exp(-(6 - 4 * i) / 10)) for i in range(6)]
    )
    assert "sk-secret-123" not in (tmp_path / "s.jsonl").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "s.jsonl"]


@pytest.mark.usefixtures("installed")
def test_an_answer_that_the_package_cannot_read_is_a_failure(tmp_path: Path) -> None:
    says = Says(completion({"A": -0.1}))
    with judge_server.serving(lambda number, body: says if number == 2 else None) as server:
        judge, store = judge_at(server.url, workers=1), Store(tmp_path / "s.jsonl")
        judge_pairs(pairs(), judge, store, "dpa")
    rows = judged_rows(pairs(), judge.identity, store)
    assert [row.index for row in rows if row.preference is None] == [2]
    assert rows[2].reason.startswith("no preference from the annotator: ")


@pytest.mark.usefixtures("installed")
def test_a_judge_that_is_lost_is_said_and_what_it_judged_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(number: int, body: Mapping[str, Any]) -> Says | None:
        return Says({"error": {"message": "bad key sk-secret-123"}}, 401) if number == 3 else None

    with judge_server.serving(behave) as server:
        judge, store = judge_at(server.url, workers=1), Store(tmp_path / "s.jsonl")
        with pytest.raises(ValueError, match=r"AuthenticationError: .*\(3 of 6 are answered and kept") as error:
            judge_pairs(pairs(), judge, store, "dpa")
        assert "sk-secret-123" not in str(error.value)
        assert len(store.records) == 3
    # Rate limited to the end of the package's own retries: an empty completion, which is no judgement.
    from alpaca_eval.decoders import openai as decoder

    monkeypatch.setattr(decoder.time, "sleep", lambda seconds: None)
    limited = Says({"error": {"message": "rate limit"}}, 429, {"Retry-After": "0.01"})
    with judge_server.serving(lambda number, body: limited) as server:
        again = judge_at(server.url, workers=1)
        with pytest.raises(ValueError, match=r"no answer after the package's retries; .*\(3 of 6 are answered"):
            judge_pairs(pairs(), again, store, "dpa")
    assert len(store.records) == 3


@pytest.mark.usefixtures("installed")
def test_an_annotator_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=f"the package alpaca_eval has no annotator 'mine'; it has .*{OFFICIAL}"):
        package.PackageJudge("mine", endpoint=None, model=None)


@pytest.mark.usefixtures("installed")
def test_our_length_control_agrees_with_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 400 instructions and two gamed baselines, all made up: within 0.05 points of its penalised fit."""
    pandas = pytest.importorskip("pandas")
    from alpaca_eval.metrics import glm_winrate

    rng = rng_for("package glm")
    n = 400
    gamma_P, longer_P = rng.standard_normal(n), (250 * rng.standard_normal(n) + 120).round()
    noise_P = 0.3 * rng.standard_normal(n)
    logit_P = features(longer_P, gamma_P) @ np.array([0.8, -0.6, -1.0]) + noise_P
    preference_P = 1 + 1 / (1 + np.exp(-logit_P))
    path = tmp_path / "df_gamed.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        names = ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
        rows.writerow(names)
        for model, shorter in (("concise", 1.0), ("verbose", -1.0)):
            for i in range(n):
                delta = shorter + 0.3 * rng.standard_normal()
                won = 1 / (1 + np.exp(0.7 * np.tanh(delta) + 0.2 * rng.standard_normal()))
                rows.writerow([model, i, won, delta, gamma_P[i], False])
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(path))
    length_P = 1000 + longer_P
    theirs = glm_winrate.get_length_controlled_winrate(
        pandas.DataFrame(
            {
                "preference": preference_P,
                "output_1": ["r" * 1000] * n,
                "output_2": ["o" * int(length) for length in length_P],
                "generator_1": "reference",
                "generator_2": "dpa",
                "annotator": "short",
                "index": range(n),
            }
        ),
        save_weights_dir=None,
    )
    ours = length_controlled(
        Answers("dpa", preference_P, length_P, np.full(n, 1000.0)), read_difficulty(path), Bootstrap(replicates=20)
    )
    assert ours.rate.value == pytest.approx(theirs["length_controlled_winrate"], abs=0.05)
    assert abs(ours.rate.value - theirs["win_rate"]) > 2  # the control does something here


def test_a_pair_is_kept_under_the_annotator_and_its_version() -> None:
    identity = {"annotator": "alpaca_eval:a", "version": "0.6.6"}
    assert key_of(identity, pairs(1)[0]) != key_of(identity | {"version": "0.6.7"}, pairs(1)[0])
