"""What holds for any input: templates, directions, selection, rows and chat forms; and loaders that are given rubbish.

The default tier tries few examples, the slow tier many. Both try the same ones each time.
"""

import gzip
import json
import math
import random
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import linear_sum_assignment

pytest.importorskip("hypothesis", reason="needs the extra dpalign[dev]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpalign.chat import chat_template, render_chat, with_system_line
from dpalign.data.chats import read_chats
from dpalign.data.forms import Example, form_of, read_example
from dpalign.data.own import SPLITS, read_own, read_prompts
from dpalign.data.ratings import ANSWERS, Rescaling, read_rated
from dpalign.data.sources import Row
from dpalign.data.union import split_prompts
from dpalign.dial.dial import Dial
from dpalign.engines.sandbox import render
from dpalign.paper.direction import Arc, Cone, Preference, Simplex, Sphere, draw_directions, evaluation_grid, rng_for
from dpalign.paper.prompts import parse_condition, render_condition, render_preference, stated_reward
from dpalign.paper.selection import NO_ONE, best_of_n, hindsight, pooled_best
from dpalign.rows import CANDIDATES, CONVERSATIONS, HALVES, RATED, prompt_id, read_rows, user_prompt, write_rows

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=[15, pytest.param(3000, marks=pytest.mark.slow)])
def examples(request: pytest.FixtureRequest) -> int:
    """How many inputs a property is tried on."""
    return int(request.param)


def holds(examples: int, check: Callable[..., None], *drawn: st.SearchStrategy[Any]) -> None:
    """Try a property on drawn inputs."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(st.tuples(*drawn))
    def tried(inputs: tuple[Any, ...]) -> None:
        check(*inputs)

    tried()


characters = st.one_of(
    st.sampled_from("\0\t\n\r \x85\u2028{}%#<|>/\\'\"`*-_:,.0aZ\u00e9\u6f22\U0001f642\u202e"),
    st.integers(0, 0xD7FF).map(chr),  # hypothesis' own would first tabulate all of Unicode, for seconds
    st.integers(0xE000, 0x10FFFF).map(chr),
)
texts = st.text(characters, max_size=20)
"""Any text that can be stored, NUL and line breaks among it."""
words = texts.filter(lambda text: text.strip() and "\0" not in text and not text.startswith("[{"))
"""What a data set may have for a prompt or an answer."""
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts})
chats = st.lists(turns, max_size=4)
styles = st.sampled_from(["zephyr", "world-v1"])
lines = st.sampled_from(["dpa-v1", "fig1", "world-v1"])
names = st.lists(
    st.text(string.ascii_letters, min_size=1, max_size=8), min_size=2, max_size=4, unique=True
)  # as `check_objective_names` has them
sizes = st.floats(-1e6, 1e6).filter(lambda weight: weight == 0 or abs(weight) > 1e-6)


@st.composite
def directions(draw: st.DrawFn) -> Preference:
    """A direction over two to four objectives."""
    named = draw(names)
    weights = draw(st.lists(sizes, min_size=len(named), max_size=len(named)).filter(any))
    return Preference.from_vector(weights, named)


# --- templates ---


def test_jinja_writes_any_chat_as_python_does(examples: int) -> None:
    def check(chat: list[Any], style: Any, empty: bool, ask: bool, eos: str) -> None:
        template = chat_template(style, empty_system=empty, eos=eos)
        meant = render_chat(chat, style, empty_system=empty, add_generation_prompt=ask, eos=eos)
        assert render(template, chat, ask) == meant

    ends = st.sampled_from(["</s>", "<|im_end|>", '"{{ eos }}"\n'])
    holds(examples, check, chats, styles, st.booleans(), st.booleans(), ends)


def test_jinja_writes_any_direction_as_python_does(examples: int) -> None:
    def check(chat: list[Any], style: Any, line: Any, v: Preference) -> None:
        template = chat_template(style, line, v.objectives)
        steered = with_system_line(chat, render_preference(v, line), style)
        assert render(template, chat, preference=v.weights) == render_chat(steered, style, add_generation_prompt=True)

    holds(examples, check, chats, styles, lines, directions())


def test_a_condition_reads_back_as_the_rewards_that_it_states(examples: int) -> None:
    def check(named: list[str], rewards: list[float], template: Any) -> None:
        asked = dict(zip(named, rewards, strict=False))
        read = parse_condition(render_condition(asked, template), template)
        assert read == {name: stated_reward(reward, template) for name, reward in asked.items()}

    rewards = st.lists(st.floats(0, 100), min_size=4, max_size=4)
    holds(examples, check, names, rewards, st.sampled_from(["steerlm", "steerlm-100-v1", "world-v1"]))


# --- directions ---


def test_a_direction_has_length_one_whatever_the_length_of_its_weights(examples: int) -> None:
    def check(v: Preference, length: float) -> None:
        assert np.linalg.norm(v.v_K) == pytest.approx(1, abs=1e-12)
        longer = Preference.from_vector((length * v.v_K).tolist(), v.objectives)
        np.testing.assert_allclose(longer.v_K, v.v_K, atol=1e-12)

    holds(examples, check, directions(), st.floats(1e-6, 1e6))


def test_an_angle_reads_back(examples: int) -> None:
    def check(angle: float) -> None:
        read = Preference.from_angle(angle, ("a", "b")).angle
        assert math.remainder(read - angle, 360) == pytest.approx(0, abs=1e-9)

    holds(examples, check, st.floats(-720, 720))


def test_a_direction_reads_back_from_the_papers_arithmetic(examples: int) -> None:
    def check(v: Preference) -> None:
        dial = Dial(v.objectives, "dpa-v1", "zephyr")
        assert dial.parse(dial.formula(v)).v_K == pytest.approx(v.v_K, abs=0.02)  # it has two decimals

    holds(examples, check, directions())


def test_drawn_directions_have_length_one_and_lie_in_their_population(examples: int) -> None:
    def check(low: float, width: float, seed: int, k: int) -> None:
        rng = rng_for(seed, "any")
        arc = Arc(low, low + width)
        for v_K in (*draw_directions(arc, 7, rng), *evaluation_grid(arc, 7)):
            angle = Preference.from_vector(v_K.tolist(), ("a", "b")).angle
            assert (angle - low + 1e-6) % 360 <= width + 2e-6
        cone = Cone((1.0, *[0.0] * (k - 1)), width / 2)
        assert (draw_directions(cone, 7, rng)[:, 0] >= math.cos(math.radians(width / 2)) - 1e-9).all()
        assert (draw_directions(Simplex(k), 7, rng) >= 0).all()
        for population in (arc, cone, Simplex(k), Sphere(k)):
            np.testing.assert_allclose(np.linalg.norm(draw_directions(population, 7, rng), axis=1), 1)

    holds(examples, check, st.floats(-180, 180), st.floats(1, 300), st.integers(0, 2**32), st.integers(2, 5))


# --- selection ---


def test_the_best_of_n_is_the_highest_in_whatever_order_they_come(examples: int) -> None:
    def check(scores: list[float], seed: int) -> None:
        score_BN = np.array([scores])
        (best,) = best_of_n(score_BN).tolist()
        assert scores[best] == max(scores)
        assert best == scores.index(max(scores))
        order = np.random.default_rng(seed).permutation(len(scores))
        (again,) = best_of_n(score_BN[:, order]).tolist()
        assert scores[order[again]] == scores[best]

    finite = st.floats(allow_nan=False, allow_infinity=False)
    holds(examples, check, st.lists(finite, min_size=1, max_size=30), st.integers(0, 2**32))


def test_of_a_pool_the_directions_get_the_best_that_is_allowed(examples: int) -> None:
    def check(seed: int, m: int, v: int, distinct: bool) -> None:
        rng = np.random.default_rng(seed)
        reward_BMK, wanted_BVK = rng.integers(0, 4, (2, m, 3)).astype(float), rng.normal(size=(2, v, 3))
        allowed_BMV = rng.random((2, m, v)) < rng.choice([0.3, 0.7, 1.0], (2, m, 1))
        index_BV = pooled_best(reward_BMK, wanted_BVK, distinct, allowed_BMV)
        for b in range(2):
            allowed_VM = allowed_BMV[b].T
            score_VM = np.where(allowed_VM, wanted_BVK[b] @ reward_BMK[b].T, -1e6)
            kept = [(direction, index) for direction, index in enumerate(index_BV[b].tolist()) if index != NO_ONE]
            assert all(allowed_VM[pair] for pair in kept)
            if distinct:  # no two get the same, as many as can be get one, and no other sharing out earns more
                best = [pair for pair in zip(*linear_sum_assignment(-score_VM), strict=True) if allowed_VM[pair]]
                assert len({index for _, index in kept}) == len(kept) == len(best)
                assert sum(score_VM[pair] for pair in kept) == pytest.approx(sum(score_VM[pair] for pair in best))
            else:
                assert [direction for direction, _ in kept] == np.flatnonzero(allowed_VM.any(axis=1)).tolist()
                assert all(score_VM[pair] == pytest.approx(score_VM[pair[0]].max()) for pair in kept)

    holds(examples, check, st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 5), st.booleans())


def test_in_hindsight_no_answer_beats_another_at_the_direction_that_it_is_kept_under(examples: int) -> None:
    def check(seed: int, m: int, k: int) -> None:
        reward_BMK = np.random.default_rng(seed).uniform(0, 100, (2, m, k))
        grid_GK = evaluation_grid(Simplex(k), 40)
        index_BG = pooled_best(reward_BMK, np.broadcast_to(grid_GK, (2, *grid_GK.shape)))
        label_BMK = hindsight(index_BG, grid_GK, m)
        for b in range(2):
            kept = np.flatnonzero(~np.isnan(label_BMK[b]).any(axis=1))
            assert kept.tolist() == np.unique(index_BG[b]).tolist()
            score_CM = label_BMK[b, kept] @ reward_BMK[b].T
            assert score_CM[np.arange(len(kept)), kept] == pytest.approx(score_CM.max(axis=1))

    holds(examples, check, st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 4))


def test_a_split_hangs_on_the_prompt_alone(examples: int) -> None:
    """In another order nothing moves. One prompt more leaves the held-out ones alone, and moves one half's at most."""

    def check(ids: list[str], more: str, seed: int) -> None:
        shares = {"heldout": 0.2, "validation": 0.2}
        only = dict.fromkeys(shares, set(ids) | {more})  # they may be empty
        first = split_prompts(ids, seed, shares, only=only)
        assert split_prompts(sorted(ids), seed, shares, only=only) == first
        second = split_prompts([*ids, more], seed, shares, only=only)
        moved = [key for key in ids if second[key] != first[key]]
        assert len(moved) <= 1
        assert all({first[key], second[key]} == set(HALVES) for key in moved)

    ids = st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), min_size=20, max_size=30, unique=True)
    holds(examples, check, ids, st.text("xyz", min_size=3, max_size=3), st.integers(0, 2**32))


# --- rows ---


def test_rows_of_any_text_read_back_as_they_were_written(examples: int, tmp_path: Path) -> None:
    messages = st.lists(turns, min_size=1, max_size=2)
    small = st.floats(0, 100, width=32)
    rated = {"messages": messages, "response": texts, "source": texts, "labels": st.dictionaries(texts, small)}
    conversation = {"messages": messages, "response": texts, "origin": texts}
    candidate = {
        **{name: st.integers(0, 2**31 - 1) for name in ("t", "condition_index", "sample", "tokens")},
        **{"condition_kind": texts, "condition": st.lists(small, max_size=3), "messages": messages},
        **{"response": texts, "finished": st.booleans()},
    }

    def check(of_schema: Sequence[list[dict[str, Any]]]) -> None:
        for schema, rows in zip((RATED, CONVERSATIONS, CANDIDATES), of_schema, strict=True):
            named = [{"prompt_id": prompt_id(row["messages"]), **row} for row in rows]
            path = tmp_path / "rows.parquet"
            assert write_rows(path, named, schema) == len(named)
            assert list(read_rows(path, schema)) == named

    drawn = [st.lists(st.fixed_dictionaries(row), max_size=2) for row in (rated, conversation, candidate)]
    holds(min(examples, 1000), check, st.tuples(*drawn))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@st.composite
def rows_of_a_form(draw: st.DrawFn) -> tuple[str, Mapping[str, Any], Example]:
    """A row, its form, and what it says."""
    earlier = [
        turn
        for _ in range(draw(st.integers(0, 2)))
        for turn in (said("user", draw(words)), said("assistant", draw(words)))
    ]
    system = [said("system", draw(words))] if draw(st.booleans()) else []
    asked, first, second = draw(words), draw(words), draw(words)
    chat: list[Any] = [*system, *earlier, said("user", asked)]
    alone: list[Any] = user_prompt(asked)
    as_chat = draw(st.booleans())
    prompt, messages = (chat, chat) if as_chat else (asked, alone)
    match form := draw(st.sampled_from(["pairs", "implicit", "answers", "chats", "prompts", "instructions"])):
        case "pairs":
            return form, {"prompt": prompt, "chosen": first, "rejected": second}, Example(messages, (first, second))
        case "implicit":  # TRL's name for pairs whose prompt stands in both chats
            sides = {name: [*chat, said("assistant", text)] for name, text in (("chosen", first), ("rejected", second))}
            return "pairs", sides, Example(chat, (first, second))
        case "answers":
            column = draw(st.sampled_from(["response", "completion"]))
            return form, {"prompt": prompt, column: first}, Example(messages, (first,))
        case "chats":
            return form, {"messages": [*chat, said("assistant", first)]}, Example(chat, (first,))
        case "prompts":
            return form, {"prompt": prompt}, Example(messages)
        case _:
            return form, {"instruction": asked, "input": "", "output": first}, Example(alone, (first,))


def test_a_row_of_any_form_is_known_and_read(examples: int) -> None:
    def check(drawn: tuple[str, Mapping[str, Any], Example]) -> None:
        form, values, example = drawn
        row = Row("mine.jsonl, line 1", values)
        assert form_of(row) == form
        assert read_example(row, form) == example  # type: ignore[arg-type]

    holds(examples, check, rows_of_a_form())


# --- loaders that are given rubbish ---

ODD = [
    *(b"", b"\0", b"\xff", b"\\u0000", b"\\ud800", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b"[]", b"{}"),
    *(b'""', b"[" * 3000, b"]", b"}", b'"', b",", b":", b"\n", b"\r", b"true", b'"N/A"', b"\xed\xa0\x80"),
]


def spoilt(content: bytes, chance: random.Random) -> bytes:
    """Some bytes are changed, left out, repeated, swapped or replaced by odd ones."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 4, 60))
        before, piece, after = content[:at], content[at : at + length], content[at + length :]
        match chance.randrange(6):
            case 0:
                content = before
            case 1:
                content = before + after
            case 2:
                content = before + piece + piece + after
            case 3:
                content = before + bytes(byte ^ 1 << chance.randrange(8) for byte in piece) + after
            case 4:
                content = after + before + piece
            case _:
                content = before + chance.choice(ODD) + (after if chance.random() < 0.5 else piece + after)
    return content


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    flat = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(flat), path)
    return path.read_bytes()


@pytest.mark.parametrize("file", sorted(path.name for path in FIXTURES.glob("*.jsonl")))
def test_a_spoilt_file_is_read_or_refused_by_its_name(file: str, examples: int, tmp_path: Path) -> None:
    """Compressed bytes and Parquet's own are cut alone: what else happens to them is their libraries' to find."""
    content = (FIXTURES / file).read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    chance = random.Random(file)
    parquet = as_parquet(tmp_path / "whole.parquet", rows)
    refusals: list[tuple[str, str]] = []
    for i in range(examples):
        bad = spoilt(content, chance)
        path, written = {
            0: (tmp_path / "bad.json", spoilt(json.dumps(rows).encode(), chance)),
            1: (tmp_path / "bad.csv", bad),
            2: (tmp_path / "bad.jsonl.gz", gzip.compress(bad)),
            3: (tmp_path / "bad.jsonl.gz", gzip.compress(bad)[: -chance.randrange(1, 40)]),
            4: (tmp_path / "bad.parquet", parquet[: chance.randrange(len(parquet))]),
        }.get(i % 10, (tmp_path / "bad.jsonl", bad))
        path.write_bytes(written)
        source = str(path)
        readers: list[Callable[[], object]] = [
            lambda source=source: read_own(source, Rescaling(), {}),  # type: ignore[misc]
            lambda source=source: read_prompts(source, "prompts", SPLITS),  # type: ignore[misc]
            lambda source=source: read_chats(source),  # type: ignore[misc]
            *(lambda form=form, source=source: read_rated(form, source) for form in ANSWERS),  # type: ignore[misc]
        ]
        for read in readers:
            try:
                read()
            except ValueError as error:
                refusals.append((path.name, str(error)))
    assert [message for name, message in refusals if name not in message] == []
    assert len(refusals) > examples
