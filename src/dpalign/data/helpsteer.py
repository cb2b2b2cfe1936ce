"""HelpSteer (nvidia/HelpSteer, CC-BY-4.0): five attributes of an answer, whole numbers of 0..4.

The only public ratings of verbosity, which is why section 3.1 takes it. Splits: train (35,331 rows),
validation (1,789).
"""

from dpalign.data.ratings import HELPSTEER_RANGE, Rescaling, head_labels, rescale, whole_rating
from dpalign.data.report import ReadReport, Tally
from dpalign.data.rows import Rated, rated
from dpalign.data.sources import describe, read_source
from dpalign.rows import user_prompt

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def read_helpsteer(
    source: str, split: str | None = None, rescaling: Rescaling | None = None
) -> tuple[list[Rated], ReadReport]:
    """Rated answers with heads 0-4 labelled.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a label other than 0..4.
    """
    formula = (rescaling or Rescaling()).helpsteer
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        tally.read += 1
        points: dict[str, float | None] = {
            f"helpsteer-{name}": rescale(whole_rating(row, name, HELPSTEER_RANGE), formula) for name in ATTRIBUTES
        }
        prompt, response = row.text_or_none("prompt"), row.text_or_none("response")
        if prompt is None:
            tally.filtered["empty prompt"] += 1
        elif response is None:
            tally.filtered["empty response"] += 1
        else:
            rows.append(rated(user_prompt(prompt), response, "helpsteer", head_labels(points)))
    return rows, tally.report("helpsteer", describe(source, split), rows)
