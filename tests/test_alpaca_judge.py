"""The judge's client over real HTTP: preferences, refusals that pass and those that do not, and what is kept."""

import json
import math
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import judge_server
from dpalign.stages.alpaca.client import Client, Endpoint, Unavailable, retry_after
from dpalign.stages.alpaca.judge import Judgement, LogprobJudge, Pair, key_of, read_reply, reference_stands_first
from dpalign.stages.alpaca.judging import judge_pairs, judged_rows, pending
from dpalign.stages.alpaca.prompt import DEFAULT
from dpalign.stages.alpaca.store import Store
from judge_server import Says, completion

KEY = "sk-secret-123"


def endpoint(url: str, **settings: Any) -> Endpoint:
    return Endpoint(f"{url}/chat/completions", **{"timeout": 60.0, "pause": 0.01, "tries": 4, **settings})


def judge_at(url: str, workers: int = 1, **settings: Any) -> LogprobJudge:
    return LogprobJudge(endpoint(url, **settings), "short", DEFAULT, workers=workers)


def pairs(count: int = 12) -> list[Pair]:
    """The i-th output has i characters more than the reference's 20, less 6."""
    return [Pair(i, f"Do {i}.", "o" * (14 + i), "r" * 20) for i in range(count)]


def share(lead: float) -> float:
    """The server's P for an answer that is so many characters shorter."""
    return 1 / (1 + math.exp(-lead / 10))


def test_the_preference_is_the_same_whichever_answer_stands_first(tmp_path: Path) -> None:
    """A judge that looks at lengths alone: 1 + P(output), so 1.5 for as long an answer and 1.646 for 6 less."""
    with judge_server.serving() as server:
        judge, store = judge_at(server.url), Store(tmp_path / "s.jsonl")
        assert judge_pairs(pairs(), judge, store, "dpa") == 12
        rows = judged_rows(pairs(), judge.identity, store)
    assert [row.preference for row in rows] == pytest.approx([1 + share(6 - i) for i in range(12)])
    assert rows[0].preference == pytest.approx(1.6457, abs=1e-4)
    firsts = Counter(record["first"] for record in store.records.values())
    assert set(firsts) == {"reference", "output"}
    for pair, text in zip(pairs(), server.prompts(), strict=True):
        before = text.index(pair.reference) < text.index(pair.output) if len(pair.output) != 20 else None
        assert before is None or before == reference_stands_first(0, pair.instruction)
    asked = server.requests[0]
    assert {name: asked[name] for name in ("model", "max_tokens", "temperature", "logprobs", "top_logprobs")} == {
        "model": "short", "max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert "Authorization" not in server.headers[0]


def test_the_order_depends_on_the_seed_and_the_instruction_and_is_even() -> None:
    first = [reference_stands_first(0, f"Do {i}.") for i in range(2000)]
    assert sum(first) == pytest.approx(1000, abs=90)  # four standard deviations
    assert first != [reference_stands_first(1, f"Do {i}.") for i in range(2000)]


def test_a_token_that_is_not_listed_has_no_share() -> None:
    assert read_reply(json.dumps(completion({"m": -0.1, "The": -3.0})))[0] == 1.0
    assert read_reply(json.dumps(completion({"M": -0.1})))[0] == 0.0
    # exp(-1) / (exp(-1) + exp(-2)) = 0.7311; tokens that are neither m nor M take no part.
    assert read_reply(json.dumps(completion({"m": -1.0, "M": -2.0, "A": -0.1})))[0] == pytest.approx(0.7311, abs=1e-4)
    assert read_reply(json.dumps(completion({"m": -2000.0, "M": -2001.0})))[0] == pytest.approx(0.7311, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<html>", "no completion in the answer: "),
        ("[]", "no completion in the answer: "),
        ('{"choices": []}', "no completion in the answer: "),
        (json.dumps(completion(None)), "no log-probabilities in the answer"),
        (json.dumps({"choices": ["m"]}), "no log-probabilities in the answer"),
        (json.dumps({"choices": [{"logprobs": {"content": []}}]}), "no log-probabilities in the answer"),
        (json.dumps(completion({"A": -0.1, "m ": -2.0})), "neither m nor M among the likeliest tokens: 'A', 'm '"),
        (json.dumps(completion({"m": math.nan, "M": -1.0})), "log-probabilities that are none: 'm' nan, 'M' -1.0"),
        (json.dumps(completion({"m": 3.0, "M": -1.0})), "log-probabilities that are none: 'm' 3.0"),
        (json.dumps(completion({"m": -math.inf})), "log-probabilities that are none: 'm' -inf"),
    ],
)
def test_an_answer_that_is_no_preference_is_a_reason(body: str, reason: str) -> None:
    found, said, _ = read_reply(body)
    assert found is None
    assert said.startswith(reason)


def test_refusals_that_pass_are_asked_again_and_answered_once(tmp_path: Path) -> None:
    """A 429, a 500, a 503 and an answer that breaks off, each once, on the first four tries."""
    broken = {"Content-Length": "1000"}
    refusals = {0: Says({}, 429), 1: Says({}, 500), 2: Says("busy", 503), 3: Says("{", 200, broken)}
    with judge_server.serving(lambda number, body: refusals.get(number)) as server:
        judge, store = judge_at(server.url, tries=5), Store(tmp_path / "s.jsonl")
        assert judge_pairs(pairs(3), judge, store, "dpa") == 3
        assert len(server.requests) == 4 + 3
    assert all(row.preference is not None for row in judged_rows(pairs(3), judge.identity, store))


def test_retry_after_is_honoured_in_seconds_and_as_a_date() -> None:
    assert retry_after("2.5") == 2.5
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now=1445412480 - 30) == 30
    assert retry_after("-3") == 0
    assert [retry_after(header) for header in (None, "soon", "nan", "")] == [None] * 4
    times: list[float] = []

    def slow_down(number: int, body: Mapping[str, Any]) -> Says | None:
        import time

        times.append(time.monotonic())
        return Says({}, 429, {"Retry-After": "0.4"}) if number == 0 else None

    with judge_server.serving(slow_down) as server:
        Client(endpoint(server.url)).post(judge_at(server.url).body("a", "b", "c"))
    assert times[1] - times[0] >= 0.4  # our own pause would have been 0.01


def test_a_judge_that_asks_for_too_long_a_pause_or_refuses_too_often_is_left_for_later(tmp_path: Path) -> None:
    """Ten answers, then a wall: all ten are kept, and the same pairs then cost the two that are missing."""
    wall = Says({"error": {"message": "slow down"}}, 429)
    with judge_server.serving(lambda number, body: None if number < 10 else wall) as server:
        judge, store = judge_at(server.url), Store(tmp_path / "s.jsonl")
        with pytest.raises(ValueError, match="no answer after 4 tries, the last: HTTP 429: slow down") as error:
            judge_pairs(pairs(), judge, store, "dpa@-15")
        assert str(error.value).startswith(f"dpa@-15: {server.url}/chat/completions: ")
        assert str(error.value).endswith("(10 of 12 are answered and kept; the same command goes on)")
        assert len(server.requests) == 14
    store.close()
    wall = Says({}, 429, {"Retry-After": "3600"})
    with judge_server.serving(lambda number, body: wall) as server, pytest.raises(Unavailable, match="wait 3600 s"):
        Client(endpoint(server.url)).post({})
    with judge_server.serving() as server:  # at another address: the same judge
        judge, again = judge_at(server.url), Store(tmp_path / "s.jsonl")
        assert len(pending(pairs(), judge.identity, again)) == 2
        assert judge_pairs(pairs(), judge, again, "dpa@-15") == 2
        assert server.answered == 2


def test_what_every_request_would_meet_ends_the_asking_at_once_and_never_shows_the_key() -> None:
    told = Says({"error": {"message": f"Incorrect API key provided: {KEY}."}}, 401)
    with judge_server.serving(lambda number, body: told) as server:
        client = Client(endpoint(server.url, key=KEY, key_from="MY_KEY"))
        with pytest.raises(Unavailable, match="HTTP 401: Incorrect API key provided") as error:
            client.post({})
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert len(server.requests) == 1
    assert KEY not in str(error.value)
    assert KEY not in repr(client.endpoint)
    assert "[the key]" in str(error.value)
    assert str(error.value).endswith("; the key ($MY_KEY) is refused")
    for status, said in ((404, "is the URL the base of"), (403, "the key is not set"), (307, "it redirects to http")):
        says = Says({}, status, {"Location": "http://127.0.0.1:9/"})
        with (
            judge_server.serving(lambda number, body, says=says: says) as server,
            pytest.raises(Unavailable, match=said),
        ):
            Client(endpoint(server.url)).post({})


def test_a_judge_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with judge_server.serving() as server:
        url = server.url
    with pytest.raises(ValueError, match=r"unreachable \(.*refused\); is the URL right") as error:
        judge_pairs(pairs(), judge_at(url, pause=100.0), Store(tmp_path / "s.jsonl"), "dpa")
    assert "(0 of 12 are answered and kept" in str(error.value)


def test_a_judge_that_never_answers_is_timed_out() -> None:
    held = Says({}, wait_for=threading.Event())
    with judge_server.serving(lambda number, body: held) as server:
        with pytest.raises(Unavailable, match=r"no answer after 2 tries, the last: .*timed out"):
            Client(endpoint(server.url, timeout=0.2, tries=2)).post({})
        assert held.wait_for is not None
        held.wait_for.set()


def test_a_refusal_of_one_pair_and_a_malformed_answer_are_counted_and_never_scored(tmp_path: Path) -> None:
    says = {2: Says({"error": {"message": "content filter"}}, 400), 4: Says("not JSON"), 6: Says(completion(None))}
    with judge_server.serving(lambda number, body: says.get(number)) as server:
        judge, store = judge_at(server.url), Store(tmp_path / "s.jsonl")
        assert judge_pairs(pairs(), judge, store, "dpa") == 12
        assert len(server.requests) == 12
        rows = judged_rows(pairs(), judge.identity, store)
        assert [row.index for row in rows if row.preference is None] == [2, 4, 6]
        assert [rows[i].reason.partition(":")[0] for i in (2, 4)] == ["HTTP 400", "no completion in the answer"]
        assert rows[2].reason == "HTTP 400: content filter"
        # They were paid for: asked again only when told to.
        assert judge_pairs(pairs(), judge, store, "dpa") == 0
        assert store.ask_again([key_of(judge.identity, pair) for pair in pairs()]) == 3
        assert judge_pairs(pairs(), judge, store, "dpa") == 3
    again = Store(tmp_path / "s.jsonl")
    assert all(row.preference is not None for row in judged_rows(pairs(), judge.identity, again))
    assert again.again.total() == 3


def test_a_judge_that_fails_from_the_first_is_not_paid_for_all(tmp_path: Path) -> None:
    with judge_server.serving(lambda number, body: Says(completion(None))) as server:
        with pytest.raises(ValueError, match="its first 5 answers cannot be used: no log-probabilities") as error:
            judge_pairs(pairs(12), judge_at(server.url), Store(tmp_path / "s.jsonl"), "dpa")
        assert "--retry-failed" in str(error.value)
        assert len(server.requests) == 5


def test_equal_answers_are_a_draw_that_costs_nothing_and_equal_pairs_are_asked_once(tmp_path: Path) -> None:
    same = [Pair(0, "a", "x", "x"), Pair(1, "b", "y", "z"), Pair(2, "b", "y", "z")]
    with judge_server.serving() as server:
        judge, store = judge_at(server.url), Store(tmp_path / "s.jsonl")
        assert judge_pairs(same, judge, store, "dpa") == 1
        rows = judged_rows(same, judge.identity, store)
    assert [(row.preference, row.asked) for row in rows] == [(1.5, False), (1.5, True), (1.5, True)]


def test_another_model_prompt_seed_or_field_is_another_judge_and_another_address_is_not() -> None:
    def identity(model: str = "a", template: str = DEFAULT, url: str = "http://x", **settings: Any) -> str:
        return key_of(LogprobJudge(Endpoint(url), model, template, **settings).identity, pairs(1)[0])

    plain = identity()
    assert identity(url="http://y", workers=9) == plain
    others = [identity("b"), identity(template=DEFAULT + " "), identity(seed=1), identity(extra={"top_k": 1})]
    assert len({plain, *others}) == 5


def test_many_at_a_time_are_kept_each_on_the_disk_as_it_comes(tmp_path: Path) -> None:
    with judge_server.serving() as server:
        judge, store = judge_at(server.url, workers=8), Store(tmp_path / "s.jsonl")
        assert judge_pairs(pairs(60), judge, store, "dpa") == 60
        assert server.answered == 60
    kept = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in kept) == list(range(60))
    assert {record["judge"] for record in kept} == {"short"}
    assert {record["prompt_tokens"] for record in kept} == {300}


def test_a_line_that_a_kill_cut_short_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path)
    store.keep("a", Judgement(1.25), {})
    store.keep("b", Judgement(None, "why"), {})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "prefer')
    again = Store(path)
    assert set(again.records) == {"a", "b"}
    assert path.read_bytes() != whole  # reading touches nothing
    with pytest.raises(ValueError, match="another process keeps judgements in it"):
        again.keep("d", Judgement(1.5), {})
    store.close()
    again.keep("d", Judgement(1.5), {})
    assert path.read_bytes().startswith(whole)
    assert set(Store(path).records) == {"a", "b", "d"}
    for line, said in {
        b'{"key": "x", "preference": 3}\n': r"line 3: no judgement \(preference 3 is not in 1..2\)",
        b'{"key": "x", "preference": NaN, "reason": ""}\n': "line 3: no judgement",
        b'{"key": "x", "preference": null, "reason": ""}\n': "neither a preference nor a reason",
        b"[]\n": "line 3: no judgement",
        b"\n": "line 3: no judgement",
    }.items():
        path.write_bytes(whole + line)
        with pytest.raises(ValueError, match=said):
            Store(path)
