"""Splits by prompt: D1 and D2 for the iterations (section 3.1), and what is held out of all training.

A prompt's place follows from hash(seed, prompt_id) alone, not from its row's: more rows, or another
order, move nothing. Only the border between the halves depends on how many prompts there are, and
one more prompt moves at most one across it.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Final

HALVES: Final = ("D1", "D2")


def split_prompts(
    prompt_ids: Iterable[str],
    seed: int,
    held_out: Mapping[str, float] | None = None,
    named: Mapping[str, Collection[str]] | None = None,
) -> dict[str, str]:
    """A split for each unique prompt.

    Args:
        prompt_ids: may repeat; the same text has the same id (`records.prompt_id`).
        seed: another seed, other splits.
        held_out: split -> share of the hash's range, such as {"validation": 0.05, "test": 0.05}; its
            prompts number about that share, and no prompt ever leaves it as others are added.
        named: split -> prompt ids that a data set's authors assigned, such as test_prefs for the
            paper's validation; they go there whether or not they are among `prompt_ids`.

    Returns:
        prompt_id -> split; all that is not held out is in D1 or D2, equal in unique prompts (with an
        odd number D1 has one more).

    Raises:
        ValueError: shares outside 0..1 or adding up to 1, a held-out split that would be empty, a
            prompt in two named splits, or too few prompts left for two halves.
    """
    held_out, named = held_out or {}, named or {}
    _check(held_out, named)
    split_of = {prompt: split for split, prompts in named.items() for prompt in prompts}
    rest = {prompt: _uniform(seed, prompt) for prompt in prompt_ids if prompt not in split_of}
    low = 0.0
    for split, share in held_out.items():
        chosen = [prompt for prompt, place in rest.items() if low <= place < low + share]
        if not chosen:
            raise ValueError(f"the {split} split would be empty: {share} of {len(rest)} prompts; raise its share")
        split_of.update(dict.fromkeys(chosen, split))
        low += share
    halves = sorted((place, prompt) for prompt, place in rest.items() if place >= low)
    if len(halves) < 2:
        raise ValueError(f"{len(halves)} of {len(rest)} prompts are left for D1 and D2; hold out less, or read more")
    first = (len(halves) + 1) // 2
    split_of.update({prompt: HALVES[rank >= first] for rank, (_, prompt) in enumerate(halves)})
    return split_of


def _check(held_out: Mapping[str, float], named: Mapping[str, Collection[str]]) -> None:
    for split, share in held_out.items():
        if not 0 < share < 1:
            raise ValueError(f"the share of the {split} split is {share}, expected a number between 0 and 1")
    if sum(held_out.values()) >= 1:
        raise ValueError(
            f"the held-out shares {dict(held_out)} leave nothing for D1 and D2; they must add up to less than 1"
        )
    seen: dict[str, str] = {}
    for split, prompts in named.items():
        for prompt in prompts:
            if prompt in seen and seen[prompt] != split:
                raise ValueError(f"prompt {prompt} is in both {seen[prompt]} and {split}; a prompt has one split")
            seen[prompt] = split


def _uniform(seed: int, prompt: str) -> float:
    digest = hashlib.sha256(f"split:{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56  # 56 bits: the last of 64 would round 1 - 2**-64 up to 1
