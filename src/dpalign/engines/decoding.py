"""Two ways to decode the answers to prompts that are read once: against shared keys, or against copies of them.

Between any two tokens, prompts may join with their answers, and answers may leave.

Shared: a prompt's keys and values are held once, and all its answers attend to them together (`attention`). Copied:
transformers' own cache, expanded to one row per answer, for models whose attention cannot be replaced. Both give the
same logits up to rounding.

Shapes: B prompts, R answers (rows), S rows of a shelf, P tokens of the longest prompt, T of the longest row, N answers
of the prompt with the most, M moved rows, H heads, G key-value heads, D head width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dpalign.engines.attention import (
    Packed,
    Prefix,
    attention,
    merge,
    reason_not_to_share,
    sharing_attention,
)

Ids = list[int]

READ: Final = 16_384
"""Prompt tokens read at once."""

ROOM: Final = 128
"""Tokens per answer on the first shelf."""


class Decoder(Protocol):
    """Answers side by side, each at its next token."""

    refills: bool
    """Whether it pays to let rows join others; they always can."""

    def join(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Read prompts, add `copies` rows of each at the end, and return the logits of their first tokens: (R, V)."""

    def read(self, token_R: Tensor) -> Tensor:
        """Read one token per row, and return the logits of the next: (R, V)."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows, in this order."""


class SharedDecoder:
    """A `Decoder` that holds each prompt once, and an answer's own keys on a shelf with answers of about its length.

    A shelf's answers attend side by side, padded to the longest. Shelves hold up to `ROOM` tokens, twice that, and so
    on: beyond the first, at most half of the columns are padding. An answer that fills its shelf moves to the next.
    """

    refills = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.window_of: dict[int, int | None] = {}
        self._clear()

    def _clear(self) -> None:
        self.owner: list[int] = []
        """The prompt of each row."""
        self.size: list[int] = []
        """The tokens of each prompt."""
        self.step: list[int] = []
        """The tokens read after each prompt, the same in all its rows."""
        self.shelves: list[list[int]] = [[]]
        """The rows on each shelf, in the order of their slots."""
        self.layers: dict[int, _Layer] = {}
        self.reach: dict[int, Tensor] = {}
        """By window, the prompt tokens that answers reach at this step."""

    def join(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        prefixes = [Prefix(list(ids), keep=True) for ids in prompts]
        logits_BV = self._read_prompts(prefixes)
        rows, first = len(self.owner), len(self.size)
        owner = [b for b, count in enumerate(copies) for _ in range(count)]
        for i in list(prefixes[0].cache):
            caches = [prefix.cache.pop(i) for prefix in prefixes]
            layer = self.layers.setdefault(i, _Layer(caches[0]))
            layer.prompts.add(caches)
            layer.own[0].fit(len(self.shelves[0]) + len(owner))
        self.size += map(len, prompts)
        self.step += [0] * len(prompts)
        self.owner += [first + b for b in owner]
        self.shelves[0] += range(rows, len(self.owner))
        self._place()
        return logits_BV[owner]

    def _read_prompts(self, prefixes: Sequence[Prefix]) -> Tensor:
        logits = []
        for batch in batches([len(prefix.ids) for prefix in prefixes], READ):
            texts: list[tuple[Prefix, list[Ids]]] = [(prefixes[b], []) for b in batch]
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
        return torch.cat(logits)

    def read(self, token_R: Tensor) -> Tensor:
        self._move_up()
        with sharing_attention(self.model):
            logits_R1V = self.model(
                input_ids=token_R[self.order_R, None],
                position_ids=(self.size_B + self.step_B)[self.owner_R, None],
                use_cache=False,
                sharing=self,
            ).logits
        self.step = [step + 1 for step in self.step]
        self.step_B += 1
        for shelf in self.shelved:
            shelf.advance()
        self.reach = {}
        return logits_R1V[self.inverse_R, -1]

    def keep(self, order: Sequence[int]) -> None:
        if not order:
            self._clear()
            return
        place = {old: new for new, old in enumerate(order)}
        for k, rows in enumerate(self.shelves):
            kept = closing([row in place for row in rows])
            moved_M2 = self._moved(kept)
            for layer in self.layers.values():
                layer.own[k].keep(len(kept), moved_M2)
            self.shelves[k] = [place[rows[slot]] for slot in kept]
        owners = {self.owner[row] for row in order}
        kept = closing([b in owners for b in range(len(self.size))])
        moved_M2 = self._moved(kept)
        for layer in self.layers.values():
            layer.prompts.keep(len(kept), moved_M2)
        self.size, self.step = [self.size[b] for b in kept], [self.step[b] for b in kept]
        place = {old: new for new, old in enumerate(kept)}
        self.owner = [place[self.owner[row]] for row in order]
        self._place()

    def _moved(self, order: Sequence[int]) -> Tensor:
        """The new and the old place of each row that moves: (M, 2)."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        return torch.tensor(moved, dtype=torch.long, device=self.device).reshape(-1, 2)

    def _move_up(self) -> None:
        """Move the answers that fill their shelf to the next, which is twice as wide."""
        if all(step % ROOM for step in self.step if step):
            return
        for k in reversed(range(len(self.shelves))):
            rows = self.shelves[k]
            full = [self.step[self.owner[row]] == ROOM << k for row in rows]
            if not any(full):
                continue
            if k + 1 == len(self.shelves):
                self.shelves.append([])
            leaving, staying = [slot for slot, out in enumerate(full) if out], closing([not out for out in full])
            leaving_M, moved_M2 = torch.tensor(leaving, device=self.device), self._moved(staying)
            for layer in self.layers.values():
                layer.move_up(k, leaving_M)
                layer.own[k].keep(len(staying), moved_M2)
            self.shelves[k + 1] += [rows[slot] for slot in leaving]
            self.shelves[k] = [rows[slot] for slot in staying]
        self._place()

    def _place(self) -> None:
        """Index each row among those of its shelf and of its prompt."""
        order_R = np.array([row for shelf in self.shelves for row in shelf], dtype=int)
        owner_R = np.array(self.owner, dtype=int)[order_R]
        step_R = np.array(self.step, dtype=int)[owner_R]
        self.shelved: list[_Shelf] = []
        start = 0
        for k, rows in enumerate(self.shelves):
            if rows:
                self.shelved.append(_Shelf(k, start, step_R[start : start + len(rows)], self.device))
            start += len(rows)
        # Put the rows of a prompt side by side, padded to the prompt with the most.
        by_owner_R = np.argsort(owner_R, kind="stable")
        count_B = np.bincount(owner_R, minlength=len(self.size))
        most = int(count_B.max(initial=0))
        place_R = np.empty_like(owner_R)
        place_R[by_owner_R] = np.arange(len(owner_R)) - (count_B.cumsum() - count_B)[owner_R[by_owner_R]]
        place_R += owner_R * most
        index_BN = np.zeros((len(self.size), most), dtype=int)
        index_BN.flat[place_R] = np.arange(len(owner_R))
        arrays = order_R, np.argsort(order_R), owner_R, place_R, index_BN, np.array(self.size), np.array(self.step)
        tensors = [torch.from_numpy(array).to(self.device) for array in arrays]
        self.order_R, self.inverse_R, self.owner_R, self.place_R, self.index_BN, self.size_B, self.step_B = tensors
        self.longest = max(self.size, default=0)
        self.real = None if len(set(self.size)) < 2 else self._column_P() < self.size_B[:, None]
        self.reach = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """See `attention.Sharing.attend`; B is R, one token each."""
        cache = self.layers[layer]
        parts = [
            attention(
                query[shelf.rows],
                *shelf.put(cache.own[shelf.number], key, value, window),
                scale,
                mask=shelf.mask(window),
            )
            for shelf in self.shelved
        ]
        own, own_sum = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        # Put the queries of one prompt's answers side by side: its keys are then read once for all of them.
        query_BHND = query[:, :, 0][self.index_BN].transpose(1, 2)
        prompt_key, prompt_value = (part[: len(self.size), :, : self.longest] for part in cache.prompts.parts)
        other, sums = attention(query_BHND, prompt_key, prompt_value, scale, mask=self._mask(window))
        other = other.transpose(1, 2).flatten(0, 1)[self.place_R][:, :, None]
        sums = sums.transpose(1, 2).flatten(0, 1)[self.place_R][:, :, None]
        return merge(own, own_sum, other, sums).transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor | None:
        """The prompt tokens that answers see at this step: (B, 1, 1, P); None where they see all."""
        visible = self.real
        if window is not None and any(size + step >= window for size, step in zip(self.size, self.step, strict=True)):
            if window not in self.reach:
                reach_BP = self._column_P() > (self.size_B + self.step_B - window)[:, None]
                self.reach[window] = reach_BP if self.real is None else reach_BP & self.real
            visible = self.reach[window]
        return None if visible is None else visible[:, None, None]

    def _column_P(self) -> Tensor:
        return torch.arange(self.longest, device=self.device)


class _Shelf:
    """The rows of a shelf in a forward: their places, and the columns that each sees."""

    def __init__(self, number: int, start: int, step_S: np.ndarray, device: torch.device) -> None:
        self.number = number
        self.rows = slice(start, start + len(step_S))
        self.least, self.most = int(step_S.min()), int(step_S.max())
        self.slot_S = torch.arange(len(step_S), device=device)
        self.step_S = torch.from_numpy(step_S).to(device)
        self.masks: dict[int | None, Tensor] = {}

    def advance(self) -> None:
        self.least, self.most, self.masks = self.least + 1, self.most + 1, {}
        self.step_S = self.step_S + 1

    def put(self, store: "_Store", key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Add a token to each row; returns the keys and values that any of them sees."""
        for part, new in zip(store.parts, (key, value), strict=True):
            if self.least == self.most:
                part[: store.rows, :, self.most] = new[self.rows, :, 0]
            else:
                part[self.slot_S, :, self.step_S] = new[self.rows, :, 0]
        own_key, own_value = (part[: store.rows, :, self._first(window) : self.most + 1] for part in store.parts)
        return own_key, own_value

    def mask(self, window: int | None) -> Tensor | None:
        """Which columns each row sees, (S, 1, 1, T); None where they see all."""
        if self.least == self.most:
            return None
        if window not in self.masks:
            column_T = torch.arange(self._first(window), self.most + 1, device=self.step_S.device)
            visible_ST = column_T <= self.step_S[:, None]
            if window is not None:
                visible_ST &= column_T > self.step_S[:, None] - window
            self.masks[window] = visible_ST[:, None, None]
        return self.masks[window]

    def _first(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.least + 1 - window)


class _Layer:
    """The keys and values of one layer: of the prompts, and of the answers on each shelf."""

    def __init__(self, like: tuple[Tensor, Tensor]) -> None:
        self.prompts, self.own = _Store(like, 0), [_Store(like, ROOM)]

    def move_up(self, k: int, leaving_M: Tensor) -> None:
        """Copy these rows to the end of the next shelf."""
        full = self.own[k]
        if k + 1 == len(self.own):
            self.own.append(_Store([part[0] for part in full.parts], ROOM << (k + 1)))
        wider = self.own[k + 1]
        start = wider.rows
        wider.fit(start + len(leaving_M))
        for part, old in zip(wider.parts, full.parts, strict=True):
            part[start : wider.rows, :, : ROOM << k] = old[leaving_M]


class _Store:
    """Keys and values, (slots, G, tokens, D) each; slots after the last row are spare."""

    def __init__(self, like: Sequence[Tensor], tokens: int) -> None:
        """Make an empty store for keys and values like these of one row."""
        self.parts = [part.new_zeros(0, part.shape[0], tokens, part.shape[2]) for part in like]
        self.rows = 0

    def add(self, caches: Sequence[Sequence[Tensor]]) -> None:
        """Add rows at the end: keys and values of each, (G, tokens, D)."""
        start = self.rows
        self.fit(start + len(caches), max(key.shape[1] for key, _ in caches))
        for slot, cache in enumerate(caches, start=start):
            for part, new in zip(self.parts, cache, strict=True):
                part[slot, :, : new.shape[1]] = new

    def keep(self, rows: int, moved_M2: Tensor) -> None:
        """Keep `rows` rows: some move from the end to the places of dropped ones, and only those are copied."""
        if len(moved_M2):
            for part in self.parts:
                part[moved_M2[:, 0]] = part[moved_M2[:, 1]]
        self.fit(rows)

    def fit(self, rows: int, tokens: int = 0) -> None:
        """Make room for `rows` rows of `tokens` tokens; shrink if more than a third of the slots is spare."""
        slots, groups, room, _ = self.parts[0].shape
        kept, self.rows = min(rows, self.rows), rows
        if tokens <= room and rows <= slots <= rows * 3 // 2:
            return
        shape = rows + rows // 8, groups, max(room, tokens)
        for i, part in enumerate(self.parts):
            # zeros, not uninitialised memory: a masked NaN stays a NaN
            self.parts[i] = part.new_zeros(*shape, part.shape[3])
            self.parts[i][:kept, :, :room] = part[:kept]


def batches(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Indices in order, in batches whose sizes add up to at most the limit; a larger size is a batch of its own.

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
    """A `Decoder` on transformers' own cache, for any causal model: each row has its prompt's keys to itself.

    Rows are padded on the left to the longest. New rows beside old ones are mostly padding: refilling saved steps, but
    sampling took longer.

    Raises:
        ValueError: the model's layers keep something other than keys and values.
    """

    refills = False

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if other := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in other))
            raise ValueError(f"{model.config.model_type} keeps its past in {names}; sample and serve it with vLLM")
        self.model, self.pad = model, pad
        self._clear()

    def _clear(self) -> None:
        # without the configuration a layer with a window keeps all tokens, as others do: all fit the mask's columns
        self.cache = DynamicCache()
        self.mask_RT = torch.zeros((0, 0), dtype=torch.long, device=self.model.device)
        self.position_R = self.mask_RT.sum(dim=1)

    def join(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        held, rows, self.cache = self.cache, len(self.mask_RT), DynamicCache()
        mask_BT, logits_BV = read_prompts(self.model, prompts, self.pad, self.cache)
        count_B = torch.tensor(copies, device=self.model.device)
        owner_R = torch.arange(len(prompts), device=self.model.device).repeat_interleave(count_B)
        self.cache.batch_select_indices(owner_R)
        mask_RT = mask_BT[owner_R]
        if rows:
            width = max(mask_RT.shape[1], self.mask_RT.shape[1])
            for old, new in zip(held.layers, self.cache.layers, strict=True):
                new.keys = torch.cat([_widened(old.keys, width), _widened(new.keys, width)])
                new.values = torch.cat([_widened(old.values, width), _widened(new.values, width)])
            mask_RT = torch.cat([functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask_RT, mask_RT)])
        self.mask_RT, self.position_R = mask_RT, mask_RT.sum(dim=1)
        return logits_BV[owner_R]

    def read(self, token_R: Tensor) -> Tensor:
        self.mask_RT = functional.pad(self.mask_RT, (0, 1), value=1)
        logits_RV = read_tokens(self.model, token_R, self.mask_RT, self.position_R, self.cache)
        self.position_R = self.position_R + 1
        return logits_RV

    def keep(self, order: Sequence[int]) -> None:
        if not order:
            self._clear()
            return
        row_R = torch.tensor(order, device=self.model.device)
        self.mask_RT, self.position_R = self.mask_RT[row_R], self.position_R[row_R]
        self.cache.batch_select_indices(row_R)
        if empty := int(self.mask_RT.argmax(dim=1).min()):
            self.mask_RT = self.mask_RT[:, empty:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Read prompts into a cache, padded on the left; returns the mask (B, P) and the next tokens' logits (B, V)."""
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
    """Read one token per row, which the mask includes already; returns the logits of the next (R, V)."""
    logits_R1V = model(
        input_ids=token_R[:, None],
        attention_mask=mask_RT,
        position_ids=position_R[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits_R1V[:, -1]


def _widened(states: Tensor, width: int) -> Tensor:
    """Keys or values, (R, G, tokens, D), with empty columns on the left."""
    return functional.pad(states, (0, 0, width - states.shape[2], 0))


@torch.inference_mode()
def cannot_share(model: PreTrainedModel) -> str | None:
    """The reason why this model's answers need copies of their prompt's keys; None if they need none.

    Two prompts, and two tokens after each, are read both ways.
    """

    def logits(decoder: Decoder, ids: Ids) -> list[Tensor]:
        prompts = [[ids[(7 * i + n) % len(ids)] for i in range(4 + n)] for n in range(2)]
        token_R = torch.tensor([ids[3 * n % len(ids)] for n in range(3)], device=model.device)
        return [decoder.join(prompts, [1, 2]), decoder.read(token_R), decoder.read(token_R)]

    def shared(ids: Ids) -> tuple[list[Tensor], dict[int, int | None]]:
        decoder = SharedDecoder(model)
        return logits(decoder, ids), decoder.window_of

    return reason_not_to_share(model, shared, lambda ids: logits(CopyingDecoder(model, pad=ids[0]), ids))
