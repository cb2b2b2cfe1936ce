"""Attention of many answers to a prompt that is read once, as an attention function of transformers.

An answer attends to its prompt's keys, which no answer copies, and to its own; the two results are merged by their
log-sum-exps, which gives exactly the attention over both. Nothing is padded in the model itself, and no mask is made.

Shapes: T tokens of a forward, H heads, G key-value heads, D head width; S segments of W tokens in a run; P tokens of a
prefix.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME: Final = "dpalign_sharing"
"""What transformers knows the attention function by."""

RUN: Final = 0.75
"""Segments attend to themselves side by side, padded to the longest, where the shortest has this share of it."""

BLOCK: Final = 1024
"""Queries that attend at once where the device has no fused kernel: bounds the memory of their scores."""


class Unsupported(Exception):
    """The model does something in its attention, or beside it, that a shared prompt would change; says what."""


class Sharing(Protocol):
    """Who attends to what in one forward."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of queries (B, H, T, D) to keys and values (B, G, T, D) and to what is kept: (B, T, H, D)."""
        ...


def _function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sharing: Sharing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer; `sharing` is the forward's own keyword."""
    # What this refuses it refuses at load, where every layer is tried (`unlike`), and not in the middle of a stage: the
    # model's code and configuration alone say what a layer passes on. Only masks are made by length, and transformers
    # makes none for a function that has no kind of mask registered.
    if sharing is None:
        raise Unsupported("its layers do not pass keywords on to the attention function")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise Unsupported(f"its attention has {name}")
    layer = getattr(module, "layer_idx", None)
    if layer is None or not getattr(module, "is_causal", False) or attention_mask is not None:
        raise Unsupported("its attention is not that of a causal decoder")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return sharing.attend(layer, query, key, value, scale, sliding_window), None


AttentionInterface.register(NAME, _function)


_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_MAKING_LOCKS: Final = Lock()
"""A `WeakKeyDictionary` does not promise that two threads which first use a model get the same lock."""


@contextmanager
def sharing_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends through this module meanwhile, one thread at a time: forwards take `sharing=` and no mask."""
    with _MAKING_LOCKS:
        lock = _LOCKS.setdefault(model, RLock())
    with lock:
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            if model.config._attn_implementation != NAME:
                raise Unsupported("its attention cannot be replaced")
            yield
        finally:
            model.set_attn_implementation(before)


def lacking(model: PreTrainedModel) -> str | None:
    """Why a prompt cannot be shared with this model, as far as its configuration says; None where it can."""
    config = model.config
    if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        return "it is no decoder whose attention can be replaced"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if changing := kinds & {"dynamic", "longrope"}:
        return f"its positions ({', '.join(changing)}) depend on the longest row of a batch"
    return None


def unlike(
    model: PreTrainedModel, seen: Mapping[int, int | None], ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> str | None:
    """Why what was read here and in the model's own way is not the same; None where it is.

    Args:
        seen: the layers that attended here, with the window that each came with.
    """
    if any(seen.get(layer) != window for layer, window in windows(model).items()):
        return "its sliding windows do not reach the attention function"
    if len(seen) != model.config.num_hidden_layers:
        return "not all of its layers attend"
    differences = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1.0)
        for a, b in zip(ours, theirs, strict=True)
    ]
    largest = float(torch.stack(differences).max())  # which NaN is, among others
    within = 1e-3 if model.dtype == torch.float32 else 5e-2
    return None if largest <= within else f"numbers read both ways differ by {largest:.2g} of the largest"


def windows(model: PreTrainedModel) -> dict[int, int]:
    """The sliding window of each layer that the configuration gives one."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: window for layer, kind in enumerate(kinds) if kind == "sliding_attention"}


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: (B, H, T, D) and (B, H, T), over keys and values (B, G, S, D).

    Args:
        mask: true where a query sees a key, (T, S) or (B, 1, T, S); one that sees none gets 0 and -inf.
    """
    heads, groups, tokens = query.shape[1], key.shape[1], query.shape[2]
    if not causal and groups != heads and (mask is None or mask.shape[-2] == 1):
        # the queries of one key head stand in a row: each key is read once for all of them
        folded = query.reshape(query.shape[0], groups, heads // groups * tokens, query.shape[3])
        out, sums = _attention(folded, key, value, scale, False, mask)
        return out.reshape(*query.shape[:3], value.shape[3]), sums.reshape(query.shape[:3])
    return _attention(query, key, value, scale, causal, mask)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By the fused kernel that the device has, else by plain products."""
    fused = key.shape[3] == value.shape[3]
    kernels = torch.ops.aten
    if query.device.type == "cpu" and fused:
        bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        if bias is not None and bias.dim() == 2:
            bias = bias[None, None]
        out, sums = kernels._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, sums if mask is None or causal else sums.masked_fill(~mask.any(dim=-1), -torch.inf)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and fused and mask is None and half and query.shape[3] in (32, 64, 128, 256):
        out, sums, *_ = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, sums
    return _by_products(query, key, value, scale, causal, mask)


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block of queries at a time."""
    if causal:
        own = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = own if mask is None else mask & own
    outs, all_sums = [], []
    for start in range(0, query.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        shown = mask if mask is None or mask.shape[-2] == 1 else mask[..., block, :]
        out, sums = _plain(query[:, :, block], key, value, scale, shown)
        outs.append(out)
        all_sums.append(sums)
    return torch.cat(outs, dim=2), torch.cat(all_sums, dim=2)


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, -1)) * scale  # (B, G, H/G, T, D): keys are not repeated
    score = (grouped @ key[:, :, None].transpose(-1, -2)).float()
    if mask is not None:
        score = score.masked_fill(~(mask if mask.dim() == 2 else mask[:, :, None]), -torch.inf)
    sums = score.logsumexp(dim=-1)
    weight = (score - sums.masked_fill(sums.isinf(), 0.0)[..., None]).exp()
    out = weight.to(value.dtype) @ value[:, :, None]
    return out.flatten(1, 2), sums.flatten(1, 2)


def merged(own: Tensor, own_sum: Tensor, other: Tensor, other_sum: Tensor) -> Tensor:
    """Attention over two sets of keys, from the attention over each and their log-sum-exps."""
    share = torch.sigmoid(other_sum.float() - own_sum.float())[..., None]
    return torch.lerp(own.float(), other.float(), share).to(own.dtype)


@dataclass
class Prefix:
    """A prompt that answers share: its tokens, and once a forward has read them, their keys and values by layer."""

    ids: list[int]
    keep: bool = False
    """Keep what is read of it, for forwards to come."""
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(G, P, D) each."""


class Packed:
    """A forward of one row: prefixes, and after each its answers, which do not see each other.

    Args:
        groups: prefixes and the answers' tokens that follow each in this forward. A prefix that was read before is
            not read again; one without tokens makes its answers whole texts of their own.
        final: the layer above which only `last_N` is read, so that in it no other token attends; None for none.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Prefix, Sequence[Sequence[int]]]],
        device: torch.device,
        final: int | None = None,
    ) -> None:
        self.final = final
        ids: list[int] = []
        positions: list[int] = []
        segments: list[tuple[int, int]] = []
        self.prefixes: list[tuple[Prefix, slice]] = []
        self.shared: list[tuple[Prefix, slice, slice, list[int]]] = []
        """Each prefix with where it is read, and its answers: all of their tokens, and the last of each."""
        self.last: list[int] = []
        """Where each answer ends; a prefix without answers, itself."""
        self.seen: dict[int, int | None] = {}
        """The window that each layer came with."""
        for prefix, answers in groups:
            size = len(prefix.ids)
            read = slice(len(ids), len(ids))
            if size and not prefix.kept:
                read = slice(len(ids), len(ids) + size)
                segments.append((len(ids), size))
                ids += prefix.ids
                positions += range(size)
                self.prefixes.append((prefix, read))
                if not answers:
                    self.last.append(len(ids) - 1)
            start, ends = len(ids), len(self.last)
            for answer in answers:
                segments.append((len(ids), len(answer)))
                ids += answer
                positions += range(size, size + len(answer))
                self.last.append(len(ids) - 1)
            if size and answers:
                self.shared.append((prefix, read, slice(start, len(ids)), self.last[ends:]))
        self.longest = max(positions) + 1
        self.ids_1T = torch.tensor([ids], device=device)
        self.position_1T = torch.tensor([positions], device=device)
        self.last_N = torch.tensor(self.last, device=device)
        self.runs = _runs(segments, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """See `Sharing.attend`; B is 1."""
        self.seen[layer] = window
        if window is not None and self.longest <= window:
            window = None
        query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THD = value.new_zeros(*query_THD.shape[:2], value.shape[3])
        sum_HT = torch.empty(query_THD.shape[1], len(query_THD), dtype=torch.float32, device=query.device)
        for run in self.runs:
            key_SGWD, value_SGWD = (x[run.index_SW].transpose(1, 2) for x in (key_TGD, value_TGD))
            if layer == self.final:
                query_SH1D = query_THD[run.end_S][:, :, None]
                own, sums = attention(query_SH1D, key_SGWD, value_SGWD, scale, mask=run.shown_to_ends(window))
                out_THD[run.end_S] = own[:, :, 0]
                sum_HT[:, run.end_S] = sums[:, :, 0].T.float()
                continue
            query_SHWD = query_THD[run.index_SW].transpose(1, 2)
            band = _band(run.index_SW.shape[1], window, query.device)
            own, sums = attention(query_SHWD, key_SGWD, value_SGWD, scale, causal=True, mask=band)
            out_THD[run.real_T] = own.transpose(1, 2).flatten(0, 1)[run.place_T]
            sum_HT[:, run.real_T] = sums.transpose(0, 1).flatten(1, 2)[:, run.place_T].float()
        for prefix, read in self.prefixes:
            if prefix.keep:
                prefix.kept[layer] = _copied(key[0, :, read]), _copied(value[0, :, read])
        for prefix, read, answers, ends in self.shared:
            asked = ends if layer == self.final else answers
            kept = prefix.kept.get(layer)
            key_GPD, value_GPD = kept or (_copied(key[0, :, read]), _copied(value[0, :, read]))
            shown = _reach(len(prefix.ids), self.position_1T[0, asked], window)
            other, sums = attention(query[:, :, asked], key_GPD[None], value_GPD[None], scale, mask=shown)
            own = out_THD[asked].transpose(0, 1)
            out_THD[asked] = merged(own, sum_HT[:, asked], other[0], sums[0]).transpose(0, 1)
        return out_THD[None]


def _copied(kept: Tensor) -> Tensor:
    """Keys or values of a head side by side, as its queries read them fastest."""
    return kept.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Run:
    """Segments of about one length, side by side."""

    index_SW: Tensor
    """Tokens of each, the last repeated as padding: under causal attention no real token sees it."""
    real_T: Tensor
    """The tokens that are none, in the forward."""
    place_T: Tensor
    """And in the run, flattened."""
    size_S: Tensor

    @property
    def end_S(self) -> Tensor:
        """The last token of each segment, in the forward."""
        return self.index_SW[:, -1]

    def shown_to_ends(self, window: int | None) -> Tensor:
        """What the last token of each segment sees of it: (S, 1, 1, W)."""
        place_W = torch.arange(self.index_SW.shape[1], device=self.size_S.device)
        shown_SW = place_W < self.size_S[:, None]
        if window is not None:
            shown_SW &= self.size_S[:, None] - 1 - place_W < window
        return shown_SW[:, None, None]


def _runs(segments: Sequence[tuple[int, int]], device: torch.device) -> list[_Run]:
    runs = []
    left = sorted(segments, key=lambda segment: -segment[1])
    while left:
        width = left[0][1]
        count = next((i for i, (_, size) in enumerate(left) if size < RUN * width), len(left))
        taken, left = left[:count], left[count:]
        start_S1, size_S1 = torch.tensor(taken)[:, :1], torch.tensor(taken)[:, 1:]
        column_W = torch.arange(width)
        index_SW = start_S1 + torch.minimum(column_W, size_S1 - 1)
        real_SW = column_W < size_S1
        place_T = real_SW.flatten().nonzero().squeeze(1)
        parts = index_SW, index_SW[real_SW], place_T, size_S1[:, 0]
        runs.append(_Run(*(part.to(device) for part in parts)))
    return runs


def _band(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom within a sliding window, beside causality; None where all is in reach."""
    if window is None or width <= window:
        return None
    place = torch.arange(width, device=device)
    return place[:, None] - place < window


def _reach(size: int, position_T: Tensor, window: int | None) -> Tensor | None:
    """Which of a prefix's tokens each answer's token sees in a sliding window: (T, P); None for all."""
    if window is None:
        return None
    return position_T[:, None] - torch.arange(size, device=position_T.device) < window
