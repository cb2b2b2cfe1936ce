"""Log-probabilities of existing answers under a model, in nats, without generation.

Shapes: N answers, B answers of a forward, T tokens of the longest, A tokens of an answer, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from dpalign.engines.decoding import batches
from dpalign.engines.engine import BROKEN
from dpalign.engines.memory import in_halves

Ids = Sequence[int]
Array = NDArray[np.float64]


def log_probs(
    model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids]], *, temperature: float, batch_tokens: int, source: str
) -> Array:
    """log pi(y | x) of each answer for sampling at a temperature: the sum over the answer's tokens, (N,).

    Rows of similar length are read together.

    Args:
        rows: each the tokens of a prompt, at least one, and the tokens of its answer.
        temperature: above 0; logits are divided by it.
        batch_tokens: the most tokens in a forward; a longer row is read alone. Halved if memory runs out, down to the
            longest row.
        source: the model's name, for messages.

    Raises:
        ValueError: a row exceeds the model's context; logits are not finite; memory is short even for one row.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) + len(answer) for prompt, answer in rows), default=0)
    if context is not None and longest > context:
        raise ValueError(f"{source}: a prompt and its answer are {longest} tokens long, and its context is {context}")
    read = partial(_in_batches, model, rows, temperature)
    found_N, _ = in_halves(read, batch_tokens, f"{source}: {{}} tokens a forward", least=longest)
    if not np.isfinite(found_N).all():
        raise ValueError(f"{source}: the log-probability of an answer is no finite number; {BROKEN}")
    return found_N


@torch.inference_mode()
def _in_batches(
    model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids]], temperature: float, batch_tokens: int
) -> Array:
    found_N = np.empty(len(rows))
    sizes = [len(prompt) + len(answer) for prompt, answer in rows]
    order = sorted(range(len(rows)), key=lambda n: sizes[n])
    for batch in batches([sizes[n] for n in order], batch_tokens):
        own = [order[place] for place in batch]
        found_N[own] = _together(model, [rows[n] for n in own], temperature)
    return found_N


def _together(model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids]], temperature: float) -> list[float]:
    """The log-probabilities of the rows of one forward, padded on the right to the longest."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)  # a masked token may be any
    mask_BT = torch.zeros_like(ids_BT)
    for b, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        ids_BT[b, :size], mask_BT[b, :size] = torch.tensor([*prompt, *answer]), 1
    first = min(len(prompt) for prompt, _ in rows)  # no answer begins before
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    logits_BTV = model(
        input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=width - first + 1
    ).logits
    found = []
    for b, (prompt, answer) in enumerate(rows):
        start = len(prompt) - first  # the logits at a token are those of the next
        logits_AV = logits_BTV[b, start : start + len(answer)].float() / temperature
        ids_A1 = ids_BT[b, len(prompt) : len(prompt) + len(answer), None]
        own_A = logits_AV.gather(1, ids_A1).squeeze(1) - logits_AV.logsumexp(dim=1)
        found.append(float(own_A.double().sum()))
    return found
