"""Rows of answers decoded side by side, which join and leave between any two steps.

Each row is one answer to one prompt, padded on the left to the width of the longest; a prompt is read once for all
of its answers. The numbers that a row sees do not depend on its neighbours beyond rounding.

Shapes: R rows, T tokens of the longest row, V vocabulary, B prompts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dpalign.engines.decoding import read_prompts, read_tokens
from dpalign.engines.transformers_engine import draw


class Decoder:
    """The state of the rows on a causal language model.

    Raises:
        ValueError: the model's layers keep something else than keys and values.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{model.config.model_type} keeps its past in {names}; serve it with --engine vllm")
        self.model, self.pad = model, pad
        self._clear()

    def _clear(self) -> None:
        self.cache = DynamicCache()
        self.mask_RT = torch.zeros((0, 0), dtype=torch.long, device=self.model.device)
        self.position_R = torch.zeros(0, dtype=torch.long, device=self.model.device)
        self.logits_RV = torch.zeros((0, 0), device=self.model.device)

    def __len__(self) -> int:
        return len(self.mask_RT)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        """Add rows after those there are: `copies` of each prompt, which is read once."""
        cache = DynamicCache()
        mask_BT, logits_BV = read_prompts(self.model, prompts, self.pad, cache)
        device = self.model.device
        owner_R = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(copies, device=device))
        cache.batch_select_indices(owner_R)
        mask_RT, logits_RV = mask_BT[owner_R], logits_BV[owner_R]
        if len(self):
            width = max(mask_RT.shape[1], self.mask_RT.shape[1])
            for ours, theirs in zip(self.cache.layers, cache.layers, strict=True):
                theirs.keys = torch.cat([_widened(ours.keys, width), _widened(theirs.keys, width)])
                theirs.values = torch.cat([_widened(ours.values, width), _widened(theirs.values, width)])
            joined_RT = [torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self.mask_RT, mask_RT)]
            mask_RT, logits_RV = torch.cat(joined_RT), torch.cat([self.logits_RV, logits_RV])
        self.cache, self.mask_RT, self.logits_RV = cache, mask_RT, logits_RV
        self.position_R = mask_RT.sum(dim=1)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the columns that none of them needs."""
        if not rows:
            self._clear()
            return
        if len(rows) == len(self):
            return
        kept = torch.tensor(rows, device=self.model.device)
        self.mask_RT = self.mask_RT[kept]
        empty = int(self.mask_RT.argmax(dim=1).min())
        self.mask_RT = self.mask_RT[:, empty:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, empty:], layer.values[kept, :, empty:]
        self.position_R, self.logits_RV = self.position_R[kept], self.logits_RV[kept]

    @torch.inference_mode()
    def draw(self, uniform_R: Sequence[float], temperature_R: Sequence[float], top_p_R: Sequence[float]) -> list[int]:
        """The next token of each row; the rows are not moved on."""
        return draw_rows(self.logits_RV, np.array(uniform_R), np.array(temperature_R), np.array(top_p_R)).tolist()

    @torch.inference_mode()
    def step(self, token_R: Sequence[int]) -> None:
        """Read one more token in each row."""
        self.mask_RT = torch.nn.functional.pad(self.mask_RT, (0, 1), value=1)
        token = torch.tensor(token_R, device=self.model.device)
        self.logits_RV = read_tokens(self.model, token, self.mask_RT, self.position_R, self.cache)
        self.position_R = self.position_R + 1


def draw_rows(
    logits_RV: torch.Tensor, uniform_R: np.ndarray, temperature_R: np.ndarray, top_p_R: np.ndarray
) -> torch.Tensor:
    """One token a row, each at its own temperature and top-p; temperature 0 takes the likeliest."""
    drawn_R = logits_RV.argmax(dim=-1)
    warm = np.flatnonzero(temperature_R)
    if not len(warm):
        return drawn_R
    temperature = torch.from_numpy(temperature_R[warm]).to(logits_RV.device)
    scaled_RV = logits_RV[warm].double() / temperature[:, None]
    cut = np.flatnonzero(top_p_R[warm] < 1)
    if len(cut):
        scaled_RV[cut] = nucleus(scaled_RV[cut], torch.from_numpy(top_p_R[warm][cut]).to(logits_RV.device))
    drawn_R[warm] = draw(scaled_RV, uniform_R[warm], 1.0)
    return drawn_R


def nucleus(logits_RV: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """The logits, minus infinity for all but the fewest likeliest tokens whose probabilities reach top-p."""
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    share_RV = torch.softmax(sorted_RV, dim=-1)
    before_RV = share_RV.cumsum(dim=-1) - share_RV
    outside_RV = before_RV >= top_p_R[:, None]
    outside_RV[:, 0] = False
    return logits_RV.masked_fill(torch.zeros_like(outside_RV).scatter(-1, order_RV, outside_RV), -torch.inf)


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values, (rows, heads, tokens, size), with empty columns on the left."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
