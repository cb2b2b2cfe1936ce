"""`dpa serve` as its clients see it: OpenAI's own client, and the fields that turn the dial."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra dpalign[train]")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
pytest.importorskip("openai", reason="needs the extra dpalign[dev]")

import httpx2
import openai
from transformers import AutoTokenizer

import api_server
from api_server import QUESTION, Running
from dpalign.train.contract import write_contract


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with api_server.serving(folder, reward=True) as server:
        yield server


def text_read(running: Running, **fields: object) -> str:
    """The prompt that the model reads for a request."""
    with running.prompts_read() as prompts:
        assert running.ask(max_tokens=1, **fields).status_code == 200
    return str(running.generator.prompts.tokenizer.decode(prompts[0]))


def test_openais_client_gets_an_answer_in_full_and_streamed_and_they_are_the_same(running: Running) -> None:
    client = running.client()
    asked = {"model": "mine", "messages": QUESTION, "seed": 5, "n": 3, "extra_body": {"angle": -30}}
    whole = client.chat.completions.create(**asked)
    texts, finishes, usage = [""] * 3, [""] * 3, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert whole.usage.completion_tokens == whole.usage.total_tokens - whole.usage.prompt_tokens > 3
    assert len(set(texts)) == 3
    assert [whole.object, whole.model, whole.choices[0].message.role] == ["chat.completion", "mine", "assistant"]


def test_the_same_seed_gives_the_same_answer_and_no_seed_another(running: Running) -> None:
    def answer(**fields: object) -> str:
        return str(running.ask(angle=-20, temperature=1.5, **fields).json()["choices"][0]["message"]["content"])

    assert answer(seed=1) == answer(seed=1)
    assert len({answer() for _ in range(4)}) > 1


@pytest.mark.parametrize("angle", [0, -10, -22.5, -30, -45])
def test_a_direction_is_the_same_prompt_wherever_a_request_gives_it(
    running: Running, folder: Path, angle: float
) -> None:
    """What the folder's own template writes, at the five directions of test_vllm.py, through OpenAI's client."""
    x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    ways = [
        ("mine", {"angle": angle}),
        ("mine", {"preference": {"helpfulness": 7 * x, "verbosity": 7 * y}}),
        ("mine", {"chat_template_kwargs": {"angle": angle}}),
        (f"mine@{angle}", {}),
        (f"mine@helpfulness={x:.6f},verbosity={y:.6f}", {}),
    ]
    with running.prompts_read() as prompts:
        for model, more in ways:
            running.client().chat.completions.create(model=model, messages=QUESTION, max_tokens=1, extra_body=more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(QUESTION, angle=angle, tokenize=False, add_generation_prompt=True)
    assert prompts == [tokenizer(text, add_special_tokens=False)["input_ids"]] * len(ways)
    assert f"helpfulness*{round(100 * x)} verbosity*{round(100 * y)}" in text


def test_a_users_system_message_stands_before_the_direction_and_parts_and_developer_are_read(running: Running) -> None:
    messages = [
        {"role": "developer", "content": "be kind."},
        {"role": "user", "content": [{"type": "text", "text": "name fox"}, {"type": "text", "text": "."}]},
    ]
    prompt = text_read(running, messages=messages, angle=0)
    assert prompt.index("be kind.") < prompt.index("helpfulness*100 verbosity*0") < prompt.index("name fox.")
    assert "helpfulness" not in text_read(running)


def test_a_direction_outside_the_trained_range_is_answered_with_a_warning(running: Running) -> None:
    inside, outside = running.ask(angle=-45), running.ask(angle=20)
    assert inside.json()["warnings"] == []
    assert "x-dpa-warning" not in inside.headers
    assert "-45 to 0 degrees" in outside.json()["warnings"][0]
    assert outside.headers["x-dpa-warning"] == outside.json()["warnings"][0]
    first = next(line for line in running.ask(angle=20, stream=True).text.splitlines() if line.startswith("data: "))
    assert json.loads(first.removeprefix("data: "))["warnings"] == outside.json()["warnings"]


@pytest.mark.parametrize(
    "fields",
    [
        {"preference": {"helpful": 1}},
        {"preference": {"helpfulness": 0, "verbosity": 0}},
        {"preference": {"helpfulness": True}},
        {"preference": "concise"},
        {"preference": {}},
        {"angle": "left"},
        {"angle": -30, "preference": {"helpfulness": 1}},
        {"model": "mine@"},
        {"model": "mine@helpful=1"},
        {"model": "mine@-30", "angle": -30},
        {"angle": -30, "chat_template_kwargs": {"angle": -30}},
        {"verbosity": "low", "preference": {"helpfulness": 1}},
        {"verbosity": "low", "chat_template_kwargs": {"preference": {"helpfulness": 1}}},
        {"chat_template_kwargs": {"preference": {"helpful": 1}}},
    ],
    ids=json.dumps,
)
def test_a_bad_preference_is_refused_with_the_known_names(running: Running, fields: dict[str, object]) -> None:
    answer = running.ask(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "preference")
    if "angle" not in fields or "preference" in fields or fields["angle"] == "left":
        # a direction given twice is refused before either is read
        assert "helpfulness, verbosity" in error["message"]


def test_verbosity_is_the_angle_that_the_contract_has_for_it(running: Running) -> None:
    """low is -40 degrees, as OpenAI's client sends it: whole, streamed, and in the responses API's spelling."""
    client = running.client()
    x, y = round(math.cos(math.radians(40)), 6), -round(math.sin(math.radians(40)), 6)
    asked = {"model": "mine", "messages": QUESTION, "seed": 5}
    at_40 = client.chat.completions.create(**asked, extra_body={"angle": -40}).choices[0].message.content
    for more in ({"verbosity": "low"}, {"extra_body": {"text": {"verbosity": "low"}}}):
        whole = client.chat.completions.create(**asked, **more)
        assert whole.preference == {"helpfulness": x, "verbosity": y}
        assert whole.choices[0].message.content == at_40
        chunks = list(client.chat.completions.create(**asked, **more, stream=True))
        assert chunks[0].preference == {"helpfulness": x, "verbosity": y}
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == at_40
    for level, line in {"medium": "helpfulness*92 verbosity*-38", "high": "helpfulness*100 verbosity*-9"}.items():
        assert line in text_read(running, verbosity=level)
    assert "helpfulness" not in text_read(running, verbosity=None)


def test_verbosity_beside_another_direction_is_refused(running: Running) -> None:
    for more in ({"angle": -30}, {"model": "mine@-30"}, {"text": {"verbosity": "high"}}):
        answer = running.ask(verbosity="low", **more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "preference")
        assert "give one" in answer.json()["error"]["message"]
    assert running.ask(verbosity="low", text={"verbosity": "low"}, max_tokens=1).status_code == 200


def test_verbosity_of_a_model_without_lengths_is_refused_with_the_cure(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    write_contract(bare, replace(api_server.CONTRACT, verbosity={}))
    with api_server.serving(bare) as server:
        error = server.ask(verbosity="low").json()["error"]
        assert (error["param"], error["code"]) == ("verbosity", "preference")
        assert "no lengths of answers are on record" in error["message"]
        assert "export the policy from its evaluated run" in error["message"]


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_weight_that_is_no_number_is_refused(running: Running, weight: str) -> None:
    for field in (f'"angle": {weight}', f'"preference": {{"helpfulness": {weight}}}'):
        body = f'{{"model": "mine", "messages": {json.dumps(QUESTION)}, {field}}}'
        url = f"{running.url}/v1/chat/completions"
        answer = httpx2.post(url, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert "finite" in answer.json()["error"]["message"]
        assert "helpfulness, verbosity" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"preferences": {"helpfulness": 1}}, "unknown_field", "'preference'"),
        ({"angel": -30}, "unknown_field", "'angle'"),
        ({"top_k": 5}, "unknown_field", "'top_k'"),
        ({"logprobs": True}, "unsupported", "logprobs"),
        ({"top_logprobs": 3}, "unsupported", "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "unsupported", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported", "response_format"),
        ({"frequency_penalty": 0.5}, "unsupported", "frequency_penalty"),
        ({"verbosity": "tiny"}, "invalid_value", "'low', 'medium' or 'high'"),
        ({"text": {"verbosity": "tiny"}}, "invalid_value", "'low', 'medium' or 'high'"),
        ({"text": {"format": {"type": "json_object"}}}, "unknown_field", "format"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 9}, "invalid_value", "at most 8"),
        ({"n": True}, "invalid_value", "n"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"max_tokens": 129}, "invalid_value", "128"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "differ"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "yes"}]}, "invalid_value", "user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value", "content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "unsupported", "tool_calls"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "context_length_exceeded", "tokens"),
        ({"angle_spread": 5}, "invalid_value", "best_of"),
        ({"best_of": 2}, "invalid_value", "direction"),
        ({"best_of": 9, "angle": 0}, "invalid_value", "at most 8"),
        ({"best_of": 2, "angle": 0, "n": 2}, "invalid_value", "n at 1"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_what_cannot_be_honoured_is_refused_in_openais_shape(
    running: Running, fields: dict[str, object], code: str, word: str
) -> None:
    answer = running.ask(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    assert "[" not in str(error["param"])  # a path of names, and no type of ours


def test_a_chat_that_cannot_fit_is_refused_before_it_is_tokenized(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """255 tokens of the prompt, none of them longer than the tokenizer's longest: one character more is too many."""
    longest = max(map(len, running.generator.prompts.tokenizer.get_vocab()))
    most = running.service.max_characters
    assert most == 255 * (longest + 1)
    written, whole = [], running.generator.prompts.ids

    async def ids(*arguments: object) -> object:
        written.append(running.service.line.running)
        return await whole(*arguments)

    monkeypatch.setattr(running.generator.prompts, "ids", ids)
    for text, tokenized in (("a " * (most // 2 + 1), 0), ("a" * most, 1)):
        answer = running.ask(messages=[{"role": "user", "content": text}])
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert len(written) == tokenized
    assert running.ask(max_tokens=1).status_code == 200
    assert written == [1, 1]  # in its place in line


def test_a_field_of_a_million_characters_is_refused_in_a_short_answer(running: Running) -> None:
    for fields in ({"x" * 10**6: 1}, {"text": {"x" * 10**6: 1}}, {"model": "x" * 10**6}, {"preference": "x" * 10**6}):
        answer = running.ask(**fields)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 3000


def test_fields_of_openais_that_ask_for_nothing_are_taken(running: Running) -> None:
    answer = running.ask(
        user="u", metadata={"a": "b"}, store=False, logprobs=False, top_logprobs=0, frequency_penalty=0.0, tools=[],
        tool_choice="none", response_format={"type": "text"}, logit_bias={}, presence_penalty=0, audio=None, stop=None,
        service_tier="auto", parallel_tool_calls=True, max_tokens=4,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text


def test_openais_client_raises_its_own_errors(running: Running) -> None:
    client = running.client()
    with pytest.raises(openai.BadRequestError, match="helpfulness, verbosity"):
        client.chat.completions.create(model="mine", messages=QUESTION, extra_body={"preference": {"brevity": 1}})
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' here; there is 'mine'"):
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_body_that_is_no_json_object_is_refused(running: Running) -> None:
    url = f"{running.url}/v1/chat/completions"
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 5_000, b"1" * 5_000):
        answer = httpx2.post(url, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    surrogate = json.dumps({"model": "mine", "messages": [{"role": "user", "content": "\ud800"}]})
    assert httpx2.post(url, content=surrogate, headers={"content-type": "application/json"}).status_code == 400
    told = {"model": "mine", "messages": QUESTION}
    assert httpx2.post(url, content=json.dumps(told), headers={"content-type": "text/plain"}).status_code == 400


def test_the_model_is_listed_with_its_dial(running: Running) -> None:
    (model,) = running.client().models.list().data
    assert (model.id, model.object, model.owned_by) == ("mine", "model", "dpalign")
    assert model.dial["objectives"] == ["helpfulness", "verbosity"]
    assert model.dial["arc"] == [-45.0, 0.0]
    assert model.dial["verbosity"]["low"] == {"angle": -40.0, "words": 11.5}
    assert running.client().models.retrieve("mine@-30").id == "mine"
    dial = httpx2.get(f"{running.url}/v1/dial").json()
    assert dial == {**model.dial, "model": "mine", "rewards": True, "max_best_of": 8, "temperature": 0.7} | {
        "note": running.service.dial.note,
        "questions": list(running.service.dial.questions),
    }


def test_an_answer_is_scored_on_each_objective(running: Running) -> None:
    """The tests' reward: letters e, and characters."""
    body = {"messages": QUESTION, "response": "bee is here."}
    answer = httpx2.post(f"{running.url}/v1/rewards", json=body)
    assert answer.json() == {"rewards": {"helpfulness": 4.0, "verbosity": 12.0}}
    for wrong in ({**body, "messages": QUESTION * 2}, {**body, "answer": ""}, {"messages": QUESTION}):
        assert httpx2.post(f"{running.url}/v1/rewards", json=wrong).status_code == 400


def test_choices_between_answers_tell_a_persons_direction(running: Running) -> None:
    def told(*choices: object) -> httpx2.Response:
        return httpx2.post(f"{running.url}/v1/taste", json={"choices": list(choices)})

    brief = {"preferred": {"helpfulness": 60, "verbosity": 20}, "other": {"helpfulness": 70, "verbosity": 50}}
    once, often = told(brief).json(), told(*[brief] * 6).json()
    assert -45 <= often["angle"] < once["angle"] < -22.5
    assert often["within"] < once["within"]
    assert math.hypot(*often["preference"].values()) == pytest.approx(1)
    angles = [math.degrees(math.atan2(v["verbosity"], v["helpfulness"])) for v in often["next"]]
    assert (
        -45.001 <= min(angles) < often["angle"] < max(angles) <= 0.001
    )  # though this model's front was never measured
    for wrong in ({"preferred": {"beauty": 1}, "other": {"beauty": 2}}, {"preferred": {}}, {**brief, "why": 1}):
        assert told(wrong).status_code == 400
    assert told(*[brief] * 101).status_code == 400
    assert told().status_code == 400


def test_best_of_returns_the_answer_that_the_reward_model_rates_best_as_asked(running: Running) -> None:
    """Asked for brevity, eight answers give one no longer than their mean; it says where and of how many."""
    asked = {"preference": {"verbosity": -1}, "best_of": 8, "angle_spread": 15, "seed": 4, "max_tokens": 60}
    answer = running.ask(**asked).json()
    report, text = answer["best_of"], answer["choices"][0]["message"]["content"]
    assert report["drawn"] == 8
    assert report["rewards"]["verbosity"] == min(100, len(text))
    assert report["value"] == -report["rewards"]["verbosity"] > report["mean_value"]
    assert answer["usage"]["completion_tokens"] > 8
    away = math.degrees(math.acos(-report["drawn_at"]["verbosity"]))
    assert away <= 15
    streamed = [
        json.loads(line[6:]) for line in running.ask(**asked, stream=True).text.splitlines() if line[6:7] == "{"
    ]
    assert "".join(c["delta"].get("content", "") for chunk in streamed for c in chunk["choices"]) == text
    assert running.ask(**asked).json()["choices"] == answer["choices"]


def test_without_a_reward_model_best_of_and_scores_are_refused_saying_so(folder: Path) -> None:
    with api_server.serving(folder) as running:
        answer = running.ask(angle=0, best_of=4)
        assert answer.status_code == 400
        assert "--reward" in answer.json()["error"]["message"]
        answer = httpx2.post(f"{running.url}/v1/rewards", json={"messages": QUESTION, "response": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_reward_model")


def test_what_is_not_there_is_404_or_405_in_openais_shape(running: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/nothing", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/pyproject.toml", 404),
    ):
        answer = httpx2.request(method, running.url + path)
        assert answer.status_code in (status, 404), (method, path)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
