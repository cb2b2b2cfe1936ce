"""Tokens to text a piece at a time: no half characters, no beginnings of stop strings, and the same text in the end."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny
from dpalign.dial.server.text import AnswerText, Detokenizer, StopStrings


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    """é is 2 bytes, 🙂 4: nothing comes before their last."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé🙂b").ids
    assert len(ids) == 8
    detokenizer = Detokenizer(tokenizer.decode)
    assert [detokenizer.push(token) for token in ids] == ["a", "", "é", "", "", "", "🙂", "b"]
    assert detokenizer.flush() == ""


def test_a_character_cut_short_comes_out_at_the_end_as_the_tokenizer_has_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("ok🙂").ids[:-1]
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.push(token) for token in ids]
    assert pieces == ["o", "k", "", "", ""]
    assert "ok" + detokenizer.flush() == tokenizer.decode(ids)


def test_pieces_join_to_what_decoding_everything_gives() -> None:
    """Random tokens of the world's tokenizer, which strips the space before a text; special ones among them."""
    tokenizer = tiny.tokenizer()
    special = frozenset(tokenizer.all_special_ids)
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(len(tokenizer)) for _ in range(12)]
        detokenizer = Detokenizer(lambda part: tokenizer.decode(part, skip_special_tokens=True), special)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert special


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        (["."], ["fox", " is red. tea"], ["fox", " is red"], True),
        (["</end>"], ["a</", "en", "d>b"], ["a", "", ""], True),
        (["</end>"], ["a</", "en", "t>"], ["a", "", "</ent>"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["yz", "xyz"], ["w xy", "z"], ["w ", ""], True),
        (["never"], ["all ", "of it"], ["all ", "of it"], False),
    ],
)
def test_a_stop_string_ends_the_text_before_it_however_it_is_cut(
    stops: list[str], pieces: list[str], shown: list[str], stopped: bool
) -> None:
    stop = StopStrings(stops)
    told = [stop.push(text) for text in pieces]
    assert [text for text, _ in told] == shown
    assert told[-1][1] == stopped


def test_what_is_held_back_for_a_stop_string_comes_with_the_last_token() -> None:
    tokenizer = byte_tokenizer()
    answer = AnswerText(Detokenizer(tokenizer.decode), ["</end>"])
    assert answer.push(tokenizer.encode("done </e").ids, last=False) == ("done ", False)
    assert answer.push([], last=True) == ("</e", False)
