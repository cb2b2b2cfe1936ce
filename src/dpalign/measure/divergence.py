"""How far policies are from SFT: the KL divergence, from the answers in divergence folders.

Shapes: N answers, P prompts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.points import Rewards
from dpalign.rows import DIVERGENCES, read_table


def divergences(inputs: Mapping[str, Path], systems: Sequence[Rewards], bootstrap: Bootstrap) -> dict[str, Estimate]:
    """The KL divergence from SFT in nats an answer, by name; systems without a divergence folder are left out.

    Args:
        inputs: the folders of evaluate and divergence steps, among others; divergence-NAME belongs to evaluate-NAME.
    """
    measured = {
        folder: inputs[f"divergence-{name}"]
        for kind, name, folder in ((*step.split("-", 1), folder) for step, folder in inputs.items() if "-" in step)
        if kind == "evaluate" and f"divergence-{name}" in inputs
    }
    return {one.name: bootstrap.mean(by_prompt(measured[one.source])) for one in systems if one.source in measured}


def by_prompt(folder: Path) -> Array:
    """The mean of log pi(y | x, v) - log pi_sft(y | x) over the answers to each prompt of a divergence folder: (P,).

    The mean over prompts is the Monte Carlo estimate of the KL divergence. It can come out below 0 by chance.
    """
    rows = read_table(folder, DIVERGENCES, ["prompt_id", "log_policy", "log_sft"])
    log_ratio_N = rows["log_policy"].to_numpy() - rows["log_sft"].to_numpy()
    prompt_N = np.unique(rows["prompt_id"].to_numpy(), return_inverse=True)[1]
    return np.bincount(prompt_N, log_ratio_N) / np.bincount(prompt_N)
