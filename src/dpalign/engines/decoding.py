"""Two ways to decode the answers to prompts that are read once: against shared keys, or against copies of them.

Shared: a prompt's keys and values are held once, and all its answers attend to them together (`attention`). Copied:
transformers' own cache, expanded to a row an answer, for models whose attention cannot be replaced. Both give the same
logits up to rounding.

Shapes: B prompts, R answers (rows), P tokens of the longest prompt, N answers of the prompt that has most, H heads, G
key-value heads, D head width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from dpalign.engines.attention import Packed, Prefix, attention, merge, reason_not_to_share, sharing_attention

Ids = list[int]

READ: Final = 16_384
"""Prompt tokens read at once."""

ROOM: Final = 32
"""Room for the tokens of an answer at first; it doubles."""


class Decoder(Protocol):
    """Answers side by side, each at its next token."""

    def first(self) -> Tensor:
        """The logits of each prompt's next token: (B, V)."""

    def read(self, token_R: Tensor) -> Tensor:
        """Read one token a row; the logits of the next: (R, V)."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""


class SharedDecoder:
    """A `Decoder` that holds each prompt once.

    Args:
        owner: the prompt of each row.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Ids], owner: Sequence[int]) -> None:
        self.model, self.device = model, model.device
        self.prefixes = [Prefix(list(ids), keep=True) for ids in prompts]
        self.owner = list(owner)
        self.step = 0
        self.layers: dict[int, _Layer] = {}
        self.size_B = torch.tensor([len(ids) for ids in prompts], device=self.device)
        self.window_of: dict[int, int | None] = {}

    def first(self) -> Tensor:
        logits = []
        for batch in batches([len(prefix.ids) for prefix in self.prefixes], READ):
            texts: list[tuple[Prefix, list[Ids]]] = [(self.prefixes[b], []) for b in batch]
            packed = Packed(texts, self.device, final=self.model.config.num_hidden_layers - 1)
            with sharing_attention(self.model):
                read = self.model(
                    input_ids=packed.ids_1T,
                    position_ids=packed.position_1T,
                    use_cache=False,
                    sharing=packed,
                    logits_to_keep=packed.last_N,
                )
            self.window_of |= packed.window_of
            logits.append(read.logits[0])
        for layer in list(self.prefixes[0].cache):
            self.layers[layer] = _Layer([prefix.cache.pop(layer) for prefix in self.prefixes], len(self.owner))
        self._place()
        return torch.cat(logits)

    def read(self, token_R: Tensor) -> Tensor:
        position_R = self.size_B[self.owner_R] + self.step
        with sharing_attention(self.model):
            logits_R1V = self.model(
                input_ids=token_R[:, None], position_ids=position_R[:, None], use_cache=False, sharing=self
            ).logits
        self.step += 1
        return logits_R1V[:, -1]

    def keep(self, order: Sequence[int]) -> None:
        self.owner = [self.owner[i] for i in order]
        owners = set(self.owner)
        prompt_order = closing([b in owners for b in range(len(self.size_B))])
        for layer in self.layers.values():
            layer.keep(order, prompt_order, self.step)
        self.size_B = self.size_B[prompt_order]
        place = {b: i for i, b in enumerate(prompt_order)}
        self.owner = [place[b] for b in self.owner]
        self._place()

    def _place(self) -> None:
        """Index each row among the answers of its prompt, and drop the masks of another order of rows."""
        rows: list[list[int]] = [[] for _ in range(len(self.size_B))]
        place = []
        for row, b in enumerate(self.owner):
            place.append((b, len(rows[b])))
            rows[b].append(row)
        most = max(map(len, rows))
        self.index_BN = torch.tensor([r + [0] * (most - len(r)) for r in rows], device=self.device)
        self.place_R = torch.tensor([b * most + n for b, n in place], device=self.device)
        self.owner_R = torch.tensor(self.owner, device=self.device)
        self.longest = int(self.size_B.max())
        self.masks: dict[int | None, Tensor | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """See `attention.Sharing.attend`; B is R, one token each."""
        cache = self.layers[layer]
        own_key, own_value = cache.append(key, value, self.step)
        if window is not None:
            own_key, own_value = own_key[:, :, -window:], own_value[:, :, -window:]
        own, own_sum = attention(query, own_key, own_value, scale)
        # The queries of one prompt's answers stand side by side: its keys are read once for all of them.
        query_BHND = query[:, :, 0][self.index_BN].transpose(1, 2)
        prompt_key, prompt_value = cache.prompts(self.longest)
        other, sums = attention(query_BHND, prompt_key, prompt_value, scale, mask=self._mask(window))
        other = other.transpose(1, 2).flatten(0, 1)[self.place_R][:, :, None]
        sums = sums.transpose(1, 2).flatten(0, 1)[self.place_R][:, :, None]
        return merge(own, own_sum, other, sums).transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor | None:
        """The prompt tokens that answers see at this step: (B, 1, 1, P); None where they see all."""
        if window is not None and self.longest + self.step >= window:
            reach_P = torch.arange(self.longest, device=self.device) > self.size_B[:, None] + self.step - window
            return (reach_P & self._real())[:, None, None]
        if None not in self.masks:
            real = self._real()
            self.masks[None] = None if bool(real.all()) else real[:, None, None]
        return self.masks[None]

    def _real(self) -> Tensor:
        return torch.arange(self.longest, device=self.device) < self.size_B[:, None]


class _Layer:
    """The keys and values of one layer: of the prompts (B, G, P, D), and of the answers (R, G, tokens, D)."""

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], rows: int) -> None:
        groups, dtype, device = len(caches[0][0]), caches[0][0].dtype, caches[0][0].device
        longest = max(key.shape[1] for key, _ in caches)
        self.prompt = [
            torch.zeros(len(caches), groups, longest, part.shape[2], dtype=dtype, device=device) for part in caches[0]
        ]
        for b, parts in enumerate(caches):
            for whole, part in zip(self.prompt, parts, strict=True):
                whole[b, :, : part.shape[1]] = part
        self.own = [torch.empty(rows, groups, ROOM, part.shape[2], dtype=dtype, device=device) for part in caches[0]]
        self.rows = rows

    def prompts(self, longest: int) -> tuple[Tensor, Tensor]:
        key, value = (part[:, :, :longest] for part in self.prompt)
        return key, value

    def append(self, key: Tensor, value: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Add a token to each answer; returns the keys and values of all its tokens."""
        if step == self.own[0].shape[2]:
            self.own = [torch.cat([part[: self.rows], torch.empty_like(part[: self.rows])], dim=2) for part in self.own]
        for part, new in zip(self.own, (key, value), strict=True):
            part[: self.rows, :, step] = new[:, :, 0]
        own_key, own_value = (part[: self.rows, :, : step + 1] for part in self.own)
        return own_key, own_value

    def keep(self, order: Sequence[int], prompt_order: Sequence[int], step: int) -> None:
        """Move rows and prompts from the end to the places of finished ones; no others are copied."""
        for part in self.own:
            new, old = _moved(order)
            part[new, :, :step] = part[old, :, :step]
        self.rows = len(order)
        for part in self.prompt:
            new, old = _moved(prompt_order)
            part[new] = part[old]
        self.prompt = [part[: len(prompt_order)] for part in self.prompt]


def _moved(order: Sequence[int]) -> tuple[list[int], list[int]]:
    moved = [(new, old) for new, old in enumerate(order) if new != old]
    return [new for new, _ in moved], [old for _, old in moved]


def batches(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Indices in order, in batches whose sizes add up to at most the limit; a larger one stands alone.

    >>> list(batches([2, 2, 3, 9, 1], 5))
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            yield range(start, place)
            start, total = place, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def closing(alive: Sequence[bool]) -> list[int]:
    """The indices to keep: indices from the end take the places of dropped ones.

    >>> closing([True, False, True, False, True])
    [0, 4, 2]
    """
    count = sum(alive)
    late = [i for i in range(count, len(alive)) if alive[i]]
    return [i if alive[i] else late.pop() for i in range(count)]


class CopyingDecoder:
    """A `Decoder` on transformers' own cache, for any causal model: each row has its prompt's keys to itself."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Ids], owner: Sequence[int], pad: int) -> None:
        self.model, self.prompts, self.pad = model, prompts, pad
        self.owner_R = torch.tensor(owner, device=model.device)
        self.cache = DynamicCache(config=model.config)

    def first(self) -> Tensor:
        mask_BP, logits_BV = read_prompts(self.model, self.prompts, self.pad, self.cache)
        self.cache.batch_select_indices(self.owner_R)
        self.mask = mask_BP[self.owner_R]
        self.position_R = self.mask.sum(dim=1)
        return logits_BV

    def read(self, token_R: Tensor) -> Tensor:
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        logits_RV = read_tokens(self.model, token_R, self.mask, self.position_R, self.cache)
        self.position_R = self.position_R + 1
        return logits_RV

    def keep(self, order: Sequence[int]) -> None:
        row_R = torch.tensor(order, device=self.mask.device)
        self.cache.batch_select_indices(row_R)
        self.mask, self.position_R = self.mask[row_R], self.position_R[row_R]


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Read prompts into a cache, padded on the left: their mask (B, P), and the logits of their next tokens (B, V)."""
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask_BP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    logits_B1V = model(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        position_ids=(mask_BP.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return mask_BP, logits_B1V[:, -1]


def read_tokens(
    model: PreTrainedModel, token_R: Tensor, mask_RT: Tensor, position_R: Tensor, cache: DynamicCache
) -> Tensor:
    """Read one token a row, already in the mask; the logits of the next (R, V)."""
    logits_R1V = model(
        input_ids=token_R[:, None],
        attention_mask=mask_RT,
        position_ids=position_R[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits_R1V[:, -1]


@torch.inference_mode()
def cannot_share(model: PreTrainedModel) -> str | None:
    """The reason why this model's answers need copies of their prompt's keys; None if they need none.

    Two prompts, and two tokens after each, are read both ways.
    """
    owner = [0, 1, 1]

    def logits(decoder: Decoder, ids: Ids) -> list[Tensor]:
        token_R = torch.tensor([ids[3 * n % len(ids)] for n in range(3)], device=model.device)
        return [decoder.first(), decoder.read(token_R), decoder.read(token_R)]

    def prompts(ids: Ids) -> list[Ids]:
        return [[ids[(7 * i + n) % len(ids)] for i in range(4 + n)] for n in range(2)]

    def shared(ids: Ids) -> tuple[list[Tensor], dict[int, int | None]]:
        decoder = SharedDecoder(model, prompts(ids), owner)
        return logits(decoder, ids), decoder.window_of

    return reason_not_to_share(
        model, shared, lambda ids: logits(CopyingDecoder(model, prompts(ids), owner, pad=ids[0]), ids)
    )
