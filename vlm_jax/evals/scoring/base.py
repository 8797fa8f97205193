"""What a score of answers is given, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Answered(NamedTuple):
    """A question's answer, and what is known of the question.

    Attributes:
        text: what the model says.
        answers: the right answers: one, or as many as people were asked.
        options: the texts of what may be chosen, those of A, B, ... in turn; empty where nothing is chosen.
        kind: what the question is about, for numbers of each kind; may be empty.
        group: the image, where questions about one image count together; else empty.
        images: images of the question.
    """

    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    images: int = 1


class Scores(NamedTuple):
    """What answers are worth.

    Attributes:
        metrics: name -> number; the first is the one that the benchmark is known for.
        points: what each answer is worth, float64 [N].
    """

    metrics: dict[str, float]
    points: np.ndarray


Scorer = Callable[[Sequence[Answered]], Scores]


def metric_name(kind: str) -> str:
    """A kind as it stands in the name of a metric: `yes/no` would be two levels, `instance reasoning` two words."""
    return "_".join(kind.replace("/", " ").split())


def kinds_of(rows: Sequence[Answered]) -> Mapping[str, np.ndarray]:
    """Kind -> the places of its rows, int [n]; none for rows without a kind."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(metric_name(row.kind), []).append(place)
    return {kind: np.asarray(found) for kind, found in sorted(places.items()) if kind}


def mean_points(name: str, rows: Sequence[Answered], points: Sequence[float]) -> Scores:
    """The mean of the points as `name`, and that of each kind as `name/<kind>`."""
    values = np.asarray(points, np.float64)
    kinds = {f"{name}/{kind}": float(values[places].mean()) for kind, places in kinds_of(rows).items()}
    return Scores({name: float(values.mean()), **kinds}, values)
