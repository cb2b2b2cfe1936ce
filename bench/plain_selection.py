"""The other side of bench/selection.py: a choice among scored answers as a data frame does it.

python bench/plain_selection.py RECIPE FOLDER OUT
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from dpalign.paper.objectives import read_objectives
from dpalign.recipe import load
from dpalign.stages.preference import directions_of

KEYS = ["prompt_id", "t", "condition_index", "sample"]


def choose(recipe_file: Path, folder: Path, out: Path) -> None:
    """Read all, join, group by prompt, keep the best of each group for each direction, write."""
    recipe = load(recipe_file)
    candidates = pd.concat([pd.read_parquet(path) for path in sorted((folder / "sample").glob("*.parquet"))])
    scores = pd.concat([pd.read_parquet(path) for path in sorted((folder / "score").glob("*.parquet"))])
    table = candidates.merge(scores, on=KEYS, how="left", validate="one_to_one")
    reward_NK = read_objectives(np.stack(list(table["rewards"])), recipe.heads, recipe.objective_list)
    chosen = []
    for prompt_id, group in table.groupby("prompt_id", sort=False):
        finished = group.index[group["finished"]].to_numpy()
        for v_K in directions_of(recipe.preference, len(recipe.objectives), recipe.seed, 2, str(prompt_id)):
            best = finished[np.argmax(reward_NK[finished] @ v_K)]
            chosen.append((prompt_id, *v_K, table["response"].iat[best]))
    pd.DataFrame(chosen, columns=["prompt_id", *recipe.objectives, "response"]).to_parquet(out)


if __name__ == "__main__":
    choose(*map(Path, sys.argv[1:]))
