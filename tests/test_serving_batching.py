"""Answers decoded side by side: the same as alone, from the right distribution, joining and leaving at any step."""

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs the extra dpalign[train]")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import api_server
from dpalign.dial.server.engine import GenerationError, Sampling, collect
from dpalign.dial.server.transformers_engine import BatchingGenerator, draw_rows, nucleus
from dpalign.rows import user_prompt

QUESTIONS = ("name owl.", "explain fox, tea and iron.", "explain rain, salt, wolf and moon. there is much to say.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")


def run(folder: Path, work: Any, rows: int = 16) -> Any:
    """What work(generator) returns, on a fresh generator."""

    async def whole() -> Any:
        generator = BatchingGenerator(str(folder), rows=rows)
        await generator.start()
        try:
            return await asyncio.wait_for(work(generator), 60)
        finally:
            await generator.close()

    return asyncio.run(whole())


def asked(generator: BatchingGenerator, question: str, sampling: Sampling) -> Coroutine[Any, Any, Any]:
    async def answers() -> Any:
        return await collect(generator.stream(await prompt_of(generator, question), sampling), sampling.n)

    return answers()


async def prompt_of(generator: BatchingGenerator, question: str) -> list[int]:
    return await generator.prompts.ids(user_prompt(question), {"helpfulness": 0.8, "verbosity": -0.6})


MIXED = [
    (QUESTIONS[0], Sampling(40, n=3, seed=1)),
    (QUESTIONS[1], Sampling(60, n=2, seed=2, temperature=0.0)),
    (QUESTIONS[2], Sampling(30, n=1, seed=3, temperature=1.3, top_p=0.8)),
    (QUESTIONS[0], Sampling(25, n=4, seed=4, top_p=0.5)),
    (QUESTIONS[2], Sampling(50, n=5, seed=5, temperature=1.0)),
    (QUESTIONS[1], Sampling(1, n=1, seed=6)),
]


def test_answers_are_the_same_alone_as_among_others_that_come_and_go(folder: Path) -> None:
    """Six requests of 16 answers, in 16 rows, in 6 rows where they must wait, in another order, and one at a time."""

    async def together(generator: BatchingGenerator) -> Any:
        return await asyncio.gather(*(asked(generator, q, s) for q, s in MIXED))

    async def backwards(generator: BatchingGenerator) -> Any:
        return (await asyncio.gather(*(asked(generator, q, s) for q, s in MIXED[::-1])))[::-1]

    async def alone(generator: BatchingGenerator) -> Any:
        return [await asked(generator, q, s) for q, s in MIXED]

    answers = run(folder, alone)
    assert run(folder, together) == answers
    assert run(folder, together, rows=6) == answers
    assert run(folder, backwards) == answers
    assert len({answer.text for drawn in answers for answer in drawn}) >= 12
    assert {answer.finish for drawn in answers for answer in drawn} == {"stop", "length"}


def test_greedy_answers_are_generation_token_for_token(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    async def greedy(generator: BatchingGenerator) -> Any:
        prompts = [await generator.prompts.ids(user_prompt(q), None) for q in QUESTIONS]
        answers = await asyncio.gather(
            *(collect(generator.stream(p, Sampling(40, temperature=0.0)), 1) for p in prompts)
        )
        return prompts, answers, generator.decode

    prompts, answers, decode = run(folder, greedy)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, len(prompt) :].tolist()
        assert (answer.text, answer.tokens) == (decode(ids), len(ids))


def test_a_prompt_is_read_once_for_all_its_answers_and_no_row_outlives_its_end(folder: Path) -> None:
    async def counted(generator: BatchingGenerator) -> Any:
        shapes: list[tuple[int, int]] = []
        forward = generator.decoder.model.forward
        generator.decoder.model.forward = lambda *a, **k: (
            shapes.append(tuple(k["input_ids"].shape)),
            forward(*a, **k),
        )[1]
        answers = await asked(generator, QUESTIONS[0], Sampling(40, n=8, seed=3))
        return shapes, answers

    shapes, answers = run(folder, counted)
    assert shapes[0][0] == 1
    assert shapes[0][1] > 1
    assert sum(rows for rows, _ in shapes[1:]) == sum(answer.tokens - 1 for answer in answers)
    assert len({answer.tokens for answer in answers}) > 2


def test_a_stop_string_ends_an_answer_before_it_and_frees_its_row(folder: Path) -> None:
    async def both(generator: BatchingGenerator) -> Any:
        drawn = await asked(generator, QUESTIONS[1], Sampling(60, n=16, seed=8))
        longest = max(drawn, key=lambda answer: answer.tokens)
        stop = longest.text[len(longest.text) // 2 :][:4]
        again = await asked(generator, QUESTIONS[1], Sampling(60, n=16, seed=8, stop=(stop,)))
        return longest, stop, again[longest.index]

    longest, stop, stopped = run(folder, both)
    assert (stopped.text, stopped.finish) == (longest.text.partition(stop)[0], "stop")
    assert 0 < stopped.tokens < longest.tokens


def test_a_stream_that_is_closed_leaves_the_batch_and_the_line(folder: Path) -> None:
    async def leave(generator: BatchingGenerator) -> Any:
        prompt = await generator.prompts.ids(user_prompt(QUESTIONS[1]), None)
        stay = asyncio.create_task(collect(generator.stream(prompt, Sampling(60, n=1, seed=1)), 1))
        first = generator.stream(prompt, Sampling(200, n=3, seed=2, temperature=2.0))
        await anext(first)
        waiting = asyncio.create_task(anext(generator.stream(prompt, Sampling(200, n=4, seed=3))))
        await asyncio.sleep(0.01)
        before = dict(generator.load)
        waiting.cancel()
        await first.aclose()
        answer = await stay
        while generator.decoding:
            await asyncio.sleep(0.001)
        return before, answer, generator.load, generator.steps

    before, answer, load, steps = run(folder, leave, rows=4)
    assert before["waiting"] == 1
    assert (load["rows"], load["waiting"]) == (0, 0)
    assert steps < 150  # nobody drew the 200 tokens of those who left
    assert answer == run(folder, lambda generator: _plain(generator))


async def _plain(generator: BatchingGenerator) -> Any:
    prompt = await generator.prompts.ids(user_prompt(QUESTIONS[1]), None)
    return await collect(generator.stream(prompt, Sampling(60, n=1, seed=1)), 1)


def breaks(generator: BatchingGenerator, method: str, at: int, when: Any = None) -> list[int]:
    """The decoder's method fails at that call and, with `when`, at every later one whose arguments it holds for.

    Returns:
        the number of calls so far.
    """
    whole, calls = getattr(generator.decoder, method), [0]

    def broken(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == at or (calls[0] > at and when is not None and when(*arguments)):
            raise RuntimeError("out of memory")
        return whole(*arguments)

    setattr(generator.decoder, method, broken)
    return calls


async def all_asked(generator: BatchingGenerator) -> Any:
    """All three questions are in the line before the first step, so one `join` reads them together."""
    prompts = [await prompt_of(generator, question) for question in QUESTIONS]
    samplings = [Sampling(40, n=2, seed=i) for i in range(len(QUESTIONS))]
    return await asyncio.gather(
        *(collect(generator.stream(p, s), s.n) for p, s in zip(prompts, samplings, strict=True)), return_exceptions=True
    )


@pytest.mark.parametrize(("method", "at"), [("join", 1), ("read", 1), ("read", 12), ("keep", 2)])
def test_a_step_that_fails_once_costs_no_answer(folder: Path, method: str, at: int) -> None:
    """All answers are those of a model that never fails, whichever call it was, and at whichever token."""

    async def fail(generator: BatchingGenerator) -> Any:
        calls = breaks(generator, method, at)
        answers = await all_asked(generator)
        assert calls[0] > at
        return answers

    assert run(folder, fail) == run(folder, all_asked)


def test_an_answer_that_fails_alone_is_given_up_and_no_other(folder: Path) -> None:
    """The second question has a token that the model cannot read: alone or in company."""

    async def fail(generator: BatchingGenerator) -> Any:
        prompt = await generator.prompts.ids(user_prompt(QUESTIONS[1]), None)
        others = [await generator.prompts.ids(user_prompt(q), None) for q in QUESTIONS[::2]]
        poison = next(token for token in prompt if all(token not in other for other in others))
        breaks(generator, "join", 0, lambda prompts, copies: any(poison in one for one in prompts))
        return await all_asked(generator)

    first, second, third = run(folder, fail)
    assert isinstance(second, GenerationError)
    assert [first, third] == run(folder, all_asked)[::2]


def test_a_batch_that_fails_whole_and_not_alone_is_given_up_and_the_model_goes_on(folder: Path) -> None:
    async def fail(generator: BatchingGenerator) -> Any:
        breaks(generator, "join", 0, lambda prompts, copies: len(prompts) > 1)
        failed = await all_asked(generator)
        return failed, await asked(generator, QUESTIONS[0], Sampling(40, seed=1))

    failed, answer = run(folder, fail)
    assert all(isinstance(error, GenerationError) for error in failed)
    assert answer == run(folder, lambda generator: asked(generator, QUESTIONS[0], Sampling(40, seed=1)))


def test_a_token_without_a_row_in_the_embedding_is_found_at_start_up_and_before_a_prompt_joins(
    folder: Path, tmp_path: Path
) -> None:
    async def unknown(generator: BatchingGenerator) -> Any:
        beside = asyncio.create_task(asked(generator, QUESTIONS[0], Sampling(40, seed=1)))
        with pytest.raises(GenerationError, match="token 100000, and the model's embedding has"):
            await anext(generator.stream([1, 100_000], Sampling(4)))
        return await beside

    assert run(folder, unknown) == run(folder, lambda generator: asked(generator, QUESTIONS[0], Sampling(40, seed=1)))
    wider = tmp_path / "wider"
    shutil.copytree(folder, wider)
    tokenizer = AutoTokenizer.from_pretrained(wider)
    tokenizer.add_tokens(["<unheard>"])
    tokenizer.save_pretrained(wider)
    with pytest.raises(ValueError, match=rf"{wider}: .*'<unheard>'.* has {len(tokenizer) - 1} rows"):
        BatchingGenerator(str(wider), rows=4)


def test_top_p_draws_from_the_likeliest_tokens_that_reach_it() -> None:
    """Shares 0.5, 0.3, 0.15, 0.05: up to 0.8 takes two tokens, 0.81 three, 0.01 one, in whatever order they stand."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    for top_p, kept in ((0.79, {1, 3}), (0.81, {0, 1, 3}), (0.01, {1}), (0.96, {0, 1, 2, 3})):
        left = nucleus(logits, torch.tensor([top_p], dtype=torch.float64))
        assert set(torch.isfinite(left[0]).nonzero().flatten().tolist()) == kept
    uniforms = (np.arange(1000) + 0.5) / 1000
    drawn = draw_rows(logits.expand(1000, 4), uniforms, np.ones(1000), np.full(1000, 0.79))
    assert np.bincount(drawn.numpy(), minlength=4).tolist() == [0, 625, 0, 375]  # 5 : 3


def test_each_row_has_its_own_temperature() -> None:
    """At 0 the likeliest; at 1 its share; at 2 the square roots of the shares: 0.8 : 0.2 becomes 2 : 1."""
    logits = torch.tensor([[0.8, 0.2]]).log().expand(3000, 2)
    uniforms = np.tile((np.arange(1000) + 0.5) / 1000, 3)
    temperatures = np.repeat([0.0, 1.0, 2.0], 1000)
    drawn = draw_rows(logits, uniforms, temperatures, np.ones(3000)).numpy().reshape(3, 1000)
    assert [int((row == 0).sum()) for row in drawn] == [1000, 800, 667]
