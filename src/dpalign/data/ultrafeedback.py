"""UltraFeedback as first published (openbmb/UltraFeedback, MIT): four answers a prompt, four aspects each.

Known quirks, filtered or noted and counted: ratings are text, "1".."5" or "N/A"; a response may be null, NaN or empty;
a prompt may have no completions; overall_score may be text; older files turned an overall score of 1 into 10. The
publishers' repair is applied to every 10 by the mean of its four aspects: up to 2 it becomes 1, above 4 it stays,
between them it is missing. The system prompt of the model that wrote an answer (custom_system_prompt) is left out, as
in the released reward model's input.
"""

from statistics import mean
from typing import Final

from dpalign.data.ratings import ASPECT_RANGE, DEFAULT, OVERALL_RANGE, Rescaling, loose_rating, rated, rescale
from dpalign.data.report import ReadReport, Tally
from dpalign.data.sources import Row, describe, read_source
from dpalign.rows import Rated, user_prompt

ASPECTS: Final = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def read_ultrafeedback(
    source: str, split: str | None = None, rescaling: Rescaling = DEFAULT
) -> tuple[list[Rated], ReadReport]:
    """Rated answers with heads 5-9 labelled where they have a rating; counts are of answers.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a rating out of range.
    """
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        prompt = row.text_or_empty("instruction")
        completions = row.parts("completions")
        if not completions:
            tally.notes["prompt without completions"] += 1
        for completion in completions:
            points = _points(completion, rescaling, tally)
            response = completion.text_or_empty("response")
            if tally.keeps(prompt, response, rated=any(value is not None for value in points.values())):
                rows.append(rated(user_prompt(prompt), response, "ultrafeedback", points))
    return rows, tally.report("ultrafeedback", describe(source, split), rows)


def _points(completion: Row, rescaling: Rescaling, tally: Tally) -> dict[str, float | None]:
    annotations = completion.part("annotations")
    points: dict[str, float | None] = {}
    ratings = []
    for aspect in ASPECTS:
        rating = None
        if annotations.get(aspect) is not None:
            rating = loose_rating(annotations.part(aspect), "Rating", ASPECT_RANGE)
        if rating is None:
            tally.notes["aspect rated N/A"] += 1
        else:
            ratings.append(rating)
        points[f"ultrafeedback-{aspect}"] = None if rating is None else rescale(rating, rescaling.aspects)
    overall = loose_rating(completion, "overall_score", OVERALL_RANGE)
    if overall is None:
        tally.notes["overall_score missing"] += 1
    elif overall == OVERALL_RANGE[1]:
        overall = repair_ten(ratings)
        if overall is None:
            tally.notes["overall_score 10 in doubt, left out"] += 1
        elif overall == OVERALL_RANGE[0]:
            tally.notes["overall_score 10 repaired to 1"] += 1
    points["ultrafeedback-overall_score"] = None if overall is None else rescale(overall, rescaling.overall)
    return points


def repair_ten(aspect_ratings: list[float]) -> float | None:
    """The true overall score behind a 10, from the answer's aspect ratings (1..5, without N/A); None in doubt."""
    if not aspect_ratings:
        return None
    fine_grained = mean(aspect_ratings)
    if fine_grained <= 2:
        return 1.0
    return 10.0 if fine_grained > 4 else None
