"""UltraFeedback as first published (openbmb/UltraFeedback, MIT): four answers a prompt, four aspects each.

Known quirks, filtered or noted and counted: ratings are text, "1".."5" or "N/A"; a response may be
null, NaN or empty; a prompt may have no completions; overall_score may be text; and older files
turned an overall score of 1 into 10. The publishers' repair is applied to every 10 by the mean of its
four aspects: up to 2 it becomes 1, above 4 it stays, between them it is missing. The system prompt
under which a model wrote its answer (custom_system_prompt) is left out, as in the released reward
model's input.
"""

from statistics import mean

from dpalign.data.ratings import ASPECT_RANGE, OVERALL_RANGE, Rescaling, head_labels, loose_rating, rescale
from dpalign.data.report import ReadReport, Tally
from dpalign.data.rows import Rated, rated
from dpalign.data.sources import Row, describe, read_source
from dpalign.rows import user_prompt

ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def read_ultrafeedback(
    source: str, split: str | None = None, rescaling: Rescaling | None = None, repair_tens: bool = True
) -> tuple[list[Rated], ReadReport]:
    """Rated answers with heads 5-9 labelled, as far as they were rated; counts are of answers.

    Args:
        repair_tens: False only for a file in which every overall score of 10 is known to be meant.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a rating out of range.
    """
    rescaling = rescaling or Rescaling()
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        prompt = row.text_or_none("instruction")
        completions = row.parts("completions")
        if not completions:
            tally.notes["prompt without completions"] += 1
        for completion in completions:
            tally.read += 1
            points = _points(completion, rescaling, repair_tens, tally)
            response = completion.text_or_none("response")
            if prompt is None:
                tally.filtered["empty prompt"] += 1
            elif response is None:
                tally.filtered["empty response"] += 1
            elif all(value is None for value in points.values()):
                tally.filtered["no rating at all"] += 1
            else:
                rows.append(rated(user_prompt(prompt), response, "ultrafeedback", head_labels(points)))
    return rows, tally.report("ultrafeedback", describe(source, split), rows)


def _points(completion: Row, rescaling: Rescaling, repair_tens: bool, tally: Tally) -> dict[str, float | None]:
    annotations = completion.part("annotations")
    points: dict[str, float | None] = {}
    ratings = []
    for aspect in ASPECTS:
        rating = None if annotations.get(aspect) is None else _rating(annotations.part(aspect))
        if rating is None:
            tally.notes["aspect rated N/A"] += 1
        else:
            ratings.append(rating)
        points[f"ultrafeedback-{aspect}"] = None if rating is None else rescale(rating, rescaling.aspects)
    overall = loose_rating(completion, "overall_score", OVERALL_RANGE)
    if overall is None:
        tally.notes["overall_score missing"] += 1
    elif overall == OVERALL_RANGE[1] and repair_tens:
        overall = repair_ten(ratings)
        if overall is None:
            tally.notes["overall_score 10 in doubt, left out"] += 1
        elif overall == OVERALL_RANGE[0]:
            tally.notes["overall_score 10 repaired to 1"] += 1
    points["ultrafeedback-overall_score"] = None if overall is None else rescale(overall, rescaling.overall)
    return points


def repair_ten(aspect_ratings: list[float]) -> float | None:
    """What an overall score of 10 stands for, given the answer's aspect ratings (1..5, N/A left out)."""
    if not aspect_ratings:
        return None
    fine_grained = mean(aspect_ratings)
    if fine_grained <= 2:
        return 1.0
    return 10.0 if fine_grained > 4 else None


def _rating(annotation: Row) -> float | None:
    return loose_rating(annotation, "Rating", ASPECT_RANGE)
