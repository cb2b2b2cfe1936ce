"""The union of the rated data sets under ten heads (section 3.1), without repeats and held-out prompts, in splits.

Each data set labels its own heads; a head without a label has no loss. Prompts are split into D1 and D2 for the
iterations (section 3.1) and into held-out sets. A prompt's place depends only on hash(seed, prompt_id): more rows, or
rows in another order, move no prompt. Only the border between the halves depends on the number of prompts; one more
prompt moves at most one across it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean
from typing import TypeVar

from dpalign.data.report import ReadReport
from dpalign.rows import HALVES, Conversation, Message, Pair, Prompt, Rated

AnyRow = TypeVar("AnyRow", Rated, Conversation, Pair, Prompt)


def merge_repeats(rows: Iterable[Rated]) -> tuple[list[Rated], ReadReport]:
    """Merge rows with the same prompt and response into one, at the place of the first.

    A label is the mean over the rows that have it, so the order of the rows does not matter. An answer that two data
    sets rate has the labels of both. The merged row keeps the first source that is not HelpSteer.
    """
    groups: dict[tuple[str, str], list[Rated]] = {}
    for row in rows:
        groups.setdefault((row["prompt_id"], row["response"]), []).append(row)
    merged = [_merge(group) for group in groups.values()]
    read = sum(len(group) for group in groups.values())
    return merged, ReadReport.of_filter("repeats", "", read, len(merged), "same answer again, labels averaged")


def _merge(group: list[Rated]) -> Rated:
    if len(group) == 1:
        return group[0]
    heads = dict.fromkeys(head for row in group for head in row["labels"])
    labels = {head: mean(row["labels"][head] for row in group if head in row["labels"]) for head in heads}
    source = next((row["source"] for row in group if row["source"] != "helpsteer"), "helpsteer")
    return {**group[0], "labels": labels, "source": source}


def drop_held_out(rows: Sequence[AnyRow], held_out: Iterable[Sequence[Message]]) -> tuple[list[AnyRow], ReadReport]:
    """Drop the rows of any data set that answer a held-out prompt.

    A row answers a held-out prompt when one of its user turns, alone or with all turns before it, has the same text.
    Letter case, spacing and system messages do not count.

    Args:
        held_out: the chats of the validation and test prompts.
    """
    keys = {_key(chat) for chat in held_out}
    left = [row for row in rows if keys.isdisjoint(_keys_within(row["messages"]))]
    return left, ReadReport.of_filter("held out", "", len(rows), len(left), "held-out prompt")


def _keys_within(messages: Sequence[Message]) -> set[str]:
    """The keys of all prompts within a chat: each user turn alone, and each with the turns before it."""
    ends = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return {_key(messages[i : i + 1]) for i in ends} | {_key(messages[: i + 1]) for i in ends}


def _key(messages: Sequence[Message]) -> str:
    turns = [(m["role"], " ".join(m["content"].split()).casefold()) for m in messages if m["role"] != "system"]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def split_prompts(
    prompt_ids: Iterable[str],
    seed: int,
    held_out: Mapping[str, float] | None = None,
    named: Mapping[str, Collection[str]] | None = None,
    only: Mapping[str, Collection[str]] | None = None,
) -> dict[str, str]:
    """Assign a split to each unique prompt.

    Args:
        prompt_ids: may repeat; the same text has the same id (`rows.prompt_id`).
        seed: another seed gives other splits.
        held_out: split -> share of the hash's range, such as {"validation": 0.05, "test": 0.05}. About that share of
            the prompts is held out, and no prompt leaves it when others are added.
        named: split -> prompt ids that a data set's authors assigned, such as test_prefs for the paper's validation;
            these are in the result even if they are not in `prompt_ids`.
        only: split -> the prompts that it may hold; it may be empty. Other splits take any prompts and need some.

    Returns:
        prompt_id -> split. All other prompts are in D1 or D2, equal in number (D1 has one more if their number is odd).

    Raises:
        ValueError: shares outside 0..1, or shares that leave nothing; an empty held-out split; a prompt in two named
            splits; too few prompts for two halves.
    """
    held_out, named, only = held_out or {}, named or {}, only or {}
    _check_splits(held_out, named)
    split_of = {prompt: split for split, prompts in named.items() for prompt in prompts}
    rest = {prompt: _uniform(seed, prompt) for prompt in prompt_ids if prompt not in split_of}
    low = 0.0
    for split, share in held_out.items():
        prompts = [prompt for prompt, place in rest.items() if low <= place < low + share]
        if split in only:
            prompts = [prompt for prompt in prompts if prompt in only[split]]
        elif share and not prompts:
            raise ValueError(f"the {split} split would be empty: {share:.3g} of {len(rest)} prompts; raise its share")
        split_of.update(dict.fromkeys(prompts, split))
        low += share
    halves = sorted((place, prompt) for prompt, place in rest.items() if prompt not in split_of)
    if len(halves) < 2:
        raise ValueError(f"{len(halves)} of {len(rest)} prompts are left for D1 and D2; hold out less, or read more")
    first = (len(halves) + 1) // 2
    split_of.update({prompt: HALVES[rank >= first] for rank, (_, prompt) in enumerate(halves)})
    return split_of


def _check_splits(held_out: Mapping[str, float], named: Mapping[str, Collection[str]]) -> None:
    for split, share in held_out.items():
        if not 0 <= share < 1:
            raise ValueError(f"the share of the {split} split is {share}, expected at least 0 and less than 1")
    if sum(held_out.values()) >= 1:
        raise ValueError(
            f"the held-out shares {dict(held_out)} leave nothing for D1 and D2; they must add up to less than 1"
        )
    split_of: dict[str, str] = {}
    for split, prompts in named.items():
        for prompt in prompts:
            if split_of.setdefault(prompt, split) != split:
                raise ValueError(f"prompt {prompt} is in both {split_of[prompt]} and {split}; a prompt has one split")


def _uniform(seed: int, prompt: str) -> float:
    digest = hashlib.sha256(f"split:{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56  # 56 bits: the last of 64 would round 1 - 2**-64 up to 1
