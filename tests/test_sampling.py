"""Sampling: the model's own distribution, the same answers in any company, and no forward wasted."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import tiny
from dpalign.engines.decoding import CopyingDecoder, SharedDecoder
from dpalign.engines.engine import Answer, Request
from dpalign.engines.memory import halvings
from dpalign.engines.transformers_engine import TransformersEngine, draw
from dpalign.paper.direction import rng_for
from dpalign.rows import user_prompt

QUESTIONS = (
    "name owl.",
    "explain fox, tea and iron.",
    "explain rain, salt, wolf and moon. that is a good question. there is much to say.",
    "name tea.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharp enough to prefer some tokens, and to end after a while: its end-of-text token is made likelier."""
    folder = tiny.write_model(tmp_path_factory.mktemp("sharp") / "model", tiny.tokenizer(), tied=False, scale=0.4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight *= 2
        model.lm_head.weight[model.config.eos_token_id] *= 2
    model.save_pretrained(folder)
    return folder


def request(question: str, n: int, *key: int | str) -> Request:
    return Request(tuple(user_prompt(question)), n, (7, "test", question, *key))


def sampled(
    folder: Path, requests: Sequence[Request], temperature: float = 1.0, rows: int = 64, new: int = 24
) -> list[list[Answer]]:
    engine = TransformersEngine(str(folder), rows=rows)
    return list(engine.sample(requests, temperature=temperature, max_new_tokens=new))


def test_temperature_zero_is_greedy_generation_token_for_token(folder: Path) -> None:
    """Four prompts of different lengths, three answers each, left-padded side by side."""
    answers = sampled(folder, [request(q, 3) for q in QUESTIONS], temperature=0.0)
    tokens = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    for question, drawn in zip(QUESTIONS, answers, strict=True):
        asked = tokens.apply_chat_template(user_prompt(question), add_generation_prompt=True, return_dict=False)
        ids = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=24)[0, len(asked) :].tolist()
        finished = ids[-1] == tokens.eos_token_id
        expected = Answer(tokens.decode(ids[:-1] if finished else ids, skip_special_tokens=True), len(ids), finished)
        assert drawn == [expected] * 3
    assert len({a[0].text for a in answers}) > 1


def test_an_answer_is_the_same_in_any_company(folder: Path) -> None:
    """Alone, three or sixty-four side by side, in another order, and with more answers asked for."""
    requests = [request(q, 3) for q in QUESTIONS]
    together = sampled(folder, requests)
    assert sampled(folder, requests, rows=3) == sampled(folder, requests, rows=7) == together
    assert [sampled(folder, [r])[0] for r in requests] == together
    assert sampled(folder, requests[::-1])[::-1] == together
    assert [drawn[:3] for drawn in sampled(folder, [request(q, 5) for q in QUESTIONS])] == together
    assert len({answer.text for drawn in together for answer in drawn}) > 5


@pytest.mark.parametrize("share", [True, False])
def test_out_of_memory_the_rows_are_halved_and_the_answers_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: bool
) -> None:
    """Room for two answers side by side: 12 rows go to 6, 3 and 1; three answers to a prompt are divided too."""
    requests = [request(q, 3) for q in QUESTIONS]
    together = sampled(folder, requests)
    engine = TransformersEngine(str(folder), rows=12, share_prefix=share)
    decoder, most = (SharedDecoder if share else CopyingDecoder), list[int]()
    read = decoder.read

    def with_little_memory(self: Any, token_R: torch.Tensor) -> torch.Tensor:
        if len(token_R) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        most.append(len(token_R))
        return read(self, token_R)

    monkeypatch.setattr(decoder, "read", with_little_memory)
    before = halvings()
    drawn = list(engine.sample(requests, temperature=1.0, max_new_tokens=24))
    assert [[answer.text for answer in answers] for answers in drawn] == [
        [answer.text for answer in answers] for answers in together
    ]
    assert (max(most), halvings() - before, engine.rows) == (1, 3, 1)
    assert [message.partition(":")[0] for message in caplog.messages if "memory" in message] == [
        f"out of memory, {folder}"
    ] * 3
    assert list(engine.sample(requests[:1], temperature=1.0, max_new_tokens=24)) == drawn[:1]
    assert halvings() - before == 3  # it stays with what fits


def test_no_memory_for_one_answer_and_other_errors_are_no_batch_to_halve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(folder), rows=2)
    for error, kind, said in (
        (MemoryError(), ValueError, "1 answers side by side, and no batch is smaller"),
        (RuntimeError("of another kind"), RuntimeError, "^of another kind$"),
    ):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(SharedDecoder, "join", fails)
        with pytest.raises(kind, match=said):
            list(engine.sample([request("name owl.", 1)], temperature=1.0, max_new_tokens=4))


def test_another_key_draws_another_answer_and_the_same_key_the_same(folder: Path) -> None:
    first, again, other = (sampled(folder, [request("name owl.", 4, k)])[0] for k in (0, 0, 1))
    assert first == again
    assert first != other


def require_first_tokens_of_the_softmax(engine: Any, model: Any) -> None:
    """The shares of 4,000 first tokens differ from the model's own probabilities no more than by chance."""
    with torch.inference_mode():
        logits_V = model(torch.tensor([engine.reader.prompt_ids(user_prompt("name owl."))])).logits[0, -1].double()
    texts = [engine.reader.tokenizer.decode([token], skip_special_tokens=True) for token in range(len(logits_V))]
    shares = {}
    for temperature in (1.0, 0.7):
        expected: dict[str, float] = defaultdict(float)
        for text, share in zip(texts, torch.softmax(logits_V / temperature, dim=-1).tolist(), strict=True):
            expected[text] += share
        requests = [request("name owl.", 4000, str(temperature))]
        (answers,) = engine.sample(requests, temperature=temperature, max_new_tokens=1)
        count = Counter(answer.text for answer in answers)
        assert sum(count[text] for text in expected) == 4000
        expected_T, drawn_T = np.array(list(expected.values())), np.array([count[text] for text in expected]) / 4000
        assert total_variation(drawn_T, expected_T) < noise(expected_T, 4000)
        shares[temperature] = expected_T
    assert total_variation(shares[1.0], shares[0.7]) > 2 * noise(shares[1.0], 4000)  # or the test could not tell


def test_first_tokens_follow_the_softmax(folder: Path) -> None:
    engine = TransformersEngine(str(folder), rows=4000)
    require_first_tokens_of_the_softmax(engine, engine.model)


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)


def noise(share_V: np.ndarray, draws: int) -> float:
    """1.3 times the total variation that so many true draws are expected to show."""
    return float(1.3 * 0.5 * np.sqrt(2 / np.pi * share_V * (1 - share_V) / draws).sum())


def test_no_token_is_cut_from_a_nearly_flat_distribution() -> None:
    """Of 400 tokens, each a little likelier than the next, 86.9% of the draws lie beyond the 50 likeliest."""
    logits_V = torch.linspace(0.1, 0.0, 400)  # no ties, which a cut to the 50 likeliest would spare
    expected = torch.softmax(logits_V, dim=-1)[50:].sum().item()
    assert expected == pytest.approx(0.869, abs=0.001)
    drawn_R = draw(logits_V.expand(4000, -1), rng_for(0, "flat").random(4000), 1.0).numpy()
    assert len(np.unique(drawn_R)) > 395
    assert (drawn_R >= 50).mean() == pytest.approx(expected, abs=0.02)


def test_equal_shares_of_the_uniform_choose_equal_tokens() -> None:
    """By inversion: of probabilities 0.1, 0, 0.6 and 0.3, a draw below 0.1 is the first; the second never comes."""
    logits_RV = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().expand(6, -1)
    uniform_R = np.array([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 0.99999999])
    assert draw(logits_RV, uniform_R, 1.0).tolist() == [0, 0, 2, 2, 3, 3]


def forwards(engine: TransformersEngine) -> list[tuple[int, int]]:
    """(rows, tokens a row) of every forward from now on."""
    shapes: list[tuple[int, int]] = []
    engine.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_prompt_is_read_once_for_all_its_answers(folder: Path) -> None:
    """Two prompts with sixteen answers each: both in the first forward, in a row; then thirty-two rows of one token."""
    engine = TransformersEngine(str(folder), rows=64)
    shapes = forwards(engine)
    requests = [request(q, 16) for q in QUESTIONS[:2]]
    list(engine.sample(requests, temperature=1.0, max_new_tokens=4))
    assert shapes[0] == (1, sum(engine.reader.prompt_tokens(user_prompt(q)) for q in QUESTIONS[:2]))
    assert shapes[1][0] <= 32
    assert all(tokens == 1 for _, tokens in shapes[1:])
    assert len(shapes) <= 4  # the last token is drawn and not read


def test_finished_answers_are_read_no_further(folder: Path) -> None:
    """Each answer takes a forward for every token but its last: no row of the batch outlives its end of text."""
    engine = TransformersEngine(str(folder), rows=64)
    shapes = forwards(engine)
    answers = [
        a for drawn in engine.sample([request(QUESTIONS[0], 16)], temperature=1.0, max_new_tokens=24) for a in drawn
    ]
    assert len({a.tokens for a in answers}) > 3  # they end at different lengths
    assert sum(rows for rows, _ in shapes[1:]) == sum(a.tokens - 1 for a in answers)


def test_a_batch_takes_whole_requests_up_to_the_rows_allowed(folder: Path) -> None:
    """Requests of 3 answers, the shortest prompts first: two fit in 7 rows; one fits nowhere in 2 and goes alone."""
    for rows, batches in ((7, [2, 2]), (2, [1, 1, 1, 1]), (12, [4])):
        engine = TransformersEngine(str(folder), rows=rows)
        shapes = forwards(engine)
        requests = [request(q, 3) for q in QUESTIONS]
        list(engine.sample(requests, temperature=1.0, max_new_tokens=2))
        sizes = sorted(engine.reader.prompt_tokens(r.messages) for r in requests)
        expected = [sum(sizes[start : start + batches[0]]) for start in range(0, 4, batches[0])]
        assert [tokens for count, tokens in shapes if count == 1 and tokens > 1] == expected


def test_waiting_requests_take_the_rows_of_answers_that_end(folder: Path) -> None:
    """64 requests of 2 answers of 1 to 60 tokens: while some wait, 14 of the 16 rows are decoded at least on average.

    The answers are those of the whole in 500 rows, and of 16 at a time, which ends with the longest of each 16.
    """
    requests = [request(QUESTIONS[i % 4], 2, i) for i in range(64)]
    engine = TransformersEngine(str(folder), rows=16)
    shapes = forwards(engine)
    answers = list(engine.sample(requests, temperature=1.0, max_new_tokens=60))
    last_join = max(i for i, (_, tokens) in enumerate(shapes) if tokens > 1)
    alive = [rows for rows, tokens in shapes[:last_join] if tokens == 1]
    assert len(alive) > 50
    assert max(alive) == 16
    assert np.mean(alive) > 14
    steps = sum(tokens == 1 for _, tokens in shapes)
    shapes.clear()
    by_prompt = sorted(range(64), key=lambda i: engine.reader.prompt_tokens(requests[i].messages))
    drained: dict[int, list[Answer]] = {}
    for start in range(0, 64, 8):
        eight = by_prompt[start : start + 8]
        drawn = engine.sample([requests[i] for i in eight], temperature=1.0, max_new_tokens=60)
        drained |= zip(eight, drawn, strict=True)
    assert answers == [drained[i] for i in range(64)] == sampled(folder, requests, rows=500, new=60)
    assert steps < 0.7 * sum(tokens == 1 for _, tokens in shapes)
    copying = TransformersEngine(str(folder), rows=16, share_prefix=False)
    assert answers == list(copying.sample(requests, temperature=1.0, max_new_tokens=60))


def test_answers_are_the_same_with_a_copy_of_the_prompt_each(folder: Path) -> None:
    """Drawn with the same uniforms: at temperature 1, and greedily."""
    requests = [request(q, 5) for q in QUESTIONS]
    shared, copying = (TransformersEngine(str(folder), rows=12, share_prefix=share) for share in (True, False))
    assert (shared.shares, copying.shares) == (True, False)
    for temperature in (1.0, 0.0):
        ours, theirs = (
            list(engine.sample(requests, temperature=temperature, max_new_tokens=40)) for engine in (shared, copying)
        )
        assert ours == theirs
    assert len({a.tokens for drawn in ours for a in drawn}) > 1


class Noise(LogitsProcessor):
    """Makes `generate` take the token that a row's uniform chooses, whatever it samples with."""

    def __init__(self, uniform_RT: np.ndarray) -> None:
        self.uniform_RT, self.step = uniform_RT, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token_R = draw(scores, self.uniform_RT[:, self.step], 1.0)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token_R[:, None], 0.0)


@pytest.mark.parametrize("share", [True, False])
def test_with_its_noise_generate_draws_the_same_answers(folder: Path, share: bool) -> None:
    """Sixteen answers of `generate(num_return_sequences=16)`, the engine's own uniforms injected into it."""
    asked = request(QUESTIONS[1], 16)
    engine = TransformersEngine(str(folder), rows=16, share_prefix=share)
    (ours,) = engine.sample([asked], temperature=1.0, max_new_tokens=24)
    ids = engine.reader.prompt_ids(asked.messages)
    uniform_RT = np.stack([rng_for(*asked.key, sample).random(24) for sample in range(16)])
    drawn = engine.model.generate(
        torch.tensor([ids]),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        num_return_sequences=16,
        max_new_tokens=24,
        logits_processor=[Noise(uniform_RT)],
    )[:, len(ids) :].tolist()
    eos = engine.tokenizer.eos_token_id
    cut = [row[: row.index(eos)] if eos in row else row for row in drawn]
    assert [a.text for a in ours] == [engine.reader.tokenizer.decode(row, skip_special_tokens=True) for row in cut]
    assert [a.finished for a in ours] == [eos in row for row in drawn]
    assert len({a.text for a in ours}) > 4


def test_an_answer_cut_at_the_limit_is_unfinished(folder: Path) -> None:
    answers = [a for drawn in sampled(folder, [request(q, 16) for q in QUESTIONS], new=3) for a in drawn]
    assert {a.finished for a in answers} == {True, False}
    assert all(a.tokens == 3 for a in answers if not a.finished)
    assert not any("</s>" in a.text for a in answers)


def test_a_prompt_without_room_for_an_answer_is_refused_by_name_and_sizes(folder: Path) -> None:
    engine = TransformersEngine(str(folder), rows=4)
    count = engine.reader.prompt_tokens(user_prompt(QUESTIONS[1]))
    with pytest.raises(ValueError, match="max_new_tokens") as error:
        list(engine.sample([request(QUESTIONS[1], 1)], temperature=1.0, max_new_tokens=tiny.CONTEXT))
    for word in (QUESTIONS[1], f"{count} tokens", f"{tiny.CONTEXT} new", f"context of {tiny.CONTEXT}"):
        assert word in str(error.value)
    room = tiny.CONTEXT - count
    assert len(list(engine.sample([request(QUESTIONS[1], 1)], temperature=1.0, max_new_tokens=room))) == 1
