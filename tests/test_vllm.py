"""vLLM, really started: what equals transformers, what repeats, a run on it, and its own server steered by the dial."""

import itertools
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from conftest import wait_until
from dpalign.chat import chat_template
from dpalign.engines.engine import Answer, Request
from dpalign.engines.knobs import WORLD_BASE, Engines
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.engines.vllm_engine import Vllm, VllmEngine
from dpalign.rewards.score import ModelScorer, VllmScorer
from dpalign.rows import CANDIDATES, CONVERSATIONS, SCORES, read_rows, user_prompt
from dpalign.runs.ledger import read_ledger
from dpalign.world.language import THINGS
from test_faults import children
from test_ray import told, write_prompts
from test_sampling import QUESTIONS, request, require_first_tokens_of_the_softmax
from test_scoring import HEADS, pairs, write_classifier
from vllm_server import vllm_server

pytestmark = pytest.mark.vllm

MICRO = Path(__file__).parent.parent / "recipes" / "micro.toml"
ON_VLLM = Engines(sampling="vllm", scoring="vllm")
DRAWING = [
    *("--sampling.n", "2", "--sampling.shard", "1", "--sampling.prompts", "0", "--sampling.max_new_tokens", "24"),
    *("--preference.directions", "2", "--engines.sampling", "vllm", "--launcher", "process"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As test_sampling's: sharp, and ending after a while; with heads as wide as vLLM's CPU build wants them."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    tiny.write_model(folder, tiny.tokenizer(), tied=False, scale=0.4, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight *= 2
        model.lm_head.weight[model.config.eos_token_id] *= 2
    model.save_pretrained(folder)
    return folder


def started(folder: Path, settings: Engines = ON_VLLM, **options: Any) -> Vllm:
    return Vllm(str(folder), settings, rows=64, prompt_tokens=64, max_new_tokens=48, **options)


def opened(folder: Path) -> VllmEngine:
    return VllmEngine(started(folder))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    engine = opened(folder)
    yield engine
    engine.close()


def sampled(engine: Any, requests: Sequence[Request], temperature: float = 1.0, new: int = 24) -> list[list[Answer]]:
    return list(engine.sample(requests, temperature=temperature, max_new_tokens=new))


def test_temperature_zero_equals_the_transformers_engine_token_for_token(folder: Path, engine: VllmEngine) -> None:
    """Text, count of tokens and whether it ended; three answers each, and one cut short among them."""
    requests = [request(q, 3) for q in QUESTIONS]
    answers = sampled(engine, requests, temperature=0.0)
    assert answers == sampled(TransformersEngine(str(folder), rows=64), requests, temperature=0.0)
    assert {answer.finished for drawn in answers for answer in drawn} == {True, False}


def test_an_answer_is_the_same_in_any_company(engine: VllmEngine) -> None:
    """Alone, in another order, again, and with more answers asked for."""
    requests = [request(q, 3) for q in QUESTIONS]
    together = sampled(engine, requests)
    assert [sampled(engine, [r])[0] for r in requests] == together
    assert sampled(engine, requests[::-1])[::-1] == together
    assert sampled(engine, requests) == together
    assert [drawn[:3] for drawn in sampled(engine, [request(q, 5) for q in QUESTIONS])] == together
    assert len({answer.text for drawn in together for answer in drawn}) > 5


def test_the_key_and_the_sample_decide_an_answer(engine: VllmEngine) -> None:
    first, again, other = (sampled(engine, [request("name owl.", 4, k)])[0] for k in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({answer.text for answer in first}) == 4


def test_a_restarted_engine_repeats_its_answers_and_two_stand_side_by_side(folder: Path, engine: VllmEngine) -> None:
    """Closing the second, which shares the first's process, leaves the first at work."""
    requests = [request(q, 3) for q in QUESTIONS]
    second = opened(folder)
    drawn = sampled(second, requests)
    second.close()
    assert sampled(engine, requests) == drawn


def test_first_tokens_follow_the_softmax(folder: Path, engine: VllmEngine) -> None:
    require_first_tokens_of_the_softmax(engine, AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def test_no_token_is_cut_whatever_the_folder_says(tmp_path: Path) -> None:
    """Of 400 tokens about equally likely each is drawn, though the folder's generation_config asks for a top-k of 5."""
    folder = tiny.write_model(tmp_path / "model", tiny.tokenizer(), head_dim=32, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight *= 1e-3
    model.generation_config.update(do_sample=True, top_k=5, temperature=0.1)
    model.save_pretrained(folder)
    flat = opened(folder)
    (answers,) = sampled(flat, [request("name owl.", 2000)], new=1)
    flat.close()
    assert np.mean([answer.finished for answer in answers]) == pytest.approx(1 / 400, abs=0.004)
    assert len({answer.text for answer in answers}) > 200  # bytes that are no text read alike


def test_a_prompt_without_room_for_an_answer_is_refused_by_name_and_sizes(engine: VllmEngine) -> None:
    with pytest.raises(ValueError, match=f"exceed the model's context of {tiny.CONTEXT}"):
        sampled(engine, [request(QUESTIONS[1], 1)], new=tiny.CONTEXT)


def test_heads_too_narrow_for_the_cpu_build_are_an_error_that_says_so(tiny_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the limit is the CPU build's")
    with pytest.raises(ValueError, match=r"its attention heads are 8 wide, .* takes only 32, 64, .*transformers"):
        opened(tiny_folder)


def test_an_engine_that_cannot_start_says_why_and_leaves_others_at_work(folder: Path, engine: VllmEngine) -> None:
    """A cache of a million GiB."""
    if torch.cuda.is_available():
        pytest.skip("the size of the cache is set on a CPU alone")
    requests = [request(q, 3) for q in QUESTIONS]
    before = sampled(engine, requests)
    greedy = Engines(sampling="vllm", cpu_cache=1e6)
    with pytest.raises(ValueError, match=r"vLLM cannot start with it: Available memory .*1000000"):
        started(folder, greedy)
    assert sampled(engine, requests) == before


# --- scoring


def test_scores_equal_the_transformers_scorer(folder: Path, tmp_path: Path) -> None:
    """Raw values, not passed through a softmax or sigmoid: they sum to anything; of answers to shared prompts."""
    model = write_classifier(folder, tmp_path / "model")
    asked = [*pairs(23), *((user_prompt(QUESTIONS[2]), answer) for _, answer in pairs(7))]
    plain = ModelScorer(str(model), template="world-v1", batch_tokens=4096, dtype="float32")
    scorer = VllmScorer(started(model, classifies=True), template="world-v1")
    expected_NH, found_NH = plain.score(asked), scorer.score(asked)
    assert scorer.score([]).shape == (0, 2)
    scorer.close()
    assert list(scorer.heads) == list(plain.heads) == list(HEADS)
    np.testing.assert_allclose(found_NH, expected_NH, atol=1e-4)
    assert expected_NH.std(axis=0).min() > 1e-2
    assert expected_NH.min() < 0 < expected_NH.max()


def test_a_model_that_only_numbers_its_heads_takes_the_recipes_names(folder: Path, tmp_path: Path) -> None:
    model = write_classifier(folder, tmp_path / "model", id2label={0: "LABEL_0", 1: "LABEL_1"})
    scorer = VllmScorer(started(model, classifies=True), ("a", "b"), template="world-v1")
    scorer.close()
    assert list(scorer.heads) == ["a", "b"]


# --- a run


def dpa(*words: str) -> str:
    """What `dpa` says on stderr."""
    done = subprocess.run([sys.executable, "-m", "dpalign", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_run_on_vllm_writes_the_same_records_and_a_change_of_engine_redoes_what_it_drew(tmp_path: Path) -> None:
    """The micro recipe up to its first selection, with heads of 32; then the same folder on transformers."""
    words = ["run", str(MICRO), "--out", str(tmp_path / "run"), "--until", "select-1", "--pretrain.hidden", "64"]
    dpa(*words, "--engines.sampling", "vllm", "--engines.scoring", "vllm")
    on_vllm = Written(tmp_path / "run")
    assert on_vllm.ledger("sample-1")["knobs"]["engines.sampling"] == "vllm"
    said = dpa(*words)
    assert 'sample-1: engines.sampling "vllm" -> "transformers"' in said
    assert "steerlm-d2: input annotate changed" in said or "steerlm-d2: done before" in said
    plain = Written(tmp_path / "run")
    assert on_vllm.drawn == plain.drawn
    assert on_vllm.scored == plain.scored == on_vllm.drawn
    assert on_vllm.selected == plain.selected > 0
    np.testing.assert_allclose(on_vllm.annotated_NH, plain.annotated_NH, atol=1e-4)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_an_engine_that_is_killed_twice_loses_no_row_and_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    """Drawing by shards of one prompt. The killed process holds the engine core, whatever vLLM's own variable asks."""
    pairs = list(itertools.islice(itertools.combinations(THINGS, 2), 60))
    data = write_prompts(tmp_path / "data", [f"explain {one} and {other}." for one, other in pairs])

    def start(run: str, **environment: str) -> "subprocess.Popen[str]":
        inputs = ["--policy", str(folder), "--data", str(data), "--t", "2", "--half", "D1", "--condition", "directions"]
        words = [str(MICRO), "--out", str(tmp_path / run / "sample-2"), *inputs, *DRAWING]
        command = [sys.executable, "-m", "dpalign", "sample", *words]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)

    def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
        said = process.communicate(timeout=500)[1]
        return process.returncode, said

    def made() -> int:
        return len(list(tmp_path.glob("killed/sample-2.partial/.stage/tallies/*.json")))

    assert finished(start("alone"))[0] == 0
    for _ in range(2):
        enough, process = made() + 3, start("killed", VLLM_ENABLE_V1_MULTIPROCESSING="1")
        wait_until(lambda enough=enough: made() >= enough, seconds=500)
        worker, *others = children(process.pid)
        assert not [other for other in others if "EngineCore" in Path(f"/proc/{other}/cmdline").read_text()]
        os.kill(worker, signal.SIGKILL)
        code, said = finished(process)
        assert code == 2
        assert "ended by SIGKILL" in said
    assert 6 <= made() < len(pairs)
    code, said = finished(start("killed"))
    assert code == 0, said
    assert told(tmp_path / "killed" / "sample-2") == told(tmp_path / "alone" / "sample-2")
    answers = list(read_rows(tmp_path / "killed" / "sample-2", CANDIDATES))
    assert len(answers) == len({(row["prompt_id"], row["condition_index"], row["sample"]) for row in answers}) == 240


class Written:
    """What a run folder holds: the keys of its answers, in order, and the scores of given ones."""

    def __init__(self, run: Path) -> None:
        key = ("prompt_id", "t", "condition_index", "sample", "condition_kind", "condition")
        self.run = run
        answers = list(read_rows(run / "sample-1", CANDIDATES))
        self.drawn = [tuple(row[k] for k in key[:4]) for row in answers]
        self.scored = [tuple(row[k] for k in key[:4]) for row in read_rows(run / "score-1", SCORES)]
        self.selected = len(list(read_rows(run / "select-1", CONVERSATIONS)))
        self.annotated_NH = np.array([row["rewards"] for row in read_rows(run / "annotate", SCORES)])
        assert all(0 < row["tokens"] <= 48 for row in answers)
        unfinished = [row["response"] for row in answers if not row["finished"] and row["tokens"] < 48]
        assert not any(text.strip() for text in unfinished)  # cut at the limit, or empty

    def ledger(self, step: str) -> dict[str, Any]:
        return read_ledger(self.run / step)


# --- vLLM's own server, with none of our code in it


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base model, its chat template taking directions as an exported policy's does."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    AutoModelForCausalLM.from_pretrained(WORLD_BASE, dtype="float32").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(WORLD_BASE)
    names = ("helpfulness", "verbosity")
    tokenizer.chat_template = chat_template("world-v1", "world-v1", names, eos=tokenizer.eos_token)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(steered: Path) -> Iterator[str]:
    with vllm_server(steered, "mine", sys.executable) as address:
        yield address


def asked(address: str, body: dict[str, Any]) -> dict[str, Any]:
    given = json.dumps({"model": "mine", "temperature": 0, "max_tokens": 24, "return_token_ids": True} | body)
    call = urllib.request.Request(
        f"{address}/v1/chat/completions", given.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=120) as response:
        said: dict[str, Any] = json.load(response)
    return said


@pytest.mark.parametrize("angle", [0, -10, -22.5, -30, -45])
def test_vllms_own_server_reads_a_direction_as_transformers_does(server: str, steered: Path, angle: float) -> None:
    """The prompt token for token, by weights and by angle, and the greedy answer to it."""
    tokenizer = AutoTokenizer.from_pretrained(steered)
    messages = user_prompt("explain fox, tea and iron.")
    v = {"helpfulness": float(np.cos(np.radians(angle))), "verbosity": float(np.sin(np.radians(angle)))}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, preference=v)
    assert str(round(100 * v["helpfulness"])) in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = asked(server, {"messages": messages, "chat_template_kwargs": {"preference": v}})
    assert said["prompt_token_ids"] == ids
    assert asked(server, {"messages": messages, "chat_template_kwargs": {"angle": angle}})["prompt_token_ids"] == ids
    assert asked(server, {"messages": messages})["prompt_token_ids"] != ids
    model = AutoModelForCausalLM.from_pretrained(steered, dtype="float32").eval()
    greedy = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
    assert said["choices"][0]["token_ids"] == greedy


def test_vllms_own_server_refuses_a_direction_that_the_template_refuses(server: str) -> None:
    """An unknown objective is the client's error, and the message names the known ones."""
    body = {"messages": user_prompt("name tea."), "chat_template_kwargs": {"preference": {"honesty": 1.0}}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(server, body)
    assert refused.value.code == 400
    told = refused.value.read().decode()
    assert "honesty" in told
    assert "helpfulness" in told
