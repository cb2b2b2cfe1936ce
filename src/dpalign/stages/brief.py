"""A model that is asked in words to be brief, which is what users try first."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpalign.measure.system import System
from dpalign.stages import dpo
from dpalign.stages.rival import Rival

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """SFT, and DPO if it is compared too, with the wish in their system message."""
    yield Rival("sft-brief", System("SFT, asked to be brief"), {"policy": "sft"}, "brief")
    if "dpo" in recipe.compare.systems:
        yield from dpo.rivals(recipe, "brief")
