"""Figs. 4 and 5 of the paper, digitised: overlays for our own figures, and data to test the metrics on.

The points were read by eye, within 0.2 points. In Fig. 4, only the two ends of the curves of SteerLM and of
iterations 0 to 3 were read. Its rewards are those of the paper's reward model on 2,000 UltraFeedback prompts
(section 3.2). Another model's rewards share the axes, not the scale. Fig. 5 is the raw win rate against GPT-4
Turbo, judged by GPT-4 Turbo. Another judge or reference gives another scale.
"""

from typing import Final

FIG_4: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "SFT": ((50.0, 66.9),),
    "DPO": ((56.7, 75.2),),
    "SteerLM": ((39.8, 63.9), (58.7, 78.3)),
    "t=0": ((41.2, 63.4), (58.7, 75.0)),
    "t=1": ((38.1, 63.4), (56.5, 77.5)),
    "t=2": ((40.9, 66.9), (57.2, 78.9)),
    "t=3": ((42.8, 69.4), (57.8, 79.7)),
    "t=4": (
        (42.4, 69.3),
        (44.2, 71.1),
        (46.2, 73.0),
        (49.5, 75.3),
        (52.8, 77.8),
        (54.6, 78.9),
        (56.3, 79.8),
        (56.9, 80.0),
        (58.4, 80.5),
    ),
}
"""(verbosity, helpfulness) of each curve's points, as the figure's axes have them."""

FIG_5: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "DPA": ((763, 6.8), (975, 7.2), (1048, 7.5), (1282, 8.0), (1480, 10.4), (1566, 11.4), (1776, 12.0)),
    "SteerLM": ((429, 5.7), (863, 6.6), (1050, 7.6), (1546, 8.2)),
    "SFT": ((1031, 4.7),),
    "DPO": ((1445, 11.0),),
}
"""(average length in characters, win rate in %) on AlpacaEval 2; DPA is the fourth iteration, DPO is Zephyr-beta."""
