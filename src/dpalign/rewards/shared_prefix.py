"""Score all answers to a prompt while reading the prompt once.

In the reward input the prompt comes before the answer, so the inputs of a prompt's answers begin alike. Their common
prefix is one of tokens, not of text, because a tokenizer may merge across the boundary. A forward holds one row without
padding: prompts, each followed by its answers (`attention.Packed`). N rows, H heads.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from dpalign.engines.attention import Packed, Prefix, reason_not_to_share, sharing_attention

CPU_TOKENS: Final = 768
"""Most tokens per forward on a CPU: larger forwards do not fit its caches and are 1.3x slower."""

Ids = list[int]


@dataclass(frozen=True)
class Group:
    """Rows that begin alike, the shortest first."""

    prefix: Prefix
    members: list[int]


def groups_of(rows: Sequence[Ids], keys: Sequence[Hashable]) -> list[Group]:
    """Group rows with equal keys by their longest common prefix; each row keeps at least one token of its own."""
    together: dict[Hashable, list[int]] = {}
    for n, key in enumerate(keys):
        together.setdefault(key, []).append(n)
    groups = []
    for members in together.values():
        members.sort(key=lambda n: len(rows[n]))
        size = 0
        if len(members) > 1:
            # All rows between the least and the greatest share what these two share.
            least, most = min(rows[n] for n in members), max(rows[n] for n in members)
            limit = len(rows[members[0]]) - 1
            size = next((i for i in range(limit) if least[i] != most[i]), limit)
        groups.append(Group(Prefix(rows[members[0]][:size]), members))
    return groups


def forwards(groups: Sequence[Group], rows: Sequence[Ids], budget: int) -> Iterator[list[Group]]:
    """Yield the groups of each forward: at most `budget` tokens, or one answer with its prompt.

    A group that is cut keeps the keys of its prefix for the next forwards.
    """
    batch: list[Group] = []
    room = budget
    for group in groups:
        part: list[int] = []
        unread = size = len(group.prefix.ids)
        for n in group.members:
            if unread + len(rows[n]) - size > room and (batch or part):
                if part:
                    group.prefix.keep = True
                    batch.append(Group(group.prefix, part))
                yield batch
                batch, part, room = [], [], budget
            part.append(n)
            room -= unread + len(rows[n]) - size
            unread = 0
        batch.append(Group(group.prefix, part))
    if batch:
        yield batch


@torch.inference_mode()
def score_shared(
    model: PreTrainedModel,
    rows: Sequence[Ids],
    keys: Sequence[Hashable],
    budget: int,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the raw rewards of token rows, in their order: (N, H), in float32 on the CPU.

    Args:
        head: reads the last hidden states in place of the model's own head.
    """
    head = head or model.score
    reward_NH = torch.empty(0)
    budget = min(budget, CPU_TOKENS) if model.device.type == "cpu" else budget
    cut: Prefix | None = None
    with sharing_attention(model):
        for batch in forwards(groups_of(rows, keys), rows, budget):
            texts = [(g.prefix, [rows[n][len(g.prefix.ids) :] for n in g.members]) for g in batch]
            packed = Packed(texts, model.device, final=model.config.num_hidden_layers - 1)
            reward_BH = head(_last_hidden(model, packed)).float().cpu()
            if not len(reward_NH):
                reward_NH = torch.empty(len(rows), reward_BH.shape[1])
            reward_NH[[n for group in batch for n in group.members]] = reward_BH
            if cut is not None and cut is not batch[-1].prefix:
                cut.cache.clear()
            cut = batch[-1].prefix
    return reward_NH


def _last_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    with _last_layer_only_at(backbone, packed.last_N):
        hidden_1TD = backbone(
            input_ids=packed.ids_1T, position_ids=packed.position_1T, use_cache=False, sharing=packed
        ).last_hidden_state
    last_ND: Tensor = hidden_1TD[0, packed.last_N]
    return last_ND


@contextmanager
def _last_layer_only_at(backbone: PreTrainedModel, last_N: Tensor) -> Iterator[None]:
    """Run the last layer's MLP only at the answers' ends: nothing else is read above its attention.

    A last layer without a plain MLP, or with one that chooses among experts, stays as it is.
    """
    mlp = getattr(backbone.layers[-1], "mlp", None) if hasattr(backbone, "layers") else None
    if mlp is None or not hasattr(mlp, "down_proj"):
        yield
        return
    shapes: list[Tensor] = []

    def before(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(inputs[0])
        return (inputs[0][:, last_N],)

    def after(_: Any, __: Any, output_1ND: Tensor) -> Tensor:
        return torch.zeros_like(shapes.pop()).index_copy_(1, last_N, output_1ND)

    hooks = [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def cannot_share(model: PreTrainedModel) -> str | None:
    """Return why this classifier must read the prompt again for each answer; None if it need not."""
    if not isinstance(model, GenericForSequenceClassification):
        return "it does not read its scores from the last token"

    def rows(ids: Ids) -> list[Ids]:
        return [[ids[(7 * i + 3 * n * (i > 4)) % len(ids)] for i in range(6 + 2 * n)] for n in range(3)]

    def shared(ids: Ids) -> tuple[list[Tensor], dict[int, int | None]]:
        texts = [(Prefix(rows(ids)[0][:5]), [row[5:] for row in rows(ids)])]
        packed = Packed(texts, model.device, final=model.config.num_hidden_layers - 1)
        with sharing_attention(model):
            return [model.score(_last_hidden(model, packed))], packed.window_of

    def plain(ids: Ids) -> list[Tensor]:
        one_by_one = (torch.tensor([row], device=model.device) for row in rows(ids))
        return [torch.cat([model(input_ids=ids_1T, use_cache=False).logits for ids_1T in one_by_one])]

    return reason_not_to_share(model, shared, plain)
