"""Labels by the names of heads: the data label `HEADS`, and a reward model may have others, or in another order."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpalign.paper.objectives import head_indices
from dpalign.rows import HEADS

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


def labels_for(labels: Sequence[float | None], heads: Sequence[str]) -> list[float | None]:
    """A row's labels, which are those of `HEADS`, for other heads; None for a head that no data set labels."""
    given = dict(zip(HEADS, labels, strict=True))
    return [given.get(head) for head in heads]


def trained_on(recipe: "Recipe") -> list[str]:
    """The parts of the rated answers that a model is trained on; a reward model that is given needs no labels."""
    return [*([] if recipe.reward.checkpoint else ["train"]), *(["judge"] if recipe.data.judge else [])]


def require_labels(recipe: "Recipe", rows: Sequence[Mapping[str, Any]], part: str) -> None:
    """Refuse to train on a head that an objective reads, or that no data set knows, and that no row labels.

    Raises:
        ValueError: names the head, the objective that reads it, and what to do.
    """
    read = {index: o.name for o in recipe.objective_list for index in head_indices(o, recipe.heads)}
    for index, head in enumerate(recipe.heads):
        if head in HEADS and (index not in read or any(row["labels"][HEADS.index(head)] is not None for row in rows)):
            continue
        reader = f"objective {read[index]!r} reads head {head!r}" if index in read else f"[heads] has {head!r}"
        rated = f"{len(rows)} training answers" if part == "train" else f"the judge's {len(rows)} answers"
        advice = "add a data set that has, or read another head in [objectives]; " + (
            "a reward model that is given needs no labels (reward.checkpoint)"
            if part == "train"
            else "data.judge = 0 does without a judge"
        )
        raise ValueError(f"{reader}, and none of {rated} has a label for it; {advice}")
