"""Attention of many answers to a prompt that is read once, as an attention function of transformers.

An answer attends to its prompt's keys, which all answers share, and to its own keys. The two results are merged by
their log-sum-exps: that is exactly the attention over both. The model itself needs no padding and no mask.

Shapes: T tokens of a forward, H heads, G key-value heads, D head width; S segments of W tokens in a run; P tokens of a
prefix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME: Final = "dpalign_sharing"
"""Name of the attention function in transformers."""

RUN: Final = 0.75
"""Segments attend side by side, padded to the longest, if the shortest has at least this share of its length."""

BLOCK: Final = 1024
"""Queries that attend at once without a fused kernel. It bounds the memory of their scores."""


class Unsupported(Exception):
    """The model does something that a shared prompt would change; the message names it."""


class Sharing(Protocol):
    """Decides which keys each query of one forward attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of queries (B, H, T, D) to keys and values (B, G, T, D) and to kept ones: (B, T, H, D)."""


def _function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sharing: Sharing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer; `sharing` is the forward's own keyword."""
    # This refuses at load, where `reason_not_to_share` tries every layer, and not in the middle of a stage: a layer's
    # arguments follow from the model's code and configuration. Only masks depend on lengths, and transformers builds
    # none for a function without a registered kind of mask.
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


_LOCK: Final = RLock()
"""Held while a model's attention is replaced: a thread that put it back would spoil another thread's forward."""


@contextmanager
def sharing_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend through this module, one thread at a time: forwards take `sharing=` and no mask."""
    with _LOCK:
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            if model.config._attn_implementation != NAME:
                raise Unsupported("its attention cannot be replaced")
            yield
        finally:
            model.set_attn_implementation(before)


def obstacle(model: PreTrainedModel) -> str | None:
    """The reason in a model's configuration why its prompts cannot be shared; None if there is none."""
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


def reason_not_to_share(
    model: PreTrainedModel,
    ours: Callable[[list[int]], tuple[list[Tensor], Mapping[int, int | None]]],
    theirs: Callable[[list[int]], list[Tensor]],
) -> str | None:
    """The reason why a model's prompts cannot be shared; None if they can.

    The configuration is checked first. Then the model reads a few tokens through this module and by itself.

    Args:
        ours: reads some of the given tokens through this module; returns outputs, and the window of each layer that
            attended.
        theirs: returns the model's own outputs for the same tokens.
    """
    if reason := obstacle(model):
        return reason
    ids = [i for i in range(min(model.config.vocab_size, 64)) if i != model.config.pad_token_id]
    try:
        outputs, window_of = ours(ids)
    except Exception as error:  # of any kind: a model's own code may raise anything without a mask
        return str(error)
    if any(window_of.get(layer) != window for layer, window in windows(model).items()):
        return "its sliding windows do not reach the attention function"
    if len(window_of) != model.config.num_hidden_layers:
        return "not all of its layers attend"
    differences = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1.0)
        for a, b in zip(outputs, theirs(ids), strict=True)
    ]
    largest = float(torch.stack(differences).max())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    # NaN is not within the tolerance
    return None if largest <= tolerance else f"its numbers differ by {largest:.2g} of the largest"


def windows(model: PreTrainedModel) -> dict[int, int]:
    """The sliding window of each layer that has one in the configuration."""
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
        mask: true where a query sees a key, (T, S) or (B, 1, T, S); a query that sees none gets 0 and -inf.
    """
    heads, groups, tokens = query.shape[1], key.shape[1], query.shape[2]
    if not causal and groups != heads and (mask is None or mask.shape[-2] == 1):
        # put the queries of one key head in a row: each key is then read once for all of them
        folded = query.reshape(query.shape[0], groups, heads // groups * tokens, query.shape[3])
        out, sums = _attention(folded, key, value, scale, False, mask)
        return out.reshape(*query.shape[:3], value.shape[3]), sums.reshape(query.shape[:3])
    return _attention(query, key, value, scale, causal, mask)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend by the device's fused kernel if it has one, else by plain products."""
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
    """Attend by plain products, a block of queries at a time."""
    if causal:
        own = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = own if mask is None else mask & own
    outs, all_sums = [], []
    for start in range(0, query.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        visible = mask if mask is None or mask.shape[-2] == 1 else mask[..., block, :]
        out, sums = _plain(query[:, :, block], key, value, scale, visible)
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


def merge(own: Tensor, own_sum: Tensor, other: Tensor, other_sum: Tensor) -> Tensor:
    """Attention over two sets of keys, from the attention over each and their log-sum-exps."""
    share = torch.sigmoid(other_sum.float() - own_sum.float())[..., None]
    return torch.lerp(own.float(), other.float(), share).to(own.dtype)


@dataclass
class Prefix:
    """A prompt that answers share: its tokens and, after a forward, their keys and values by layer."""

    ids: list[int]
    keep: bool = False
    """Keep the keys and values for later forwards."""
    cache: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(G, P, D) each."""


class Packed:
    """A forward of one row: each prefix, followed by its answers, which do not see each other.

    Args:
        groups: prefixes, each with the tokens of its answers in this forward. A prefix with kept keys is not read
            again; the answers to an empty prefix are whole texts of their own.
        final: the last layer, if only `last_N` is read above it: then no other token attends in it. None: all attend.
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
        """Each prefix with its place, and the places of its answers: all tokens, and the last token of each."""
        self.last: list[int] = []
        """The last token of each answer, and of each prefix without answers."""
        self.window_of: dict[int, int | None] = {}
        """The layers that attended, each with its window."""
        for prefix, answers in groups:
            size = len(prefix.ids)
            read = slice(len(ids), len(ids))
            if size and not prefix.cache:
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
        self.window_of[layer] = window
        if window is not None and self.longest <= window:
            window = None
        query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THD = value.new_zeros(*query_THD.shape[:2], value.shape[3])
        sum_HT = torch.empty(query_THD.shape[1], len(query_THD), dtype=torch.float32, device=query.device)
        # Each token attends within its own segment: a prompt, or an answer.
        for run in self.runs:
            key_SGWD, value_SGWD = (x[run.index_SW].transpose(1, 2) for x in (key_TGD, value_TGD))
            if layer == self.final:
                query_SH1D = query_THD[run.end_S][:, :, None]
                own, sums = attention(query_SH1D, key_SGWD, value_SGWD, scale, mask=run.visible_to_ends(window))
                out_THD[run.end_S] = own[:, :, 0]
                sum_HT[:, run.end_S] = sums[:, :, 0].T.float()
                continue
            query_SHWD = query_THD[run.index_SW].transpose(1, 2)
            band = _band(run.index_SW.shape[1], window, query.device)
            own, sums = attention(query_SHWD, key_SGWD, value_SGWD, scale, causal=True, mask=band)
            out_THD[run.real_T] = own.transpose(1, 2).flatten(0, 1)[run.place_T]
            sum_HT[:, run.real_T] = sums.transpose(0, 1).flatten(1, 2)[:, run.place_T].float()
        # A group that is cut has answers in later forwards, which need the prompt's keys.
        for prefix, read in self.prefixes:
            if prefix.keep:
                prefix.cache[layer] = _copied(key[0, :, read]), _copied(value[0, :, read])
        # Answers attend to their prompt too, and the two attentions merge into one.
        for prefix, read, answers, ends in self.shared:
            rows = ends if layer == self.final else answers
            cache = prefix.cache.get(layer)
            key_GPD, value_GPD = cache or (_copied(key[0, :, read]), _copied(value[0, :, read]))
            visible = _reach(len(prefix.ids), self.position_1T[0, rows], window)
            other, sums = attention(query[:, :, rows], key_GPD[None], value_GPD[None], scale, mask=visible)
            own = out_THD[rows].transpose(0, 1)
            out_THD[rows] = merge(own, sum_HT[:, rows], other[0], sums[0]).transpose(0, 1)
        return out_THD[None]


def _copied(part: Tensor) -> Tensor:
    """A contiguous copy of keys or values: queries read that fastest."""
    return part.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Run:
    """Segments of about one length, side by side."""

    index_SW: Tensor
    """Tokens of each segment, its last repeated as padding: under causal attention no real token sees padding."""
    real_T: Tensor
    """Places of the tokens without padding, in the forward."""
    place_T: Tensor
    """Places of the same tokens in the flattened run."""
    size_S: Tensor

    @property
    def end_S(self) -> Tensor:
        """The last token of each segment, in the forward."""
        return self.index_SW[:, -1]

    def visible_to_ends(self, window: int | None) -> Tensor:
        """Whether the last token of each segment sees its tokens: (S, 1, 1, W)."""
        place_W = torch.arange(self.index_SW.shape[1], device=self.size_S.device)
        visible_SW = place_W < self.size_S[:, None]
        if window is not None:
            visible_SW &= self.size_S[:, None] - 1 - place_W < window
        return visible_SW[:, None, None]


def _runs(segments: Sequence[tuple[int, int]], device: torch.device) -> list[_Run]:
    """Runs of segments (start, size) of about one length, the longest first."""
    runs = []
    rest = sorted(segments, key=lambda segment: -segment[1])
    while rest:
        width = rest[0][1]
        count = next((i for i, (_, size) in enumerate(rest) if size < RUN * width), len(rest))
        run, rest = rest[:count], rest[count:]
        start_S1, size_S1 = torch.tensor(run)[:, :1], torch.tensor(run)[:, 1:]
        column_W = torch.arange(width)
        index_SW = start_S1 + torch.minimum(column_W, size_S1 - 1)
        real_SW = column_W < size_S1
        place_T = real_SW.flatten().nonzero().squeeze(1)
        parts = index_SW, index_SW[real_SW], place_T, size_S1[:, 0]
        runs.append(_Run(*(part.to(device) for part in parts)))
    return runs


def _band(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys are in the sliding window of each query, (W, W), without causality; None if all are."""
    if window is None or width <= window:
        return None
    place = torch.arange(width, device=device)
    return place[:, None] - place < window


def _reach(size: int, position_T: Tensor, window: int | None) -> Tensor | None:
    """Which tokens of a prefix an answer's tokens see in a sliding window: (T, P); None for all."""
    if window is None:
        return None
    return position_T[:, None] - torch.arange(size, device=position_T.device) < window
