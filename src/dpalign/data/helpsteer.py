"""HelpSteer (nvidia/HelpSteer, CC-BY-4.0): five attributes of an answer, whole numbers of 0..4.

The only public ratings of verbosity; section 3.1 takes it for them. Splits: train (35,331 rows), validation (1,789).
"""

from typing import Final

from dpalign.data.ratings import DEFAULT, HELPSTEER_RANGE, Rescaling, rated, rescale, whole_rating
from dpalign.data.report import ReadReport, Tally
from dpalign.data.sources import describe, read_source
from dpalign.rows import Rated, user_prompt

ATTRIBUTES: Final = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def read_helpsteer(
    source: str, split: str | None = None, rescaling: Rescaling = DEFAULT
) -> tuple[list[Rated], ReadReport]:
    """Rated answers with heads 0-4 labelled.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a label other than 0..4.
    """
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        ratings = {name: whole_rating(row, name, HELPSTEER_RANGE) for name in ATTRIBUTES}
        prompt, response = row.text_or_empty("prompt"), row.text_or_empty("response")
        if tally.keeps(prompt, response):
            points = {f"helpsteer-{name}": rescale(rating, rescaling.helpsteer) for name, rating in ratings.items()}
            rows.append(rated(user_prompt(prompt), response, "helpsteer", points))
    return rows, tally.report("helpsteer", describe(source, split), rows)
