"""Splits by prompt, and the filters that keep held-out prompts and long texts out of training."""

from pathlib import Path

import pytest

from dpalign.data.chats import read_chats
from dpalign.data.ratings import rated
from dpalign.data.union import drop_held_out, split_prompts
from dpalign.rows import Conversation, Message, Rated, prompt_id, user_prompt

ULTRACHAT = str(Path(__file__).parent / "fixtures" / "ultrachat_200k.jsonl")
IDS = [f"{i:016x}" for i in range(1000)]


def row(prompt: str, response: str = "Yes.") -> Rated:
    return rated(user_prompt(prompt), response, "helpsteer", {"helpsteer-verbosity": 50.0})


def members(split_of: dict[str, str], split: str) -> set[str]:
    return {prompt for prompt, its in split_of.items() if its == split}


def test_the_halves_hold_equally_many_unique_prompts() -> None:
    split_of = split_prompts(IDS * 3, seed=1)
    assert (len(members(split_of, "D1")), len(members(split_of, "D2"))) == (500, 500)
    split_of = split_prompts(IDS[:7], seed=1)
    assert (len(members(split_of, "D1")), len(members(split_of, "D2"))) == (4, 3)


def test_every_prompt_has_one_split_and_held_out_shares_are_met() -> None:
    split_of = split_prompts(IDS, seed=1, held_out={"validation": 0.1, "test": 0.2})
    assert split_of.keys() == set(IDS)
    # 1,000 draws: standard deviations of 9.5 and 12.6
    assert len(members(split_of, "validation")) == pytest.approx(100, abs=38)
    assert len(members(split_of, "test")) == pytest.approx(200, abs=50)
    assert abs(len(members(split_of, "D1")) - len(members(split_of, "D2"))) <= 1


def test_the_order_of_the_rows_moves_nothing_and_another_seed_moves_much() -> None:
    held_out = {"validation": 0.1}
    assert split_prompts(IDS, 1, held_out) == split_prompts(reversed(IDS), 1, held_out)
    one, other = split_prompts(IDS, 1, held_out), split_prompts(IDS, 2, held_out)
    assert sum(one[prompt] != other[prompt] for prompt in IDS) > 400


def test_more_prompts_move_no_held_out_one_and_at_most_one_across_the_halves_each() -> None:
    held_out = {"validation": 0.1}
    before = split_prompts(IDS[:900], 1, held_out)
    for extra in (1, 100):
        after = split_prompts(IDS[: 900 + extra], 1, held_out)
        moved = [i for i in before if before[i] != after[i]]
        assert len(moved) <= extra
        assert all({before[i], after[i]} == {"D1", "D2"} for i in moved)


def test_named_splits_win_and_may_hold_prompts_of_other_files() -> None:
    elsewhere = "f" * 16
    split_of = split_prompts(IDS, 1, named={"validation": {IDS[3], elsewhere}})
    assert members(split_of, "validation") == {IDS[3], elsewhere}
    assert len(members(split_of, "D1") | members(split_of, "D2")) == 999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out": {"test": 1.5}}, "test split is 1.5"),
        ({"held_out": {"test": 0.5, "validation": 0.5}}, "0.5.*D1 and D2"),
        ({"held_out": {"test": 1e-9}}, "test split .*1e-09 of 1000 prompts"),
        ({"named": {"test": [IDS[0]], "validation": [IDS[0]]}}, "both test and validation"),
        ({"named": {"test": IDS[:999]}}, "1 of 1 prompts"),
    ],
)
def test_impossible_splits_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_prompts(IDS, 1, **arguments)


def test_a_held_out_prompt_is_kept_out_of_every_data_set() -> None:
    held_out = [user_prompt("Name a prime number.")]
    rows, report = drop_held_out(
        [row("Name a prime number."), row("name a  prime number. "), row("Name a prime.")], held_out
    )
    assert [r["messages"][0]["content"] for r in rows] == ["Name a prime."]
    assert report.filtered == {"held-out prompt": 2}
    # The first chat opens with the held-out prompt, two turns before its end.
    chats, report = drop_held_out(read_chats(ULTRACHAT)[0], held_out)
    assert [chat["messages"][0]["content"] for chat in chats] == ["Boil an egg."]


def test_a_held_out_chat_is_more_than_its_last_turn() -> None:
    chat: list[Message] = [
        {"role": "user", "content": "Name a prime number."},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Another?"},
    ]
    assert drop_held_out([row("Another?")], [chat])[1].kept == 1
    told: list[Message] = [{"role": "system", "content": "Be brief."}, *chat]
    same: Conversation = {"prompt_id": prompt_id(told), "messages": told, "response": "Eleven.", "origin": "sft"}
    assert drop_held_out([same], [chat])[1].kept == 0
